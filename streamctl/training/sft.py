"""Stage 2: rounds of annotation and training on the annotated thoughts (Eqs. 14-19)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from streamctl.config import SftConfig
from streamctl.decode.evidence import FULL
from streamctl.decode.think import beam_thoughts
from streamctl.device import resolve_device
from streamctl.distributed import Share, ranks
from streamctl.errors import UsageError
from streamctl.model.policy import IGNORED, Encoded, Policy
from streamctl.progress import say
from streamctl.runs import RunDir, Stage, StageWriter, read_json
from streamctl.training import thinking
from streamctl.training.annotate import (
    Mode,
    announce,
    check_strict,
    label,
    label_all,
    think_vectors,
)
from streamctl.training.loop import Batch, fit
from streamctl.training.losses import (
    answer_loss,
    dpo_loss,
    quantization_loss,
    sequence_loss,
    state_target_loss,
)
from streamctl.training.material import Material, save_policy
from streamctl.training.pretrain import direct_loss
from streamctl.training.thinking import Gathered, last_positions, only_thinking
from streamctl.training.validation import Validator

TWIN = "baselines/no_thinking"


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
            thought = beam_thoughts(policy, encoded, given.shape[1], 1, "slow").tokens[:, 0]
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
            found = policy.target_logprob(policy.encode(batch.history), pair, given)
        return dpo_loss(*found.unbind(1), *reference.unbind(1), self.config.dpo_beta)

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
        announce(report, f"sft round {number + 1}")
        self.reports.append(report)
        self.stage.save_json(self._file(number, "json").name, report)
        self.stage.save_array(self._file(number, "npy").name, thoughts)
        ranks().agree()  # the others read what the main process has written

    def _adopt(self, number: int) -> None:
        for kind in ("json", "npy"):
            self.stage.adopt(self._file(number, kind).name)
        self.reports.append(read_json(self._file(number, "json")))


def sft(
    run: RunDir,
    config: SftConfig,
    *,
    device: str = "auto",
    force: bool = False,
    twin: bool = False,
    strict: bool = False,
) -> Stage:
    """Rounds of annotation and training until validation ndcg@10 stops rising.

    The epoch whose own greedy thoughts rank best on validation is kept. The direct decoder goes on
    training on the shared encoder, so that it still fits it; DPO's reference is the pretrained
    pair, frozen. Writes the policy, report.json and the labels of each later round.

    Args:
        twin: train the l = 0 control instead (stage baselines/no_thinking): the same start, steps,
            schedule and choice of epoch, with plain cross-entropy and no thoughts.
        strict: fail, after writing the stage, when the labels of a round have collapsed.

    Raises:
        StreamctlError: under `strict`, labels that have collapsed.
    """
    thoughts = _thoughts(run)
    config = config.settled(thoughts)
    if twin and thoughts == "evidence":
        raise UsageError(
            "thinking with evidence has its l = 0 twin in the same policy, the direct decoder: "
            "`eval` shows it as l0"
        )
    name = TWIN if twin else "sft"
    parents = ["data", "tokenizer", "pretrain", "annotate"]  # the twin's start is annotate's, too
    with run.begin(name, config, parents, force=force) as stage:
        if stage is None:
            say(f"{name}: complete already")
            return run.stage(name) if twin else check_strict(run.stage(name), strict)
        where = resolve_device(device)
        material = Material.load(run)
        if thoughts == "evidence":
            _with_evidence(run, stage, config, material, where)
            return run.stage(name)
        settings = run.stage("annotate").manifest["config"]
        policy = material.starting_policy(run, settings["start"], where, config.dropout)
        reference = material.policy(run.stage("pretrain"), where).requires_grad_(False)
        look_alikes = material.look_alikes(where)
        tuner = Tuner(policy, reference, look_alikes, config, "normalised")
        validator = Validator(policy, material, config.seed)
        length, before = 0, None
        if not twin:
            annotation = run.stage("annotate")
            length, tuner.mode = settings["length"], settings["mode"]
            policy.thinker.load_state_dict(load_file(annotation.file("thinker.safetensors")))
            before = Rounds(stage, tuner, material, annotation)
        result = fit(
            stage, policy, config, loss=tuner.twin_loss if twin else tuner.loss,
            examples=material.split.train, epochs=config.rounds * config.epochs,
            patience=config.patience * config.epochs,
            validate=lambda: validator(think=length), start=True, device=where,
            title=name, before_epoch=before,
        )  # fmt: skip
        report: dict[str, Any] = {
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "valid": {"self": result.best, "direct": validator(decoder="direct")},
        }
        if before is not None:
            before(
                max(result.epochs, 1) - 1
            )  # resumed after the last epoch, it was called for none
            report["valid"]["oracle"] = validator(
                think=length,
                thoughts=lambda history, target: label(policy, history, target, length, tuner.mode),
            )
            report["labels"] = before.reports
            report["collapsed"] = any(each["collapsed"] for each in before.reports)
        save_policy(stage, policy)
        stage.save_json("report.json", report)
        stage.publish(**report)
        shown = (f"{key} {value['ndcg@10']:.4f}" for key, value in report["valid"].items())
        say(f"{name}: ndcg@10 on validation users: " + ", ".join(shown))
    return run.stage(name) if twin else check_strict(run.stage(name), strict)


def _thoughts(run: RunDir) -> str:
    """What the run's thoughts are made of."""
    stage = run.require("pretrain")
    return stage.manifest["config"]["thoughts"]


def _with_evidence(
    run: RunDir, stage: StageWriter, config: SftConfig, material: Material, device: torch.device
) -> None:
    """Learn to weigh and order one's own evidence; the decoders stay as pretraining left them.

    Every example answers under the policy's own thought. The epoch of the best masked ndcg@10 on
    validation users is kept, the start among the candidates.
    """
    annotation = run.stage("annotate")
    rows = annotation.array("rows.npy")
    train = material.split.train
    held = last_positions(train, run.stage("pretrain").manifest["config"]["hold"])
    policy = only_thinking(material.policy(run.stage("pretrain"), device))
    policy.thinker.load_state_dict(load_file(annotation.file("thinker.safetensors")))
    gathered = Gathered(material.evidence, train.subset(rows))
    labels = torch.from_numpy(annotation.array("thoughts.npy").astype(np.int64))
    unseen = torch.from_numpy(np.isin(rows, held))
    tuner = thinking.Tuner(policy, gathered, labels, unseen, config)
    result = fit(
        stage, policy, config, loss=tuner.loss, examples=gathered.examples, device=device,
        # The weights alone pick the epoch: how far codes are trusted is settled afterwards.
        validate=lambda: thinking.validate(policy, material, config.seed, FULL, mix="weights"),
        patience=0, start=True, title="sft",
    )  # fmt: skip
    report = {
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "valid": {"start": result.start, "self": result.best},
        "trust": thinking.calibrate(policy, material, config.seed),
        "collapsed": False,
    }
    save_policy(stage, policy)
    stage.save_json("report.json", report)
    stage.publish(**report)
    say(
        f"sft: masked ndcg@10 {result.start['ndcg@10']:.4f} -> {result.best['ndcg@10']:.4f} on "
        "validation users"
    )
