"""Methods that rank by evidence alone, what one hop brings and then the popular items, and what
those that learn over several hops begin with."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch

from streamctl.baselines.base import Baseline
from streamctl.config import BaselineConfig
from streamctl.data import Split, load_data
from streamctl.retrieval.evidence import HOPS, Evidence, Pieces
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer import vectors

MOST = 200  # items of the one hop that a method ranks by; the popular ones follow


def run_evidence(run: RunDir, **options: Any) -> Evidence:
    """The evidence of a run's training interactions; `options` are `Evidence`'s."""
    split = load_data(run)[1]
    neighbours = run.stage("tokenizer").array("neighbours.npy")
    weights = split.training_weights()
    return Evidence(
        split.training_sequences(), vectors(run), neighbours, weights=weights, **options
    )


class HopBaseline(Baseline):
    """Items by a value for each piece of evidence; those without any by popularity, below them.

    Nothing of it is kept in the stage but the settings: counts are made when it is loaded.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    losses = ()
    parents = ("data", "tokenizer")
    sizes: ClassVar[dict[str, int] | None] = None  # pieces of each hop; None: Evidence's own

    def __init__(self, config: BaselineConfig, split: Split, evidence: Evidence):
        super().__init__(config, split)
        self.evidence = evidence
        places = np.argsort(np.argsort(-split.popularity(), kind="stable"))
        self.register_buffer("popular", torch.from_numpy(-places / len(places)).float())

    @classmethod
    def build(cls, run: RunDir, config: BaselineConfig) -> Self:
        sizes = {} if cls.sizes is None else {"sizes": [cls.sizes.get(hop, 0) for hop in HOPS]}
        return cls(config, load_data(run)[1], run_evidence(run, **sizes))

    @classmethod
    def load(cls, stage: Stage) -> Self:
        return cls.build(RunDir(stage.root), BaselineConfig(name=stage.manifest["config"]["name"]))

    def save(self, stage: StageWriter) -> None:
        """Nothing: the counts are the data's."""

    def values(self, pieces: Pieces) -> np.ndarray:
        """float32 (B, C), above 0 for evidence and higher for what is better."""
        raise NotImplementedError

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        known = None if users is None else users.cpu().numpy()
        pieces = self.evidence.gather(history.cpu().numpy(), known)
        # The padding stands at item 0, which must not gain by it.
        values = torch.from_numpy(np.where(pieces.items >= 0, self.values(pieces), -np.inf))
        newer = self.evidence.n_items - len(self.popular)  # items that came while it serves
        popular = torch.nn.functional.pad(self.popular, (0, newer), value=-1.0)
        scores = popular.expand(len(history), -1).clone()
        items = torch.from_numpy(pieces.items.clip(min=0).astype(np.int64))
        device = scores.device
        return scores.scatter_reduce(1, items.to(device), values.to(device), "amax")


class Transitions(HopBaseline):
    """Counts of what other users took next after each item of the history (sequential rules,
    Ludewig and Jannach, 2018). Trains nothing."""

    sizes: ClassVar[dict[str, int] | None] = {"next": MOST}

    def values(self, pieces: Pieces) -> np.ndarray:
        return pieces.strengths[..., HOPS.index("next")]


class KNN(HopBaseline):
    """The next items of the most similar training prefixes of other users, by their votes
    (session-kNN, Jannach and Ludewig, 2017). Trains nothing."""

    sizes: ClassVar[dict[str, int] | None] = {"others": MOST}

    def values(self, pieces: Pieces) -> np.ndarray:
        return pieces.strengths[..., HOPS.index("others")]
