"""Ranking quality on a fixed sample of validation users: what picks the best weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streamctl.data.split import Examples
from streamctl.decode.beam import recommend
from streamctl.decode.evidence import FULL, EvidenceRecommender
from streamctl.device import derive_seed
from streamctl.distributed import ranks
from streamctl.model.policy import DecoderName, Policy
from streamctl.ranking import evaluate, gains, paired_difference, ranking_metrics, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.training.material import Material

USERS = 2000
CALIBRATION_USERS = 50_000  # once, not every epoch; 2,000 took chance for a gain
BATCH = 250
SHIFTS = (-8.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 1.0)  # of the log odds, see `calibrate`
Thoughts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (history, target) -> (B, l)


class Validator:
    """Beam search for up to 2,000 validation users, the same ones each time.

    Args:
        policy: evaluated as it is at each call; its mode is left as it was.
        seed: picks the users.
    """

    def __init__(self, policy: Policy, material: Material, seed: int):
        self.policy, self.trie, self.seed = policy, material.trie, seed
        rows, lengths = _sample(material.split.valid, seed), material.split.valid.lengths
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        self.examples = material.split.valid.subset(rows)

    @torch.no_grad()
    def __call__(
        self,
        *,
        think: int = 0,
        decoder: DecoderName = "slow",
        thoughts: Thoughts | None = None,
        deep: bool = False,
    ) -> dict[str, float]:
        """recall@10 and ndcg@10, seen items left out, as methods are judged.

        Args:
            think: l think tokens of the model's own, chosen greedily.
            thoughts: think tokens given instead, such as the annotation's (the oracle).
            deep: a beam of 50 instead of 20, and recall@50 too.
        """
        device = self.policy.item_tokens.device
        training = self.policy.training
        self.policy.eval()
        ranked = np.zeros(len(self.examples), np.int32)
        depth = 50 if deep else 10
        for start in ranks().mine(range(0, len(self.examples), BATCH)):
            rows = np.arange(start, min(start + BATCH, len(self.examples)))
            history = torch.from_numpy(self.examples.histories(rows)).to(device)
            targets = self.examples.targets[rows]
            given = None
            if thoughts is not None:
                given = thoughts(history, torch.from_numpy(targets).to(device))
            ranking = recommend(
                self.policy, self.trie, history, depth, think=think, decoder=decoder,
                thoughts=given, beam=50 if deep else 20, seed=self.seed,
                exclude=self.examples.seen(rows),
            )  # fmt: skip
            ranked[rows] = target_ranks(ranking.items.cpu().numpy(), targets)
        self.policy.train(training)
        metrics = ranking_metrics(ranks().sum(ranked))
        wanted = ("ndcg@10", "recall@10", "recall@50") if deep else ("ndcg@10", "recall@10")
        return {name: metrics[name] for name in wanted}


def _sample(examples: Examples, seed: int, users: int = USERS) -> np.ndarray:
    """Rows of up to `users` examples, the same ones each time."""
    random = np.random.default_rng(derive_seed(seed, "validation users"))
    return random.permutation(len(examples))[:users]


def validate(
    policy: Policy, material: Material, seed: int, think: int, mix: str = "item"
) -> dict[str, float]:
    """Masked ndcg@10 and recall@10 of a fixed sample of validation users."""
    examples = material.split.valid.subset(np.sort(_sample(material.split.valid, seed)))
    training = policy.training
    policy.eval()
    thinker = EvidenceRecommender(
        policy, material.trie, material.evidence, think=think, beam=20, mix=mix
    )
    evaluation = evaluate(
        thinker, examples, n_items=material.split.n_items, masked=True, title="valid"
    )
    policy.train(training)
    return {name: evaluation.metrics[name] for name in ("ndcg@10", "recall@10")}


@torch.no_grad()
def calibrate(policy: Policy, material: Material, seed: int) -> dict[str, Any]:
    """Shift the odds of the codes against the thought by what ranks best on validation users.

    Likelihood alone trusts the codes too much: it pays them for every target that no hop found,
    wherever it ranks. The first shift, which trusts them least, stays unless another is surely
    better.

    Returns:
        `shift`, and masked `ndcg@10` by shift.
    """
    rows = _sample(material.split.valid, seed, CALIBRATION_USERS)
    examples = material.split.valid.subset(np.sort(rows))
    policy.eval()
    thinker = EvidenceRecommender(policy, material.trie, material.evidence, beam=20)
    ranked = np.zeros((len(SHIFTS), len(examples)), np.int32)
    for index in ranks().mine(list(batches_by_length(examples.lengths, 256))):
        parts = thinker.parts(
            torch.from_numpy(examples.histories(index)), examples.users[index], 20, FULL,
            examples.seen(index),
        )  # fmt: skip
        for place, shift in enumerate(SHIFTS):
            items = parts.best(10, shift).items.cpu().numpy()
            ranked[place, index] = target_ranks(items, examples.targets[index])
    ranked = ranks().sum(ranked)
    shift = SHIFTS[surely_best(ranked, examples.users)]
    policy.weighing.codes_trust.bias += shift
    return {
        "shift": shift,
        "ndcg@10": {
            f"{each:+.1f}": float(value)
            for each, value in zip(SHIFTS, gains(ranked, 10).mean(1), strict=True)
        },
    }


def surely_best(ranked: np.ndarray, users: np.ndarray) -> int:
    """The row of best ndcg@10 if it is surely above the first (95% interval), else the first.

    Args:
        ranked: int32 (S, E), zero-based ranks of the targets under each of S settings.
        users: int (E,), whose targets they are.
    """
    best = int(gains(ranked, 10).mean(1).argmax())
    return best if paired_difference(ranked[best], ranked[0], users=users).low > 0 else 0
