"""streamctl: slow-thinking generative recommendation, from raw log to served answer."""

__version__ = "0.1.0"
