"""streamctl: slow-thinking generative recommendation, from raw log to served answer."""

from streamctl import cache

__version__ = "0.1.0"
cache.prepare()
