"""Ranking quality on a fixed sample of validation users: what picks the best weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from streamctl.decode.beam import recommend
from streamctl.device import derive_seed
from streamctl.distributed import ranks
from streamctl.model.policy import DecoderName, Policy
from streamctl.ranking import ranking_metrics, target_ranks
from streamctl.training.material import Material

USERS = 2000
BATCH = 250
Thoughts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (history, target) -> (B, l)


class Validator:
    """Beam search for up to 2,000 validation users, the same ones each time.

    Args:
        policy: evaluated as it is at each call; its mode is left as it was.
        seed: picks the users.
    """

    def __init__(self, policy: Policy, material: Material, seed: int):
        self.policy, self.trie, self.seed = policy, material.trie, seed
        examples = material.split.valid
        random = np.random.default_rng(derive_seed(seed, "validation users"))
        rows = random.permutation(len(examples))[:USERS]
        rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
        self.examples = examples.subset(rows)

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
        found = np.zeros(len(self.examples), np.int32)
        depth = 50 if deep else 10
        for start in ranks().mine(range(0, len(self.examples), BATCH)):
            rows = np.arange(start, min(start + BATCH, len(self.examples)))
            history = torch.from_numpy(self.examples.histories(rows)).to(device)
            targets = self.examples.targets[rows]
            given = None
            if thoughts is not None:
                given = thoughts(history, torch.from_numpy(targets).to(device))
            ranking, _ = recommend(
                self.policy, self.trie, history, depth, think=think, decoder=decoder,
                thoughts=given, beam=50 if deep else 20, seed=self.seed,
                exclude=self.examples.seen(rows),
            )  # fmt: skip
            found[rows] = target_ranks(ranking.items.cpu().numpy(), targets)
        self.policy.train(training)
        metrics = ranking_metrics(ranks().sum(found))
        wanted = ("ndcg@10", "recall@10", "recall@50") if deep else ("ndcg@10", "recall@10")
        return {name: metrics[name] for name in wanted}
