"""When compiled code runs, and where it is kept.

Compiling takes tens of seconds once a machine. A training waits for it: its arithmetic must not
change on the way. With STREAMCTL_COMPILE=background, as `serve` and `recommend --input` set it, a
process goes on in plain PyTorch while another one, of low priority, compiles what
`streamctl.model.warm` calls; what that leaves in the cache is loaded when all of it is there. A
server would keep requests waiting while it loads: its processes `settle`, and others take their
place. Where no folder can be written it waits: the other process could hand nothing over. With
STREAMCTL_COMPILE=never, as `recommend` for one user sets it, nothing is compiled, and code that is
compiled already is not used; evidence for many users at once is, in any case.
"""

import atexit
import hashlib
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from .. import cache as places
from .dispatch import KernelError

MODES = ("wait", "background", "never")
_LOOK_EVERY_S = 0.5

# Of every compiled function. Numba refuses to cache where it finds no folder to write.
OPTIONS = {"nogil": True, "cache": bool(os.environ.get("NUMBA_CACHE_DIR"))}


class _State:
    ready = False
    looked = 0.0
    process = None


def mode() -> str:
    """wait, background or never; wait instead of background where there is no cache.

    Raises:
        KernelError: STREAMCTL_COMPILE says something else.
    """
    told = os.environ.get("STREAMCTL_COMPILE") or "wait"
    if told not in MODES:
        known = ", ".join(MODES)
        raise KernelError(f"STREAMCTL_COMPILE: unknown mode {told!r}; known: {known}")
    return "wait" if told == "background" and _marker() is None else told


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
    """Whether compiled code may be called now; starts the compiling where it is not there yet."""
    if _State.ready:
        return True
    chosen = mode()
    if chosen == "wait":
        return True
    now = time.monotonic()
    if chosen == "never" or now < _State.looked:
        return False
    _State.looked = now + _LOOK_EVERY_S
    if complete():
        _State.ready = True
    elif _State.process is None:
        _State.process = _start()
    return _State.ready


def _start() -> subprocess.Popen | None:
    command = [sys.executable, "-m", "streamctl.model.warm"]
    environment = {**os.environ, "STREAMCTL_COMPILE": "wait", "OMP_NUM_THREADS": "1"}
    # The package may be found through this process's path alone.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, env=environment
        )
    except OSError:
        return None
    # What it has compiled stays; the next process goes on from there.
    atexit.register(process.terminate)
    return process


def complete() -> bool:
    """Whether all is compiled on this machine: a process that begins now is ready at once."""
    return (marker := _marker()) is not None and marker.exists()


def failed() -> bool:
    """Whether the process that was to compile has ended otherwise than well."""
    return _State.process is not None and _State.process.poll() not in (None, 0)


def settle() -> bool:
    """Have `ready` say for good what it has said; False while another process compiles."""
    if _State.ready or mode() == "wait":
        return True
    os.environ["STREAMCTL_COMPILE"] = "never"
    return _State.process is None


def finished() -> None:
    """Called by the process that has compiled everything."""
    if (marker := _marker()) is not None:
        marker.touch()
