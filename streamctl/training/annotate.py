"""Annotation: which pieces of a user's evidence say most about the target (Sec. 2.3.1)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from streamctl.config import AnnotateConfig
from streamctl.decode.evidence import NOTHING, Weighed, weigh
from streamctl.device import autocast, resolve_device
from streamctl.distributed import ranks
from streamctl.errors import StreamctlError
from streamctl.model.policy import Encoded, Policy
from streamctl.progress import say
from streamctl.runs import RunDir, Stage
from streamctl.training.gathered import Gathered, last_positions
from streamctl.training.letter import annotate as letter
from streamctl.training.loop import Batch, fit
from streamctl.training.material import Material


def infer(
    policy: Policy, encoded: Encoded, weighed: Weighed, targets: torch.Tensor, length: int
) -> letter.Inference:
    """`letter.iterate` inside the evidence: o_i is the nearest piece that is not yet chosen.

    Vectors, states and target are taken to unit length; -1 is chosen once no piece is left. A step
    says at most log2 |evidence| bits of the target, and all it says can be found when serving.
    """
    vectors = F.normalize(policy.item_vectors(weighed.items.clamp(min=0)).detach().float(), dim=-1)
    free = weighed.items >= 0

    def nearest(residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal free
        near = (vectors - residual[:, None]).square().sum(-1)
        place = near.masked_fill(~free, torch.inf).argmin(1, keepdim=True)
        any_left = free.any(1, keepdim=True)
        free = free.scatter(1, place, False)
        item = weighed.items.gather(1, place).where(any_left, -1)
        hop = weighed.hops.gather(1, place).where(any_left, NOTHING)
        return torch.where(any_left, place, -1)[:, 0], policy.piece_vectors(item, hop)[:, None]

    return letter.iterate(policy, encoded, targets, length, nearest)


def heads_loss(
    policy: Policy, batch: Batch, gathered: Gathered, config: AnnotateConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eqs. 14 and 15 for MLP_s and MLP_r alone, on thoughts that are made on the way."""
    with torch.no_grad():
        encoded = policy.encode(batch.history)
        weighed = weigh(policy, gathered(batch.index.cpu().numpy()))
    steps = infer(policy, encoded, weighed, batch.target, config.length)
    items = weighed.items.gather(1, steps.chosen.clamp(min=0)).clamp(min=0)
    vectors = F.normalize(policy.item_vectors(items).float(), dim=-1)
    return letter.steps_loss(policy, batch, steps, vectors)


@torch.no_grad()
def label_all(
    policy: Policy, gathered: Gathered, length: int, batch: int
) -> tuple[np.ndarray, dict[str, float]]:
    """int32 (E, l) places among the pieces of each example, and how often the target is chosen."""
    examples = gathered.examples
    labels = np.zeros((len(examples), length), np.int32)
    counts = np.zeros(2)  # examples whose target is chosen, and whose target is there
    order = np.argsort(examples.lengths, kind="stable")
    policy.eval()
    with autocast(policy.device):
        for index in ranks().mine(np.array_split(order, max(1, -(-len(order) // batch)))):
            history = torch.from_numpy(examples.histories(index)).to(policy.device)
            targets = torch.from_numpy(examples.targets[index]).to(policy.device)
            weighed = weigh(policy, gathered(index))
            steps = infer(policy, policy.encode(history), weighed, targets, length)
            labels[index] = steps.chosen.cpu().numpy()
            chosen = weighed.items.gather(1, steps.chosen.clamp(min=0))
            hit = ((chosen == targets[:, None]) & (steps.chosen >= 0)).any(1)
            known = (weighed.items == targets[:, None]).any(1)
            counts += [int(hit.sum()), int(known.sum())]
    hit, known = (ranks().sum(counts) / max(len(examples), 1)).tolist()
    say(
        f"annotate: the target is among {known:.0%} of the users' evidence and labelled for "
        f"{hit:.0%}"
    )
    return ranks().sum(labels), {
        "examples": len(examples),
        "targets_in_evidence": known,
        "targets_chosen": hit,
        "collapsed": False,
    }


def check_strict(stage: Stage, strict: bool) -> Stage:
    """The stage, unless its labels have collapsed and the user is strict about it.

    Raises:
        StreamctlError: under `strict`, labels that have collapsed.
    """
    if strict and stage.manifest["collapsed"]:
        raise StreamctlError(
            "the think labels have collapsed (--strict)",
            where=stage.path / "report.json",
            run=stage.again(["annotate.fit_epochs=0"]),
        )
    return stage


def annotate(
    run: RunDir,
    config: AnnotateConfig,
    *,
    device: str = "auto",
    force: bool = False,
    strict: bool = False,
) -> Stage:
    """Label the training examples that SFT learns from with l think tokens.

    The heads begin as the identity, so labels exist before anything is trained; `fit_epochs` first
    fits them on the frozen backbone. Writes thoughts.npy (E, l) int32, thinker.safetensors (the
    heads) and report.json; with evidence thoughts are places among the pieces, and rows.npy (E,)
    int64 has the examples, each user's last.

    Raises:
        StreamctlError: under `strict`, labels that have collapsed (the stage is written first).
    """
    parents = ["data", "tokenizer", "pretrain"]
    with run.begin("annotate", config, parents, force=force) as stage:
        if stage is None:
            say("annotate: complete already")
            return check_strict(run.stage("annotate"), strict)
        where = resolve_device(device)
        material = Material.load(run)
        policy = material.starting_policy(run, config.start, where).requires_grad_(False)
        policy.thinker.requires_grad_(True)
        train = material.split.train
        if policy.config.thoughts == "evidence":
            rows = last_positions(train, config.positions)
            stage.save_array("rows.npy", rows)
            gathered = Gathered(material.evidence, train.subset(rows))
            train = gathered.examples
            loss = partial(heads_loss, policy, gathered=gathered, config=config)
            label = partial(label_all, policy, gathered)
        else:
            loss = partial(letter.heads_loss, policy, config=config)
            label = partial(letter.label_all, policy, train, mode=config.mode)
        if config.fit_epochs:
            fit(
                stage, policy.thinker, config, loss=loss, examples=train, epochs=config.fit_epochs,
                validate=None, device=where, title="annotate: heads",
            )  # fmt: skip
        thoughts, report = label(length=config.length, batch=config.batch)
        stage.save_array("thoughts.npy", thoughts)
        stage.save_tensors("thinker.safetensors", policy.thinker.state_dict())
        stage.save_json("report.json", report)
        stage.publish(**report)
    return check_strict(run.stage("annotate"), strict)
