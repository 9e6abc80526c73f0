"""residual_quantize: greedy residual quantization, its reconstruction and its gradient."""

import torch

from .. import checks
from ..dispatch import KernelError, implementation

__all__ = ["reconstruct", "residual_quantize", "straight_through"]


def residual_quantize(x, codebooks, *, backend=None):
    """Codes of every level and the final residual (Eq. 5), in one pass over x.

        r_0 = x;  codes[:, l] = argmin_k ||r_l - codebooks[l, k]||^2;  r_{l+1} = r_l - chosen

    Each level is as exact as nearest_codeword (lowest index on ties); residuals are float32,
    one rounding a level, the same on every backend. Rows are independent.

    x: (N, D) float32 or bfloat16, any strides. codebooks: (L, K, D) float32 or bfloat16,
        L >= 1, K >= 1.
    backend: as in nearest_codeword.
    Returns codes (N, L) int64 and residual (N, D) float32 (not differentiable: see
    straight_through); reconstruct(codes, codebooks) + residual = x up to float32 rounding.
    Raises KernelError for wrong shapes, dtypes or devices, NaN or Inf, an unusable backend.
    """
    codebooks = _codebooks(codebooks)
    x = checks.tensor("x", x, ("N", codebooks.shape[2]), checks.FLOATS, codebooks.device)
    return implementation(__name__, backend, x.device.type)(x, codebooks)


def reconstruct(codes, codebooks):
    """The sum of the chosen codewords, level by level: (N, D) float32.

    codes: (N, L) int64.
    codebooks: (L, K, D) float32 or bfloat16. Differentiable with respect to codebooks.
    Raises KernelError for wrong shapes or dtypes, and for codes outside [0, K).
    """
    _codebooks(codebooks)
    levels, size, width = codebooks.shape
    checks.tensor("codes", codes, ("N", levels), (torch.int64,), codebooks.device)
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
        low, high = int(codes.min()), int(codes.max())
        raise KernelError(f"codes must lie in [0, {size}), got values in [{low}, {high}]")
    total = torch.zeros(len(codes), width, dtype=torch.float32, device=codebooks.device)
    for level in range(levels):
        total = total + codebooks[level].float()[codes[:, level]]
    return total


def straight_through(x, codebooks, *, backend=None):
    """Quantize inside a network (RQ-VAE, Eqs. 5-6): forward sums codewords, backward is identity.

    Arguments as residual_quantize. Returns codes (N, L) int64 and quantized (N, D) in x's dtype:
    exactly reconstruct(codes, codebooks), with d quantized / d x = I and no
    gradient to codebooks. The codebook and commitment terms of Eq. 6 gather the codewords
    themselves, `codebooks[l][codes[:, l]]`, which carries their gradient.
    """
    codes, _ = residual_quantize(x, codebooks, backend=backend)
    return codes, _StraightThrough.apply(x, reconstruct(codes, codebooks.detach()))


def _codebooks(codebooks):
    codebooks = checks.codewords("codebooks", codebooks, ("L", "K", "D"), None)
    if codebooks.shape[0] < 1:
        raise KernelError(f"codebooks needs at least one level, got {tuple(codebooks.shape)}")
    return codebooks


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantized):
        return quantized.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
