"""The rows of the evaluation: which methods and controls a run has, and how each recommends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from streamctl.baselines.registry import BASELINES, baseline_class
from streamctl.config import BaselineConfig, EvalConfig
from streamctl.data import Examples, Split, load_data
from streamctl.device import resolve_device
from streamctl.errors import UsageError, close_matches
from streamctl.evaluation.evaluate import Recommender
from streamctl.evaluation.generative import PolicyRecommender, random_thoughts
from streamctl.model.policy import Policy
from streamctl.runs import RunDir
from streamctl.tokenizer.semantic_ids import SemanticIds
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training.annotate import label

TWIN = "baselines/no_thinking"


class Models:
    """The trained models of a run, each loaded when it is first asked for.

    Args:
        run: every stage that a row names is complete.
        config: beam and seed.
        examples: the users to evaluate, one row each; oracle thoughts see their targets.
        device: where the models go.
    """

    def __init__(self, run: RunDir, config: EvalConfig, examples: Examples, device: str):
        self.run, self.config, self.examples = run, config, examples
        self.device = resolve_device(device)
        self.policy = cache(self._policy)

    @cached_property
    def split(self) -> Split:
        return load_data(self.run)[1]

    @cached_property
    def ids(self) -> SemanticIds:
        return SemanticIds.load(self.run.stage("tokenizer"))

    @cached_property
    def item_tokens(self) -> torch.Tensor:
        return torch.from_numpy(self.ids.tokens().item_tokens(self.ids.codes))

    @cached_property
    def trie(self) -> PrefixTrie:
        return PrefixTrie(self.item_tokens.numpy())

    @property
    def length(self) -> int:
        """l: the think tokens that SFT and RL were trained with."""
        return self.run.stage("annotate").manifest["config"]["length"]

    def _policy(self, stage: str) -> Policy:
        policy = Policy.load(self.run.stage(stage).path, self.item_tokens)
        return policy.to(self.device).eval()

    def generative(self, stage: str, **options: object) -> PolicyRecommender:
        """A stage's policy with its beam search."""
        policy = self.policy(stage)
        settings = {"beam": self.config.beam, "seed": self.config.seed} | options
        return PolicyRecommender(policy, self.trie, **settings)

    def pretrained(self) -> PolicyRecommender:
        """The slow path of pretraining: it writes its retrieved neighbours' codes first (Eq. 9)."""
        neighbours = self.run.stage("pretrain").manifest["config"]["neighbours"]
        return self.generative("pretrain", think=neighbours * self.ids.levels)

    def random(self, stage: str) -> PolicyRecommender:
        """A thinking policy given thoughts that mean nothing."""
        tokens = self.policy(stage).config.tokens
        users = self.split.log.n_users
        thoughts = random_thoughts(tokens, users, self.length, self.config.seed)
        return self.generative(stage, think=self.length, thoughts=thoughts)

    def oracle(self, stage: str) -> PolicyRecommender:
        """A thinking policy given the thoughts that annotation derives from the target itself."""
        policy = self.policy(stage)
        targets = np.zeros(self.split.log.n_users, dtype=np.int64)
        targets[self.examples.users] = self.examples.targets

        def thoughts(history: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            target = torch.from_numpy(targets[users]).to(history.device)
            return label(policy, history, target, self.length)

        return self.generative(stage, think=self.length, thoughts=thoughts)

    def baseline(self, name: str) -> Recommender:
        return baseline_class(name).load(self.run.stage(f"baselines/{name}")).to(self.device)

    def popularity(self) -> Recommender:
        config = BaselineConfig(name="popularity")
        return baseline_class("popularity")(config, self.split).to(self.device)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: its key in the result.
        stages: what it is read from; all must be complete.
        make: `Models -> Recommender`.
        control: a yardstick for the claim that thinking helps, and no method of its own.
        note: what a reader has to know about it.
    """

    name: str
    stages: tuple[str, ...]
    make: Callable[[Models], Recommender]
    control: bool = False
    note: str = ""


def known_rows(run: RunDir) -> dict[str, Row]:
    """Every row there could be, in the order of the table; TIGER as good as the run has it."""
    own_tiger = run.stage("baselines/tiger").complete
    tiger = (
        Row("tiger", ("tokenizer", "baselines/tiger"), lambda models: models.baseline("tiger"))
        if own_tiger
        else Row(
            "tiger",
            ("tokenizer", "pretrain"),
            lambda models: models.generative("pretrain", decoder="direct"),
            note="the direct decoder of pretraining; `streamctl baseline tiger` trains one alone",
        )
    )
    classic = (
        Row(name, (f"baselines/{name}",), lambda models, name=name: models.baseline(name))
        for name in BASELINES
        if name not in ("popularity", "tiger")
    )
    rows = (
        Row("popularity", ("data",), Models.popularity),
        *classic,
        tiger,
        Row("stream_pt", ("tokenizer", "pretrain"), Models.pretrained),
        *(
            Row(
                f"stream_{stage}",
                ("tokenizer", "annotate", stage),
                lambda models, stage=stage: models.generative(stage, think=models.length),
            )
            for stage in ("sft", "rl")
        ),
        Row(
            "no_thinking",
            ("tokenizer", TWIN),
            lambda models: models.generative(TWIN, think=0),
            control=True,
        ),
        *(
            Row(
                f"random_thinking{suffix}",
                ("tokenizer", "annotate", stage),
                lambda models, stage=stage: models.random(stage),
                control=True,
            )
            for stage, suffix in (("sft", ""), ("rl", "_rl"))
        ),
        Row(
            "oracle_thinking",
            ("tokenizer", "annotate", "sft"),
            lambda models: models.oracle("sft"),
            control=True,
            note="an upper bound that has seen the answer: its thoughts come from the target",
        ),
    )
    return {row.name: row for row in rows}


WIDE_BEAM = "wide_beam"


def choose_rows(run: RunDir, names: tuple[str, ...]) -> tuple[list[Row], bool, list[str]]:
    """The rows to evaluate.

    Args:
        names: the wanted ones; empty for all that the run has the stages of.

    Returns:
        the rows; whether the wide beam, which needs the others' latency, is wanted; and the names
        of rows left out because a stage of theirs is not complete.

    Raises:
        UsageError: an unknown name.
        StreamctlError: a wanted row lacks a stage; names the command that makes it.
    """
    rows = known_rows(run)
    for name in names:
        if name not in rows and name != WIDE_BEAM:
            raise UsageError(f"unknown method {name!r}; {close_matches(name, [*rows, WIDE_BEAM])}")
    if names:
        chosen = [row for row in rows.values() if row.name in names]
        for row in chosen:
            for stage in row.stages:
                run.require(stage)
        return chosen, WIDE_BEAM in names, []
    present = {
        name for name, row in rows.items() if all(run.stage(stage).complete for stage in row.stages)
    }
    chosen = [row for row in rows.values() if row.name in present]
    return chosen, True, [name for name in rows if name not in present]
