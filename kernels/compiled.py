"""When compiled code runs, and where it is kept.

Compiling takes tens of seconds once a machine. A training waits for it: its arithmetic must not
change on the way. With STREAMCTL_COMPILE=cached, as `serve` sets it, a process computes in plain
PyTorch unless everything that `streamctl.model.warm` compiles is in the cache when it begins; where
no folder can be written for a cache, it compiles. With STREAMCTL_COMPILE=never, as `recommend` for
one user sets it, compiled code is not even read, except to gather evidence for many users at once.
"""

import hashlib
import os
import sys
from functools import cache
from pathlib import Path

from .. import cache as places
from .dispatch import KernelError

MODES = ("wait", "cached", "never")

# Of every compiled function. Numba refuses to cache where it finds no folder to write.
OPTIONS = {"nogil": True, "cache": bool(os.environ.get("NUMBA_CACHE_DIR"))}


@cache
def machine() -> str:
    """A hash of the processor and of the libraries whose speed or code depends on it."""
    from importlib.metadata import version

    from llvmlite import binding

    features = sorted(name for name, there in binding.get_host_cpu_features().items() if there)
    told = [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES",
            "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]  # fmt: skip
    parts = [binding.get_host_cpu_name(), *features, *told, version("torch"), version("numba")]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


@cache
def _marker() -> Path | None:
    """The file that says that all is compiled: for this machine, these sources, this cache."""
    if (place := places.folder()) is None or not OPTIONS["cache"]:
        return None
    here = Path(__file__).parent
    package = Path(sys.modules["streamctl"].__file__).parent
    folders = (here, package / "model", package / "retrieval")
    sources = [path for root in folders for path in sorted(root.rglob("*.py"))]
    stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sources]
    text = f"{machine()} {os.environ['NUMBA_CACHE_DIR']} {stamps}"
    return place / f"compiled-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def ready() -> bool:
    """Whether compiled code may be called: the same in all of a process's life.

    Raises:
        KernelError: STREAMCTL_COMPILE says something that is no mode.
    """
    mode = os.environ.get("STREAMCTL_COMPILE") or "wait"
    if mode not in MODES:
        known = ", ".join(MODES)
        raise KernelError(f"STREAMCTL_COMPILE: unknown mode {mode!r}; known: {known}")
    return mode == "wait" or (mode == "cached" and _found())


@cache
def _found() -> bool:
    return (marker := _marker()) is None or marker.exists()


def finished() -> None:
    """Called by the process that has compiled everything."""
    if (marker := _marker()) is not None:
        marker.touch()
