"""What tests and benchmarks ask of every op: does a backend give what the reference gives?"""

import importlib

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases_of(op):
    """The module `cases` of an op's folder: cases(dtype), call(case, backend), TOLERANCE."""
    return importlib.import_module(f"{__package__}.{op}.cases")


def to_device(value, device):
    """A case, or any part of one, with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(to_device(part, device) for part in value))
    return value


def assert_equal(got, expected, tolerance):
    """Integers exactly, floats within the op's tolerance; raises AssertionError that says where."""
    for ours, theirs in zip(got, expected, strict=True):
        integer = not theirs.is_floating_point()
        limits = {"rtol": 0.0, "atol": 0.0} if integer else tolerance
        torch.testing.assert_close(ours, theirs, **limits, equal_nan=False)
