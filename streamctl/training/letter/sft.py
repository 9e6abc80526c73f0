"""SFT on annotated thoughts of the vocabulary, round after round (Eqs. 14-19)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from streamctl.config import SftConfig
from streamctl.decode.think import greedy_thought
from streamctl.distributed import Share, ranks
from streamctl.files import read_json
from streamctl.model.policy import IGNORED, Encoded, Policy
from streamctl.runs import Stage, StageWriter
from streamctl.training.letter.annotate import Mode, label_all, think_vectors
from streamctl.training.loop import Batch
from streamctl.training.losses import (
    answer_loss,
    dpo_loss,
    quantization_loss,
    sequence_loss,
    state_target_loss,
)
from streamctl.training.material import Material
from streamctl.training.pretrain import direct_loss


def total_loss(terms: dict[str, torch.Tensor], config: SftConfig) -> torch.Tensor:
    """L_SFT + lambda L_DPO + mu L_Quant + delta L_State (Eq. 19)."""
    return (
        terms["sft"]
        + config.dpo_weight * terms["dpo"]
        + config.quant_weight * terms["quant"]
        + config.state_weight * terms["state"]
    )


def corrupt(
    thoughts: torch.Tensor,
    probability: float,
    low: int,
    high: int,
    generator: torch.Generator,
    share: Share | None = None,
) -> torch.Tensor:
    """Thoughts (B, l) with each token replaced, with the probability, by a random one.

    Labels have seen the target and the model's own thoughts have not: an answer that leans on
    every think token would be lost without its teacher.
    """
    share = share or Share.whole(len(thoughts))
    whole = (share.total, thoughts.shape[1])
    chance = share.of(torch.rand(whole, generator=generator))
    others = share.of(torch.randint(low, high, whole, generator=generator))
    return torch.where((chance < probability).to(thoughts.device), others.to(thoughts), thoughts)


@contextmanager
def without_dropout(policy: Policy) -> Iterator[Policy]:
    """The policy in evaluation mode, and afterwards in the mode that it was in."""
    training = policy.training
    policy.eval()
    try:
        yield policy
    finally:
        policy.train(training)


@dataclass
class Tuner:
    """The loss of one SFT stage.

    Attributes:
        policy: in training.
        reference: the pretrained policy, frozen: pi_ref is its direct decoder on its own encoder,
            so that the reference does not move with the encoder that both decoders share.
        look_alikes: (N, 50) text neighbours, from which y- is drawn.
        mode: of the annotation.
    """

    policy: Policy
    reference: Policy
    look_alikes: torch.Tensor
    config: SftConfig
    mode: Mode
    thoughts: torch.Tensor | None = None  # (E, l) labels of the round, on the CPU

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Eq. 19, plus the direct decoder's own cross-entropy."""
        policy, config = self.policy, self.config
        device = batch.target.device
        labels = self.thoughts[batch.index.cpu()].to(device)
        low, high = policy.tokens.think_range
        generator = batch.generator("corrupt")
        given = corrupt(labels, config.corrupt, low, high, generator, batch.share)
        own = self._own(batch)
        given = self._with_own(batch, own, given)
        encoded = policy.encode(batch.history)
        inputs, _ = policy.target_inputs(batch.target, given)
        hidden = policy.decode(encoded, inputs)
        length, m = labels.shape[1], policy.tokens.levels
        chosen = policy.answer_logprobs(hidden[:, -m:], batch.target).sum(-1)
        wanted = labels.masked_fill(own[:, None], IGNORED)
        think = sequence_loss(policy.logits(hidden[:, :length]), wanted)
        # A label says what comes next after the labels before it, and after nothing else.
        right = (given == labels).roll(1, 1)
        right[:, 0] = True
        right = right.cumprod(1).bool()
        terms = {
            "sft": think - chosen.mean(),
            "dpo": self._dpo(batch, given),
            **self._state_terms(batch, encoded, hidden[:, 1 : length + 1], labels, right),
        }
        value = total_loss(terms, config)
        terms |= {"think": think, "target": -chosen.mean()}
        terms["direct"] = direct_loss(policy, batch, encoded)
        return value + config.direct_weight * terms["direct"], terms

    def _own(self, batch: Batch) -> torch.Tensor:
        """(B,) bool: the rows that are answered after the policy's own thought, as in serving."""
        chance = torch.rand(batch.share.total, generator=batch.generator("own"))
        return batch.share.of(chance < self.config.own).to(batch.target.device)

    @torch.no_grad()
    def _with_own(self, batch: Batch, own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """`given` (B, l) with the policy's greedy thoughts in the rows `own`."""
        if not bool(own.any()):
            return given
        with without_dropout(self.policy) as policy:
            encoded = policy.encode(batch.history[own])
            thought = greedy_thought(policy, encoded, given.shape[1])
        return given.masked_scatter(own[:, None], thought)

    def _dpo(self, batch: Batch, given: torch.Tensor) -> torch.Tensor:
        """Eqs. 16-18; think tokens are conditioned on and not scored.

        Dropout is off in policy and reference alike: what they differ by is what was learned.
        """
        if not self.config.dpo_weight:
            return torch.zeros((), device=batch.target.device)
        generator = batch.generator("look-alike")
        size = (batch.share.total,)
        pick = batch.share.of(torch.randint(self.look_alikes.shape[1], size, generator=generator))
        rejected = self.look_alikes[batch.target, pick.to(batch.target.device)]
        pair = torch.stack([batch.target, rejected], 1)
        with torch.no_grad():
            seen = self.reference.encode(batch.history)
            reference = self.reference.target_logprob(seen, pair, decoder="direct")
        with without_dropout(self.policy) as policy:
            logprobs = policy.target_logprob(policy.encode(batch.history), pair, given)
        return dpo_loss(*logprobs.unbind(1), *reference.unbind(1), self.config.dpo_beta)

    def _state_terms(
        self,
        batch: Batch,
        encoded: Encoded,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        right: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Eqs. 14 and 15. Targets carry no gradient (Sec. 2.3.1); the tokens of Eq. 15 do.

        right: (B, l) bool, steps whose residual is of the prefix that the label was made for.
        """
        policy, config = self.policy, self.config
        targets = policy.item_vectors(batch.targets).detach().float()
        target = batch.share.of(targets)
        states = policy.states(encoded, hidden).float()
        normalise = self.mode == "normalised"
        residuals = policy.thinker.residual(target[:, None], states[:, :-1], normalise=normalise)
        vectors = think_vectors(policy, self.mode)[labels - policy.tokens.think_range[0]]
        return {
            "state": state_target_loss(
                states, targets, batch.targets, config.state_temperature, batch.share.first
            ),
            "quant": quantization_loss(residuals, vectors, config.quant_beta, right),
        }

    def twin_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same decoders without thoughts: plain cross-entropy of both."""
        encoded = self.policy.encode(batch.history)
        inputs, _ = self.policy.target_inputs(batch.target)
        target = answer_loss(self.policy, self.policy.decode(encoded, inputs), batch.target)
        direct = direct_loss(self.policy, batch, encoded)
        return target + self.config.direct_weight * direct, {"target": target, "direct": direct}


class Rounds:
    """The labels of each round; called by the loop before each epoch.

    Round 0 has the annotate stage's; each later round's are made by the model as it is when the
    round begins, and kept in thoughts-ROUND.npy and .json, where a resumed run finds them.
    """

    def __init__(self, stage: StageWriter, tuner: Tuner, material: Material, first: Stage):
        self.stage, self.tuner, self.material = stage, tuner, material
        self.first = first.array("thoughts.npy")
        self.batch = first.manifest["config"]["batch"]
        self.reports = [first.json("report.json")]

    def __call__(self, epoch: int) -> None:
        number = epoch // self.tuner.config.epochs
        if number and len(self.reports) <= number:
            self._label(number)
        thoughts = self.first if number == 0 else np.load(self._file(number, "npy"))
        self.tuner.thoughts = torch.from_numpy(thoughts.astype(np.int64))

    def _file(self, number: int, kind: str) -> Path:
        return self.stage.path / f"thoughts-{number}.{kind}"

    def _label(self, number: int) -> None:
        for earlier in range(len(self.reports), number):  # rounds before an interruption
            self._adopt(earlier)
        if self._file(number, "npy").is_file():
            self._adopt(number)
            return
        thoughts, report = label_all(
            self.tuner.policy, self.material.split.train, self.first.shape[1], self.tuner.mode,
            self.batch, f"sft: labels of round {number + 1}",
        )  # fmt: skip
        self.reports.append(report)
        self.stage.save_json(self._file(number, "json").name, report)
        self.stage.save_array(self._file(number, "npy").name, thoughts)
        ranks().agree()  # the others read what the main process has written

    def _adopt(self, number: int) -> None:
        for kind in ("json", "npy"):
            self.stage.adopt(self._file(number, kind).name)
        self.reports.append(read_json(self._file(number, "json")))
