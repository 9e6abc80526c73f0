"""Checks shared by the ops: each failure names the argument, what it must be and what it is."""

import math

import torch

from .dispatch import KernelError

FLOATS = (torch.float32, torch.bfloat16)


def _names(dtypes):
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name, value, shape, dtypes, device=None):
    """`value` detached, after checking it is a tensor of one of `dtypes` on `device`.

    shape: a tuple of dimension names (any size) or ints (that size).
    """
    if not isinstance(value, torch.Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise KernelError(f"{name} must be a torch.Tensor, got {kind}")
    got = value.shape
    if len(got) != len(shape) or any(
        want != size and not isinstance(want, str) for want, size in zip(shape, got, strict=True)
    ):
        want = "(" + ", ".join(str(s) for s in shape) + ")"
        raise KernelError(f"{name} must have shape {want}, got {tuple(got)}")
    if value.dtype not in dtypes:
        got = str(value.dtype).removeprefix("torch.")
        raise KernelError(f"{name} must be {_names(dtypes)}, got {got}")
    if device is not None and value.device != device:
        raise KernelError(f"{name} must be on {device}, got {value.device}")
    return value.detach()


def codewords(name, value, shape, device):
    """A codebook: finite, at least one codeword of at least one dimension."""
    value = tensor(name, value, shape, FLOATS, device)
    if value.shape[-2] < 1 or value.shape[-1] < 1:
        raise KernelError(f"{name} needs at least one codeword, got shape {tuple(value.shape)}")
    # In one pass: torch.isfinite(value).all() takes half as long as a small search.
    ends = torch.aminmax(value) if value.numel() else ()
    if not all(math.isfinite(float(end)) for end in ends):
        raise KernelError(f"{name} must be finite, got NaN or Inf")
    return value


def not_finite(row):
    return KernelError(f"x must be finite, got NaN or Inf in row {row}")
