"""Losses over the catalogue: full cross-entropy with its gradient in place, and sampled BCE."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from streamctl.device import has_bf16

_LOGITS = 1 << 21  # logits held at a time: 8 MB, which stay in the cache
_LARGE = 4096  # items from which the products are worth bf16
_TINY = 1e-38  # a probability that underflows to 0 would make the reported loss infinite


class _CatalogueCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose gradient is made in the forward pass, chunk by chunk.

    The (T, N) logits are never kept: each chunk turns from logits into probabilities into their
    gradient in its own memory. That is a third of the memory traffic of log_softmax and its
    backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, marked, bonus):
        low = torch.bfloat16 if _in_bf16(weight) else torch.float32
        states, items = hidden.to(low), weight.to(low)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        grad_bonus = None if bonus is None else torch.zeros_like(bonus)
        total = hidden.new_zeros(())
        step = max(1, min(len(hidden), _LOGITS // len(weight)))
        # One buffer for every chunk: fresh memory costs more than the product written to it.
        buffer = states.new_empty(step, len(weight))
        for begin in range(0, len(hidden), step):
            rows = slice(begin, begin + step)
            chunk, wanted = states[rows], targets[rows, None]
            logits = torch.mm(chunk, items.T, out=buffer[: len(chunk)])
            if bias is not None:
                logits += bias
            if bonus is not None:
                cells = _cells(marked[rows])
                logits[cells] += bonus
            torch.softmax(logits, 1, out=logits)
            total -= logits.gather(1, wanted).float().clamp_(min=_TINY).log_().sum()
            logits.scatter_add_(1, wanted, logits.new_full((len(chunk), 1), -1.0))
            grad_hidden[rows] = logits @ items
            grad_weight += logits.T @ chunk
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
            if grad_bonus is not None:
                grad_bonus += logits[cells].sum(dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_bonus)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        grads = ctx.saved_tensors
        scale = grad / len(grads[0])
        hidden, weight, bias, bonus = (None if g is None else g * scale for g in grads)
        return hidden, weight, bias, None, None, bonus


def _cells(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each item of marked (T, H), once each; -1 is none."""
    marked = marked.sort(1).values
    new = marked >= 0
    new[:, 1:] &= marked[:, 1:] != marked[:, :-1]
    return new.nonzero()[:, 0], marked[new]


def _in_bf16(weight: torch.Tensor) -> bool:
    return len(weight) >= _LARGE and has_bf16(weight.device)


def catalogue_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    marked: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over T of -log softmax(hidden @ weight.T + bias, + bonus where marked)[target].

    Over 4,096 items and more the products are in bf16, where the device has it, and summed in
    float32.

    Args:
        hidden: float32 (T, d).
        weight: float32 (N, d), the catalogue.
        targets: int64 (T,).
        bias: float32 (N,) or None.
        marked: int64 (T, H) items of each row whose logits carry the bonus; -1 is none.
        bonus: float32 scalar; None where nothing is marked.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _CatalogueCrossEntropy.apply(hidden.float(), weight, bias, targets, marked, bonus)


def sampled_bce(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    negatives: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over T of -log sigmoid(s(target)) - sum over negatives (T, n) of log(1 - sigmoid(s)).

    The other arguments are those of `catalogue_cross_entropy`.
    """
    items = torch.cat([targets[:, None], negatives], dim=1)  # (T, 1 + n)
    scores = torch.einsum("td,tnd->tn", hidden, weight[items])
    if bias is not None:
        scores = scores + bias[items]
    signs = torch.ones_like(scores)
    signs[:, 1:] = -1
    return -F.logsigmoid(signs * scores).sum(1).mean()


def sample_negatives(
    taken: torch.Tensor, count: int, n_items: int, generator: torch.Generator
) -> torch.Tensor:
    """Uniform items (B, count) that are not among a row's own, taken (B, S) int64.

    Raises:
        ValueError: a row might hold the whole catalogue.
    """
    if taken.shape[1] >= n_items:
        raise ValueError(f"{taken.shape[1]} items taken of {n_items} leave no negatives")
    size = (len(taken), count)
    drawn = torch.randint(n_items, size, generator=generator).to(taken.device)
    while (clash := (drawn[:, :, None] == taken[:, None, :]).any(2)).any():
        again = torch.randint(n_items, size, generator=generator).to(taken.device)
        drawn = torch.where(clash, again, drawn)
    return drawn
