"""Ranking quality on a fixed sample of validation users: what picks the best weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from streamctl.data.split import Examples
from streamctl.decode.beam import recommend
from streamctl.decode.evidence import FULL, EvidenceRecommender
from streamctl.device import derive_seed
from streamctl.distributed import ranks
from streamctl.model.policy import DecoderName, Policy
from streamctl.ranking import evaluate, gains, ranking_metrics, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.training.material import Material

USERS = 2000
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


def _sample(examples: Examples, seed: int) -> np.ndarray:
    """Rows of up to `USERS` examples, the same ones each time."""
    random = np.random.default_rng(derive_seed(seed, "validation users"))
    return random.permutation(len(examples))[:USERS]


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
def calibrate(policy: Policy, material: Material, seed: int) -> dict[str, float]:
    """Shift the odds of the codes against the thought by what ranks best on validation users.

    Likelihood alone trusts the codes too much: it pays them for every target that no hop found,
    wherever it ranks. Returns masked ndcg@10 by shift.
    """
    examples = material.split.valid.subset(np.sort(_sample(material.split.valid, seed)))
    policy.eval()
    thinker = EvidenceRecommender(policy, material.trie, material.evidence, beam=20)
    total = np.zeros(len(SHIFTS))
    for index in ranks().mine(list(batches_by_length(examples.lengths, 256))):
        parts = thinker.parts(
            torch.from_numpy(examples.histories(index)), examples.users[index], 20, FULL,
            examples.seen(index),
        )  # fmt: skip
        for place, shift in enumerate(SHIFTS):
            items = parts.best(10, shift).items.cpu().numpy()
            total[place] += gains(target_ranks(items, examples.targets[index]), 10).sum()
    total = ranks().sum(total) / len(examples)
    policy.weighing.codes_trust.bias += max(zip(total, SHIFTS, strict=True))[1]
    return {f"{shift:+.1f}": float(value) for shift, value in zip(SHIFTS, total, strict=True)}
