"""Which implementation of an op runs: argument > STREAMCTL_KERNELS > auto."""

import importlib
import importlib.util
import os

# Backend -> the file inside an op's folder that implements it as `run(...)`.
_FILES = {"reference": "reference", "numba": "numba_cpu", "triton": "triton_gpu"}
NAMES = ("auto", *_FILES)


class KernelError(ValueError):
    """An input or a backend choice that a kernel cannot accept; says what was required."""


def _known(name, origin):
    if name not in NAMES:
        raise KernelError(f"{origin}: unknown backend {name!r}; known: {', '.join(NAMES)}")
    return name


def interpreting():
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _missing(name, device_type):
    """What keeps backend `name` from running on tensors of this device ("" when nothing does)."""
    if name == "numba":
        if device_type != "cpu":
            return f"it runs on CPU tensors, the input is on {device_type!r}"
        if importlib.util.find_spec("numba") is None:
            return "the package numba is not installed (pip install numba)"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if device_type != "cuda" and not interpreting():
            return (
                f"it runs on CUDA tensors, the input is on {device_type!r}"
                " (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
            )
    return ""


def backends(device="cpu"):
    """What can run on `device`: a dict of backend name -> "" or what is missing."""
    device_type = str(device).split(":")[0]
    return {name: _missing(name, device_type) for name in _FILES}


def _compiled_ready():
    from .compiled import ready  # which needs KernelError of this module

    return ready()


def resolve(backend, device_type):
    """The backend's name for this call; raises KernelError when the chosen one cannot run."""
    origin = "STREAMCTL_KERNELS" if backend is None else "backend="
    name = _known((os.environ.get(origin) or "auto") if backend is None else backend, origin)
    if name == "auto":
        name, origin = {"cuda": "triton", "cpu": "numba"}.get(device_type, "reference"), "auto"
        if name == "numba" and not _compiled_ready():
            name = "reference"
    if missing := _missing(name, device_type):
        raise KernelError(
            f"{origin} chose backend {name!r}, which cannot run here: {missing};"
            " backend='reference' runs everywhere"
        )
    return name


def implementation(op, backend, device_type):
    """The `run` function of op folder `op` (its package name) for this call."""
    return importlib.import_module(f"{op}.{_FILES[resolve(backend, device_type)]}").run
