"""streamctl: slow-thinking generative recommendation, from raw log to served answer."""

from streamctl import cache

__version__ = "0.2.0"
cache.prepare()
