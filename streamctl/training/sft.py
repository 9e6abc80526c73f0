"""Stage 2, supervised fine-tuning: learn to weigh evidence (Eqs. 14-19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from streamctl.config import SftConfig
from streamctl.decode.evidence import FULL, Weighed, log_odds, mixed, read_thought, weigh
from streamctl.device import resolve_device
from streamctl.errors import UsageError
from streamctl.model.policy import Encoded, Policy
from streamctl.progress import say
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.training.annotate import check_strict
from streamctl.training.gathered import Gathered, last_positions
from streamctl.training.letter import sft as letter
from streamctl.training.letter.annotate import label
from streamctl.training.loop import Batch, fit
from streamctl.training.material import Material, save_policy
from streamctl.training.validation import Validator, calibrate, validate

TWIN = "baselines/no_thinking"
BUDGETS = (1, 2, 4, 8, 16, 32, 64)  # a batch draws one, so that one model serves every length


@dataclass
class Tuner:
    """The loss of SFT with evidence.

    Attributes:
        gathered: evidence of the examples. labels: (E, l) places from annotate.
        held: (E,) bool, examples whose targets pretraining has not seen: there the codes are as
            unsure as in serving, so that only these teach how far to trust them.
    """

    policy: Policy
    gathered: Gathered
    labels: torch.Tensor
    held: torch.Tensor
    config: SftConfig

    def __post_init__(self) -> None:
        # Means over all examples, not over a batch's: several processes have the loss of one.
        self._held = float(self.held.double().mean())

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-log P(target) under the policy's own thought, cross-entropy of the weights, labels.

        The thought has a length drawn for the batch; its order is that of the weights.
        """
        policy, config, index = self.policy, self.config, batch.index.cpu()
        # Only the weighing is trained: the codes are as sure as in serving.
        policy.eval().weighing.train()
        weighed = weigh(policy, self.gathered(index.numpy()))
        terms = {
            "weigh": weighing_loss(weighed, batch.target) / self.gathered.known,
            "label": label_loss(weighed, self.labels[index].to(batch.target.device)),
        }
        held = self.held[index].to(batch.target.device)
        terms["target"] = weighed.logits.new_zeros(())
        if bool(held.any()):
            generator = batch.generator("budget")
            budget = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
            rows = held.nonzero()[:, 0]
            some = Weighed(weighed.items[rows], weighed.hops[rows], weighed.logits[rows])
            with torch.no_grad():
                encoded = policy.encode(batch.history[rows])
            chance = target_logprob(policy, encoded, some.heaviest(budget), batch.target[rows])
            terms["target"] = -chance.sum() / (len(batch) * self._held)
        value = terms["target"] + config.weigh_weight * terms["weigh"]
        return value + config.label_weight * terms["label"], terms


