"""TIGER (Rajput et al., 2023): the same backbone, writing the target's codes without thinking."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from streamctl.baselines.base import Baseline
from streamctl.config import BaselineConfig, PretrainConfig, resolve
from streamctl.decode import PolicyRecommender
from streamctl.device import derive_seed
from streamctl.model.policy import Policy, PolicyConfig
from streamctl.ranking import Ranking
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer.semantic_ids import SemanticIds
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training.loop import Batch
from streamctl.training.losses import answer_loss

# What it shares with the pretrain stage, so that the two differ in thinking alone.
_SHARED = (
    "size", "history", "softmax", "positions", "dropout", "epochs", "patience", "batch", "lr",
    "weight_decay", "warmup",
)  # fmt: skip


class Tiger(Baseline):
    """A policy whose direct decoder is trained on the target alone; nothing else is trained."""

    defaults: ClassVar[dict[str, Any]] = dict.fromkeys(_SHARED)  # filled in by `settings`
    bf16 = True
    parents = ("data", "tokenizer")
    beam: int = 50

    def __init__(self, config: BaselineConfig, policy: Policy):
        torch.nn.Module.__init__(self)
        self.config, self.policy, self.bonus = config, policy, None
        self.n_items = len(policy.item_tokens)
        for unused in (policy.decoder, policy.thinker):
            unused.requires_grad_(False)
        self.trie = PrefixTrie(policy.item_tokens.cpu().numpy())

    @classmethod
    def settings(cls, run: RunDir, config: BaselineConfig) -> dict[str, Any]:
        """Those of the run's pretrain stage, or its defaults before there is one."""
        stage = run.stage("pretrain")
        base = stage.manifest["config"] if stage.complete else {}
        shared = resolve(PretrainConfig, base=base, size=config.size).settled()
        return {name: getattr(shared, name) for name in _SHARED}

    @classmethod
    def _item_tokens(cls, run: RunDir) -> tuple[SemanticIds, torch.Tensor]:
        ids = SemanticIds.load(run.stage("tokenizer"))
        return ids, torch.from_numpy(ids.tokens().item_tokens(ids.codes))

    @classmethod
    def build(cls, run: RunDir, config: BaselineConfig) -> Self:
        ids, item_tokens = cls._item_tokens(run)
        shape = PolicyConfig.of_size(
            config.size,
            ids.sizes,
            history=config.history,
            dropout=config.dropout,
            softmax=config.softmax,
            dedup=ids.dedup,
        )
        seed = derive_seed(config.seed, "initial weights")
        return cls(config, Policy.build(shape, item_tokens, seed))

    @classmethod
    def load(cls, stage: Stage) -> Self:
        config = resolve(BaselineConfig, base=stage.manifest["config"])
        return cls(config, Policy.load(stage.path, cls._item_tokens(RunDir(stage.root))[1])).eval()

    def save(self, stage: StageWriter) -> None:
        for name in self.policy.save(stage.path):
            stage.adopt(name)

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy = self.policy
        inputs, _ = policy.target_inputs(batch.target)
        hidden = policy.decode(policy.encode(batch.history), inputs, "direct")
        return answer_loss(policy, hidden, batch.target) / policy.tokens.levels, {}

    def recommend(self, histories: torch.Tensor, k: int, **options: Any) -> Ranking:
        """The k best items by beam search over the catalogue's codes."""
        search = PolicyRecommender(
            self.policy, self.trie, decoder="direct", beam=self.beam, seed=self.config.seed
        )
        return search.recommend(histories, k, **options)
