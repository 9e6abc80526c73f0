"""Device, precision and seeds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from streamctl.distributed import told_cpu, world_size
from streamctl.errors import UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`.

    Under `accelerate launch --cpu` `auto` is the CPU. Under torchrun `auto` and `cuda` are this
    process's own GPU.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not told_cpu() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no such CUDA device here: --device {name}", run="--device cpu")
    if name == "cuda" and world_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on the device's own instructions."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def autocast(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """bf16 autocast where the device has it; does nothing elsewhere."""
    import torch

    if enabled and has_bf16(device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    else:
        yield


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, e.g. `derive_seed(seed, "order", epoch)`.

    Data order, rollouts and bootstrap take their randomness from such seeds, so that it depends
    on where in the work they are and not on what ran before: that is what makes resume exact.
    """
    import hashlib

    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