def weighing_loss(weighed: Weighed, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the weights, 0 for users whose target is not among their evidence."""
    hit = weighed.items == target[:, None]
    known = hit.any(1)
    logits = weighed.logits.masked_fill(torch.isinf(weighed.logits), -1e9)
    loss = F.cross_entropy(logits, hit.int().argmax(1), reduction="none")
    return (loss * known).mean()


def label_loss(weighed: Weighed, labels: torch.Tensor) -> torch.Tensor:
    """-log of the chance to choose the labelled pieces one after the other, a step (Eq. 19's L_SFT
    inside the evidence). labels: (B, l) int64 places, -1 for none."""
    return -choice_logprobs(weighed.logits, labels).mean()


def choice_logprobs(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """log-probability of each choice without replacement.

    Args:
        logits: (..., C), -inf for no piece. places: (..., l) int64, -1 where nothing was chosen.

    Returns:
        (..., l) float32, 0 where nothing was chosen.
    """
    logits = logits.masked_fill(torch.isinf(logits), -1e9)
    chosen = []
    for step in range(places.shape[-1]):
        place = places[..., step : step + 1]
        there = place >= 0
        place = place.clamp(min=0)
        share = torch.log_softmax(logits, -1).gather(-1, place)
        chosen.append(torch.where(there, share, 0.0))
        logits = logits.scatter(-1, place, -1e9)
    return torch.cat(chosen, -1)


def target_logprob(
    policy: Policy, encoded: Encoded, thought: Weighed, target: torch.Tensor
) -> torch.Tensor:
    """log P(target | history, thought) (B,): codes, which carry no gradient, and weights mixed."""
    with torch.no_grad():
        hidden, past = read_thought(policy, encoded, thought)
        chance = policy.items_logprob(encoded, target[:, None], hidden, past).float()
    odds = log_odds(policy, thought, policy.logits(hidden[:, 0]))
    return mixed(odds, chance, thought.logprob(target[:, None]))[:, 0]


def only_thinking(policy: Policy) -> Policy:
    """The policy with gradients for the weighing alone."""
    policy.requires_grad_(False)
    policy.weighing.requires_grad_(True)
    policy.weighing.hop.requires_grad_(False)  # read by the decoder, which stays
    return policy


def sft(
    run: RunDir,
    config: SftConfig,
    *,
    device: str = "auto",
    force: bool = False,
    twin: bool = False,
    strict: bool = False,
) -> Stage:
    """Train on the annotated examples; the epoch that ranks best on validation users is kept.

    With evidence the weighing alone is trained, on the examples that teach it: those whose target
    is among their evidence, and those that pretraining has not seen, which answer under the
    policy's own thought. The start is a candidate. By the letter labels are made anew each
    round, and the direct decoder goes on training on the encoder that it shares; DPO's reference
    is the pretrained pair, frozen. Writes the policy, report.json and the labels of each later
    round.

    Args:
        twin: train the l = 0 control instead (stage baselines/no_thinking): the same start, steps,
            schedule and choice of epoch, with plain cross-entropy and no thoughts.
        strict: fail, after writing the stage, when the labels of a round have collapsed.

    Raises:
        StreamctlError: under `strict`, labels that have collapsed.
    """
    thoughts = run.require("pretrain").manifest["config"]["thoughts"]
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
            policy, report = _weigh(run, stage, config, material, where)
        else:
            policy, report = _by_letter(run, stage, config, material, where, twin)
        save_policy(stage, policy)
        stage.save_json("report.json", report)
        stage.publish(**report)
        masked = "masked " if thoughts == "evidence" else ""
        shown = (f"{key} {value['ndcg@10']:.4f}" for key, value in report["valid"].items())
        say(f"{name}: {masked}ndcg@10 on validation users: " + ", ".join(shown))
    return run.stage(name) if twin else check_strict(run.stage(name), strict)


def _weigh(
    run: RunDir, stage: StageWriter, config: SftConfig, material: Material, device: torch.device
) -> tuple[Policy, dict[str, Any]]:
    """The trained policy, and the stage's report, with evidence."""
    annotation = run.stage("annotate")
    rows = annotation.array("rows.npy")
    train = material.split.train
    held = last_positions(train, run.stage("pretrain").manifest["config"]["hold"])
    policy = only_thinking(material.policy(run.stage("pretrain"), device, config.dropout))
    policy.thinker.load_state_dict(load_file(annotation.file("thinker.safetensors")))
    gathered = Gathered(material.evidence, train.subset(rows))
    labels = torch.from_numpy(annotation.array("thoughts.npy").astype(np.int64))
    unseen = torch.from_numpy(np.isin(rows, held))
    teaches = gathered.found | unseen.numpy()  # the others have no piece that is to weigh most
    if teaches.any():
        some = np.flatnonzero(teaches)
        gathered, labels, unseen = gathered.subset(some), labels[some], unseen[some]
    result = fit(
        stage, policy, config, loss=Tuner(policy, gathered, labels, unseen, config).loss,
        examples=gathered.examples, device=device,
        # The weights alone pick the epoch: how far codes are trusted is settled afterwards.
        validate=lambda: validate(policy, material, config.seed, FULL, mix="weights"),
        patience=0, start=True, title="sft",
    )  # fmt: skip
    return policy, {
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "valid": {"start": result.start, "self": result.best},
        "trust": calibrate(policy, material, config.seed),
        "collapsed": False,
    }


def _by_letter(
    run: RunDir,
    stage: StageWriter,
    config: SftConfig,
    material: Material,
    device: torch.device,
    twin: bool,
) -> tuple[Policy, dict[str, Any]]:
    """The trained policy, and the stage's report, with thoughts of the vocabulary or its twin."""
    annotation = run.stage("annotate")
    settings = annotation.manifest["config"]
    policy = material.starting_policy(run, settings["start"], device, config.dropout)
    reference = material.policy(run.stage("pretrain"), device).requires_grad_(False)
    look_alikes = material.look_alikes(device)
    tuner = letter.Tuner(policy, reference, look_alikes, config, settings["mode"])
    validator = Validator(policy, material, config.seed)
    length, before = 0, None
    if not twin:
        length = settings["length"]
        policy.thinker.load_state_dict(load_file(annotation.file("thinker.safetensors")))
        before = letter.Rounds(stage, tuner, material, annotation)
    result = fit(
        stage, policy, config, loss=tuner.twin_loss if twin else tuner.loss,
        examples=material.split.train, epochs=config.rounds * config.epochs,
        patience=config.patience * config.epochs, validate=lambda: validator(think=length),
        start=True, device=device, title=stage.name, before_epoch=before,
    )  # fmt: skip
    report: dict[str, Any] = {
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "valid": {"self": result.best, "direct": validator(decoder="direct")},
    }
    if before is not None:
        before(max(result.epochs, 1) - 1)  # resumed after the last epoch, it was called for none
        report["valid"]["oracle"] = validator(
            think=length,
            thoughts=lambda history, target: label(policy, history, target, length, tuner.mode),
        )
        report["labels"] = before.reports
        report["collapsed"] = any(each["collapsed"] for each in before.reports)
    return policy, report
