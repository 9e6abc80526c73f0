"""The evidence of training examples: what their users' histories bring to mind."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import numpy as np
import torch

from streamctl.data.split import Examples
from streamctl.model.policy import Policy
from streamctl.retrieval.evidence import SIZES, Evidence, Pieces
from streamctl.training.material import Material

TOGETHER = 1024  # histories gathered at a time
KEPT = 2 << 30  # bytes of evidence kept in memory; above it is gathered again for every batch
REPEATS_OF, REPEATED = 20_000, 0.01  # examples looked at; share of repeats that makes own a hop
OWN = 8  # its pieces
SAMPLE = 4096  # examples that are gathered to know a share where evidence is not kept


def last_positions(examples: Examples, count: int) -> np.ndarray:
    """int64: the rows of each user's last `count` training targets."""
    ends = np.flatnonzero(np.append(examples.users[1:] != examples.users[:-1], True))
    last = np.repeat(ends, np.diff(ends, prepend=-1))
    return np.flatnonzero(last - np.arange(len(examples)) < count)


def suitable_hops(examples: Examples) -> tuple[int, ...]:
    """The sizes of the hops; own items are evidence where one target in a hundred is one."""
    some = np.random.default_rng(0).permutation(len(examples))[:REPEATS_OF]
    had = (examples.histories(some) == examples.targets[some][:, None]).any(1).mean()
    return (*SIZES[:-1], OWN if had >= REPEATED else SIZES[-1])


class Gathered:
    """The evidence of training examples, each gathered without its own user's pairs and rows.

    As in serving: the history before the target, and everything that other users took.
    """

    def __init__(self, evidence: Evidence, examples: Examples):
        self.evidence, self.examples = evidence, examples

    def gather(self, index: np.ndarray) -> Pieces:
        examples = self.examples
        return self.evidence.gather(examples.histories(index), examples.users[index])

    @cached_property
    def _kept(self) -> Pieces | None:
        rows = np.arange(len(self.examples))
        one = self.gather(rows[:1])
        names = [field.name for field in fields(one)]
        if sum(getattr(one, name).nbytes for name in names) * len(rows) > KEPT:
            return None
        parts = [self.gather(rows[at : at + TOGETHER]) for at in range(0, len(rows), TOGETHER)]
        return Pieces(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @cached_property
    def found(self) -> np.ndarray:
        """(E,) bool: examples whose target is among their evidence."""
        return self._hits(np.arange(len(self.examples)))

    def _hits(self, rows: np.ndarray) -> np.ndarray:
        parts = [rows[at : at + TOGETHER] for at in range(0, len(rows), TOGETHER)]
        hits = [(self(part).items == self.examples.targets[part, None]).any(1) for part in parts]
        return np.concatenate(hits) if hits else np.zeros(0, bool)

    @cached_property
    def known(self) -> float:
        """The share of examples whose target is among their evidence; by a sample of them where
        all would be gathered for nothing else."""
        if self._kept is not None or "found" in vars(self):
            found = self.found
        else:
            count = len(self.examples)
            found = self._hits(np.arange(0, count, count // SAMPLE + 1))
        return max(float(found.mean()), 1e-4)

    def subset(self, rows: np.ndarray) -> Gathered:
        """Some of the examples; what is kept of their evidence is not gathered again."""
        some = Gathered(self.evidence, self.examples.subset(rows))
        if self._kept is not None:
            some._kept = self._kept.rows(rows)
        some.found = self.found[rows]
        return some

    def __call__(self, index: np.ndarray) -> Pieces:
        """The pieces of the examples `index` (B,)."""
        return self.gather(index) if self._kept is None else self._kept.rows(index)


def first_pieces(evidence: Evidence, examples: Examples, count: int) -> torch.Tensor:
    """int64 (E, count, 2): items and hops of each example's first pieces, in the hops' order."""
    count = min(count, sum(evidence.sizes))
    table = torch.full((len(examples), count, 2), -1, dtype=torch.int64)
    for at in range(0, len(examples), TOGETHER):
        index = np.arange(at, min(at + TOGETHER, len(examples)))
        pieces = evidence.gather(examples.histories(index), examples.users[index])
        for column, field in enumerate((pieces.items, pieces.hops)):
            table[index, :, column] = torch.from_numpy(field[:, :count].astype(np.int64))
    return table


@torch.no_grad()
def standardise(policy: Policy, material: Material, rows: np.ndarray) -> None:
    """Give the weighing the scale of its features, from some training examples."""
    pieces = Gathered(material.evidence, material.split.train.subset(rows)).gather(
        np.arange(len(rows))
    )
    features = torch.from_numpy(pieces.features()).to(policy.device)
    policy.weighing.standardise(features, torch.from_numpy(pieces.items >= 0).to(policy.device))
