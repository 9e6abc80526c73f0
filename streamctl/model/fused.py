"""The element-wise work of a transformer block in single passes: residual, dropout, norm, softmax.

Matrix products are a quarter of a small T5's training step on a CPU; the rest is memory traffic
between them. On CPU tensors (float32 or bfloat16) each function below reads its inputs once and
writes its outputs once (`loops.py`); elsewhere plain PyTorch does the same. Dropout draws its mask
from a hash of (seed, position), so that no mask is stored and the backward pass draws it again;
the seed comes from torch's global generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from streamctl.kernels import compiled, threads

RANGE = 1 << 16  # elements that one thread takes at a time
_NO_ROWS = {
    torch.float32: np.empty((0, 0), np.float32),
    torch.bfloat16: np.empty((0, 0), np.uint16),
}
_NO_MASK = np.empty((0, 0), np.bool_)


def _loops() -> Any:
    """Read when they are first called: an answer in plain torch does not wait for Numba."""
    from streamctl.model import loops

    return loops


def _compiled(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _NO_ROWS and compiled.ready()


def array(x: torch.Tensor, width: int | None = None) -> np.ndarray:
    """A contiguous float32 or bf16 tensor as (rows, width), bf16 as its bits.

    The width is that of the last dimension unless said.
    """
    if x.requires_grad:
        x = x.detach()
    x = x.view(-1, width or x.shape[-1])
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def _chance(p: float) -> tuple[np.uint32, np.uint32, np.float32]:
    """Seed, threshold and scale of a dropout: an element is kept if its hash >= the threshold."""
    if not p:
        return np.uint32(0), np.uint32(0), np.float32(1)
    seed = int(torch.randint(1 << 32, ()))
    return np.uint32(seed), np.uint32(round(p * 2**32)), np.float32(1 / (1 - p))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, p):
        ctx.set_materialize_grads(False)
        width = x.shape[-1]
        x = x.contiguous()
        out = torch.empty_like(x)
        inverse = np.empty(x.numel() // width, np.float32)
        ctx.chance = _chance(p)
        if delta is None:
            total, given = x, _NO_ROWS[x.dtype]
        else:
            total, given = torch.empty_like(x), array(delta.to(x.dtype).contiguous(), width)
        scale = weight.detach().float().numpy()  # bf16 while serving
        arrays = array(x, width), given, scale, np.float32(eps), *ctx.chance
        outputs = array(total, width), array(out, width), inverse

        def run(first, last):
            _loops().norm_forward(*arrays, first, last, *outputs)

        threads.over_ranges(run, len(inverse), max(1, RANGE // width))
        ctx.save_for_backward(total, weight)
        ctx.inverse, ctx.branch = inverse, None if delta is None else delta.dtype
        return out if delta is None else (total, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grad_total, grad_out = (None, *grads) if ctx.branch is None else grads
        total, weight = ctx.saved_tensors
        width = total.shape[-1]
        if grad_out is None:
            grad_out = torch.zeros_like(total)
        rows = len(ctx.inverse)
        step = max(1, RANGE // width)
        grad_x = torch.empty_like(total)
        grad_delta = None if ctx.branch is None else torch.empty_like(total)
        grad_weight = np.zeros((-(-rows // step), width), np.float32)
        none = _NO_ROWS[total.dtype]
        arrays = (
            array(total, width), weight.detach().float().numpy(), ctx.inverse,
            none if grad_total is None else array(grad_total.contiguous(), width),
            array(grad_out.contiguous(), width), *ctx.chance,
        )  # fmt: skip
        outputs = array(grad_x, width), none if grad_delta is None else array(grad_delta, width)

        def run(first, last):
            _loops().norm_backward(*arrays, first, last, *outputs, grad_weight[first // step])

        threads.over_ranges(run, rows, step)
        if grad_delta is not None:
            grad_delta = grad_delta.to(ctx.branch)
        return grad_x, grad_delta, torch.from_numpy(grad_weight.sum(0)), None, None


def residual_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual connection and the norm that follows it.

    Args:
        x: (..., d), the residual stream.
        delta: (..., d), what a layer adds to it, before dropout; None where nothing is added.
        weight: (d,) float32 of the norm (no mean is taken, no bias added).
        p: probability that an element of delta is dropped.

    Returns:
        x + dropout(delta), and that over its root mean square, times the weight; dtype of x.
    """
    if _compiled(x):
        normed = _ResidualNorm.apply(x, delta, weight, eps, p)
        return (x, normed) if delta is None else normed
    if delta is not None:
        x = x + F.dropout(delta, p).to(x.dtype)
    return x, F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.chance = _chance(p)
        return _dropped(x, ctx.chance)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _dropped(grad, ctx.chance), None


def _dropped(x: torch.Tensor, chance: tuple) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    source, target = array(x, 1).reshape(-1), array(out, 1).reshape(-1)

    def run(first, last):
        _loops().drop(source, *chance, first, last, target)

    threads.over_ranges(run, len(source), RANGE)
    return out


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p)."""
    if not p:
        return x
    return _Dropout.apply(x, p) if _compiled(x) else F.dropout(x, p)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, bias, mask):
        scores = scores.contiguous()
        out = torch.empty_like(scores)
        width = scores.shape[-1]
        source, target = array(scores), array(out)
        added = _NO_ROWS[torch.float32]
        if bias is not None:
            added = bias.detach().float().contiguous().view(-1, width).numpy()
        open_keys = _NO_MASK if mask is None else mask.numpy()
        per_user = max(1, len(source) // max(1, len(open_keys)))

        def run(first, last):
            _loops().softmax_forward(source, added, open_keys, per_user, first, last, target)

        threads.over_ranges(run, len(source), max(1, RANGE // max(1, width)))
        ctx.save_for_backward(out)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        width = weights.shape[-1]
        result = torch.empty_like(weights)
        arrays = [array(x, width) for x in (weights, grad.contiguous(), result)]
        wanted = ctx.bias is not None and ctx.needs_input_grad[1]
        rows, step = len(arrays[0]), max(1, RANGE // max(1, width))
        lines = ctx.bias[0].numel() // width if wanted else 0
        grad_bias = np.zeros((-(-rows // step), lines, width), np.float32)

        def run(first, last):
            weights, grad, out = arrays
            _loops().softmax_backward(weights, grad, first, last, out, grad_bias[first // step])

        threads.over_ranges(run, rows, step)
        if not wanted:
            return result, None, None
        shape, dtype = ctx.bias
        return result, torch.from_numpy(grad_bias.sum(0)).view(shape).to(dtype), None


def softmax(
    scores: torch.Tensor, bias: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention weights: softmax(scores + bias) over the last dimension, float32 inside.

    Args:
        scores: (B, ..., T, S).
        bias: (h, T, S) added to the last three dimensions, -inf where a key may not be seen.
        mask: (B, S) bool, False where a key of this user may not be seen.

    Returns:
        the shape and dtype of the scores.
    """
    if _compiled(scores):
        return _Softmax.apply(scores, bias, mask)
    values = scores.float() if bias is None else scores.float() + bias
    if mask is not None:
        values = values.masked_fill(~mask.view(len(mask), *[1] * (scores.ndim - 2), -1), -torch.inf)
    return torch.softmax(values, -1).to(scores.dtype)
