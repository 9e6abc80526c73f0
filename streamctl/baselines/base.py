"""What a baseline is: a module that can be trained by the common loop and that ranks items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from streamctl.config import BaselineConfig, resolve
from streamctl.data import Split, load_data
from streamctl.ranking import Ranking, rank_scores
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.training.loop import Batch

WEIGHTS = "model.safetensors"


class Baseline(nn.Module):
    """A recommender with the interface that `baseline`, `eval` and the contract test use.

    A subclass sets the class attributes, builds itself in `__init__(config, split)` and gives
    `training_loss` and `score`. Adding it to `baselines.registry` makes it a command.

    Attributes:
        defaults: its settings where the configuration leaves them open.
        losses: values of `loss` it can train with; the first is the default.
        sequences: it predicts at every position, so it trains on whole sequences (one row a user)
            instead of on every prefix.
        bf16: train under bf16 autocast where the device has it.
        parents: stages it is built from.
    """

    defaults: ClassVar[dict[str, Any]]
    losses: ClassVar[tuple[str, ...]] = ("ce",)
    sequences: ClassVar[bool] = False
    bf16: ClassVar[bool] = False
    parents: ClassVar[tuple[str, ...]] = ("data",)

    def __init__(self, config: BaselineConfig, split: Split):
        super().__init__()
        self.config = config
        self.n_items = split.n_items
        # What it adds to the logits of items that the user had: learned, where `repeat` is on.
        self.bonus = nn.Parameter(torch.zeros(())) if config.repeat else None

    @classmethod
    def settings(cls, run: RunDir, config: BaselineConfig) -> dict[str, Any]:
        """Values for the settings that the configuration leaves open."""
        return dict(cls.defaults)

    @classmethod
    def build(cls, run: RunDir, config: BaselineConfig) -> Self:
        """An untrained model for the run's data."""
        return cls(config, load_data(run)[1])

    @classmethod
    def load(cls, stage: Stage) -> Self:
        """The trained model of a complete stage, in evaluation mode."""
        from safetensors.torch import load_file

        config = resolve(BaselineConfig, base=stage.manifest["config"])
        model = cls.build(RunDir(stage.root), config)
        model.load_state_dict(load_file(stage.file(WEIGHTS)))
        return model.eval()

    def save(self, stage: StageWriter) -> None:
        """Write the weights as artifacts of the stage."""
        stage.save_tensors(WEIGHTS, self.state_dict())

    def train_on(self, split: Split) -> None:
        """Learn what the loop does not teach, in methods without a loss; nothing by default."""

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean loss of a batch of equally long histories, and figures to log beside it."""
        raise NotImplementedError

    def score(self, history: torch.Tensor, users: torch.Tensor | None = None) -> torch.Tensor:
        """float32 (B, N): a score for every item of the catalogue.

        Args:
            history: int64 (B, H), oldest first, -1 on the right.
            users: int64 (B,) users of training, -1 for strangers; None: all are strangers.
        """
        raise NotImplementedError

    @torch.no_grad()
    def recommend(
        self,
        histories: torch.Tensor,
        k: int,
        *,
        users: np.ndarray | None = None,
        think: int | None = None,
        exclude: Sequence[np.ndarray] | None = None,
        allow: Sequence[np.ndarray | None] | None = None,
    ) -> Ranking:
        """The k best items by score (`ranking.Recommender`)."""
        device = next((tensor.device for tensor in self.state_dict().values()), None)
        known = None if users is None else torch.as_tensor(users, device=device)
        scores = self.score(histories.to(device), known)
        if self.bonus is not None:
            rows, places = (histories >= 0).nonzero(as_tuple=True)
            had = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            had[rows.to(device), histories[rows, places].to(device)] = True
            scores = scores + self.bonus * had
        return rank_scores(scores, k, exclude, allow)

    def marked(self, history: torch.Tensor) -> torch.Tensor | None:
        """int64 (B * H, H): the items up to each position, -1 elsewhere; None without `repeat`."""
        if self.bonus is None:
            return None
        length = history.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        return history[:, None].masked_fill(~past, -1).flatten(0, 1)


def last_states(states: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """(B, d): the state of states (B, H, d) at the last item of history (B, H), -1 on the right."""
    last = (history >= 0).sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


def shifted_targets(history: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """int64 (B, H): the item after each position of a whole sequence."""
    return torch.cat([history[:, 1:], target[:, None]], dim=1)
