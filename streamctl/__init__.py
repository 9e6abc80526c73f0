"""streamctl: slow-thinking generative recommendation, from raw log to served answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamctl import cache

if TYPE_CHECKING:
    from streamctl.api import Run, fit, load, prepare
    from streamctl.errors import StreamctlError
    from streamctl.recommender import Recommender

__all__ = ["Recommender", "Run", "StreamctlError", "fit", "load", "prepare"]
__version__ = "0.2.0"
cache.prepare()


def __getattr__(name: str) -> Any:
    """The Python API, read when it is first asked for: the command line starts without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = {"StreamctlError": "errors", "Recommender": "recommender"}
    return getattr(import_module(f"streamctl.{own.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
