"""Stage inputs: split, Semantic IDs, text neighbours and trie, for every generative stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch

from streamctl.data import load_data
from streamctl.data.split import Split
from streamctl.errors import UsageError
from streamctl.model.policy import Policy
from streamctl.retrieval.evidence import SIZES, Evidence
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer import vectors
from streamctl.tokenizer.semantic_ids import SemanticIds
from streamctl.tokenizer.trie import PrefixTrie


@dataclass(frozen=True)
class Material:
    """The inputs of training."""

    split: Split  # train, valid and test examples
    ids: SemanticIds
    neighbours: np.ndarray  # (N, K) int64 text neighbours of each item, nearest first
    vectors: np.ndarray  # (N, D) float32 unit rows, the items' text
    hops: tuple[int, ...] = SIZES  # the most pieces of each hop of evidence

    @classmethod
    def load(cls, run: RunDir) -> Material:
        """From a run whose data and tokenizer stages are complete."""
        tokenizer = run.stage("tokenizer")
        split = load_data(run)[1]
        pretrain = run.stage("pretrain")
        hops = SIZES
        if pretrain.complete:
            hops = tuple(pretrain.manifest["hops"])
        ids, neighbours = SemanticIds.load(tokenizer), tokenizer.array("neighbours.npy")
        return cls(split, ids, neighbours, vectors(run), hops)

    @cached_property
    def evidence(self) -> Evidence:
        """What the hops read, counted when first asked for."""
        sequences, weights = self.split.training_sequences(), self.split.training_weights()
        return Evidence(sequences, self.vectors, self.neighbours, sizes=self.hops, weights=weights)

    @cached_property
    def item_tokens(self) -> torch.Tensor:
        """(N, m) int64."""
        return torch.from_numpy(self.ids.tokens().item_tokens(self.ids.codes))

    @cached_property
    def trie(self) -> PrefixTrie:
        return PrefixTrie(self.item_tokens.numpy())

    def look_alikes(self, device: torch.device, count: int | None = None) -> torch.Tensor:
        """The first `count` text neighbours of each item, on the device: (N, <= count) int64."""
        return torch.from_numpy(np.ascontiguousarray(self.neighbours[:, :count])).to(device)

    def policy(self, stage: Stage, device: torch.device, dropout: float | None = None) -> Policy:
        """A stage's policy on the device, in evaluation mode; with another dropout if given."""
        policy = Policy.load(stage.path, self.item_tokens)
        if dropout is not None and dropout != policy.config.dropout:
            weights = policy.state_dict()
            policy = Policy(replace(policy.config, dropout=dropout), self.item_tokens)
            policy.load_state_dict(weights)
        return policy.to(device).eval()

    def starting_policy(
        self, run: RunDir, start: str, device: torch.device, dropout: float | None = None
    ) -> Policy:
        """The pretrained policy, its slow decoder with the weights that `start` names: "direct" or
        "pretrain". What annotation labels with is what SFT begins as."""
        policy = self.policy(run.stage("pretrain"), device, dropout)
        if start == "direct" and policy.config.thoughts == "vocabulary":
            policy.decoder.load_state_dict(policy.direct.state_dict())
        return policy


def save_policy(stage: StageWriter, policy: Policy) -> None:
    """Write a policy into the stage's folder as artifacts."""
    for name in policy.save(stage.path):
        stage.adopt(name)


def warm_start(policy: Policy, older: Stage) -> None:
    """Give a policy the weights that another run's stage has.

    Raises:
        UsageError: they are of a policy of another shape.
    """
    source = Policy.load(older.path, policy.item_tokens.cpu())
    mine, other = asdict(policy.config), asdict(source.config)
    changed = [name for name in mine if name != "dropout" and mine[name] != other[name]]
    if changed:
        told = ", ".join(f"{name} {other[name]} -> {mine[name]}" for name in changed)
        raise UsageError(
            f"{older.path}: its weights do not fit these settings ({told})",
            run="leave these settings as the older run has them",
        )
    policy.load_state_dict(source.state_dict())
