"""Iterative inference: think tokens derived from what is still missing (Sec. 2.3.1, Eqs. 12-13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from streamctl import kernels
from streamctl.config import AnnotateConfig
from streamctl.data.split import Examples
from streamctl.device import autocast
from streamctl.distributed import ranks
from streamctl.model.policy import Encoded, Policy
from streamctl.progress import console, progress_bar, say
from streamctl.ranking.evaluate import batches_by_length
from streamctl.training.loop import Batch
from streamctl.training.losses import quantization_loss, state_target_loss

Mode = Literal["normalised", "literal"]
# A healthy labelling uses its vocabulary and tells targets apart; see `collapsed`.
LOWEST_PERPLEXITY = 1 / 20  # share of the think vocabulary
FEWEST_CHAINS = 1 / 10  # distinct chains, as a share of distinct targets


@dataclass(frozen=True)
class Inference:
    """What iterative inference went through."""

    chosen: torch.Tensor  # (B, l) int64, o_1..o_l: think tokens, or places among the evidence
    states: torch.Tensor  # (B, l + 1, d), s_0..s_l
    residuals: torch.Tensor  # (B, l, d), r_1..r_l
    target: torch.Tensor  # (B, d), t


def think_vectors(policy: Policy, mode: Mode = "normalised") -> torch.Tensor:
    """Embeddings that Eq. 12 searches: those of the legal think tokens, (n, d) float32.

    In the normalised mode they have unit length, as the states and targets do: by plain L2 the
    shortest embeddings would be everybody's nearest.
    """
    low, high = policy.tokens.think_range
    vectors = policy.shared.weight[low:high].float()
    return F.normalize(vectors, dim=-1) if mode == "normalised" else vectors


def iterate(
    policy: Policy,
    encoded: Encoded,
    targets: torch.Tensor,
    length: int,
    nearest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    normalise: bool = True,
) -> Inference:
    """Annotate users with the thoughts that lead to their targets.

        s_0 = MLP_s(d_0);  r_i = MLP_r(t - s_{i-1});  o_i = what is nearest to r_i (Eq. 12);
        d_i = the decoder's state at o_i;  s_i = MLP_s(d_0 + ... + d_i)

    Args:
        targets: (B,) int64 items.
        nearest: residuals (B, d) -> o_i (B,), and as the decoder reads it, (B, 1, 1) tokens or
            (B, 1, 1, d) vectors.
        normalise: take t and s to unit length.
    """
    thinker = policy.thinker
    target = policy.item_vectors(targets).detach().float()
    total = encoded.mean().float()
    states, residuals, chosen = [thinker.state(total)], [], []
    feed = torch.full((len(targets), 1, 1), policy.tokens.THINK, device=targets.device)
    _, past = policy.extend(encoded, feed)
    for _ in range(length):
        residuals.append(thinker.residual(target, states[-1], normalise=normalise))
        choice, feed = nearest(residuals[-1].detach())
        chosen.append(choice)
        hidden, past = policy.extend(encoded, feed, past=past)
        total = total + hidden[:, 0, 0].float()
        states.append(thinker.state(total))
    steps = (torch.stack(each, 1) for each in (chosen, states, residuals))
    return Inference(*steps, target)


def infer(
    policy: Policy, encoded: Encoded, targets: torch.Tensor, length: int, mode: Mode = "normalised"
) -> Inference:
    """`iterate` over the think tokens; mode `literal` leaves vectors the length that they have."""
    low, vectors = policy.tokens.think_range[0], think_vectors(policy, mode).detach()

    def nearest(residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        token = kernels.nearest_codeword(residual.float(), vectors)[0] + low
        return token, token[:, None, None]

    return iterate(policy, encoded, targets, length, nearest, normalise=mode == "normalised")


@torch.no_grad()
def label(
    policy: Policy,
    history: torch.Tensor,
    targets: torch.Tensor,
    length: int,
    mode: Mode = "normalised",
) -> torch.Tensor:
    """Think tokens (B, l) int64 for histories (B, H), -1 on the right, and targets (B,)."""
    return infer(policy, policy.encode(history), targets, length, mode).chosen


@torch.no_grad()
def label_all(
    policy: Policy, examples: Examples, length: int, mode: Mode, batch: int, title: str = "annotate"
) -> tuple[np.ndarray, dict[str, Any]]:
    """Thoughts of all examples.

    Returns:
        int32 (E, l), and the report: distinct chains and targets, perplexity of the tokens overall
        and by step, the mean ||t - s_i|| by step (of unit vectors in the normalised mode), and
        whether the labels have collapsed.
    """
    device = policy.item_tokens.device
    policy.eval()
    thoughts = np.zeros((len(examples), length), np.int32)
    distance = torch.zeros(length + 1, dtype=torch.float64, device=device)
    with progress_bar(title, len(examples), "sequences") as bar, autocast(device):
        for rows in ranks().mine(list(batches_by_length(examples.lengths, batch))):
            history = torch.from_numpy(examples.histories(rows)).to(device)
            targets = torch.from_numpy(examples.targets[rows]).to(device)
            steps = infer(policy, policy.encode(history), targets, length, mode)
            thoughts[rows] = steps.chosen.cpu().numpy()
            target, states = steps.target[:, None], steps.states.float()
            if mode == "normalised":
                target, states = F.normalize(target, dim=-1), F.normalize(states, dim=-1)
            distance += (target - states).norm(dim=-1).double().sum(0)
            bar.advance(len(rows) * ranks().count)
    thoughts, distance = ranks().sum(thoughts), ranks().sum(distance.cpu().numpy())
    low, high = policy.tokens.think_range
    report = describe(thoughts - low, high - low, examples.targets)
    report["distance"] = [float(value) for value in distance / max(len(examples), 1)]
    announce(report, title)
    return thoughts, report


def perplexity(tokens: np.ndarray, vocabulary: int) -> float:
    """exp of the entropy of the tokens' frequencies: how many are in effective use."""
    share = np.bincount(tokens.ravel(), minlength=vocabulary) / max(tokens.size, 1)
    used = share[share > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def describe(thoughts: np.ndarray, vocabulary: int, targets: np.ndarray) -> dict[str, Any]:
    """How varied labels are: thoughts int (E, l) counted from 0, targets (E,)."""
    report = {
        "examples": len(thoughts),
        "vocabulary": vocabulary,
        "distinct_targets": len(np.unique(targets)),
        "distinct_chains": len(np.unique(thoughts, axis=0)),
        "perplexity": perplexity(thoughts, vocabulary),
        "perplexity_by_step": [perplexity(step, vocabulary) for step in thoughts.T],
    }
    return report | {"collapsed": collapsed(report)}


def collapsed(report: dict[str, Any]) -> bool:
    """Whether labels say too little to be reasons for anything.

    They have collapsed when fewer than a twentieth of the think tokens are in effective use
    (perplexity), or when there are fewer distinct chains than a tenth of the distinct targets:
    most targets then share their whole trace with ten others, so that it cannot lead to them.
    """
    few_tokens = report["perplexity"] < LOWEST_PERPLEXITY * report["vocabulary"]
    few_chains = report["distinct_chains"] < FEWEST_CHAINS * report["distinct_targets"]
    return few_tokens or few_chains


def announce(report: dict[str, Any], title: str) -> None:
    """Say how varied the labels are; loudly and in red when they have collapsed."""
    text = (
        f"{title}: {report['distinct_chains']:,} distinct chains for "
        f"{report['distinct_targets']:,} targets, perplexity {report['perplexity']:.0f} of "
        f"{report['vocabulary']}, distance to the target "
        + " -> ".join(f"{value:.2f}" for value in report["distance"])
    )
    say(text)
    if report["collapsed"]:
        console.print(
            f"COLLAPSED: {title}'s think labels say almost nothing about their targets. "
            "Thinking trained on them cannot help; try --set annotate.mode=normalised, another "
            "annotate.fit_epochs, or a longer pretraining.",
            style="bold red",
        )


def heads_loss(policy: Policy, batch: Batch, config: AnnotateConfig) -> tuple[torch.Tensor, dict]:
    """Eqs. 14 and 15 for the heads alone, on thoughts that are made on the way."""
    with torch.no_grad():
        encoded = policy.encode(batch.history)
    steps = infer(policy, encoded, batch.target, config.length, config.mode)
    vectors = think_vectors(policy, config.mode)
    return steps_loss(policy, batch, steps, vectors[steps.chosen - policy.tokens.think_range[0]])


def steps_loss(
    policy: Policy, batch: Batch, steps: Inference, vectors: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eqs. 14 and 15 of what was gone through; vectors (B, l, d), of what was chosen."""
    targets = policy.item_vectors(batch.targets).float()
    state = state_target_loss(steps.states, targets, batch.targets, first=batch.share.first)
    quant = quantization_loss(steps.residuals, vectors)
    return state + quant, {"state": state, "quant": quant}
