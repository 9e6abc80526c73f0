"""Which model of a run is served, and loading it."""

from __future__ import annotations

from typing import Any

import torch

from streamctl.device import has_bf16, resolve_device
from streamctl.model import Policy
from streamctl.runs import RunDir, Stage
from streamctl.tokenizer import SemanticIds

BEST_FIRST = ("rl", "sft", "pretrain")


def best_stage(run: RunDir) -> Stage | None:
    """The furthest finished stage that holds a model: rl, sft or pretrain."""
    stages = (run.stage(name) for name in BEST_FIRST)
    return next((stage for stage in stages if stage.complete), None)


def servable(run: RunDir) -> Stage:
    """The stage to serve, checked with its parents.

    Raises:
        StreamctlError: no such run, no finished model, or a damaged or stale stage.
    """
    stage = best_stage(run)
    return run.require("pretrain" if stage is None else stage.name)


def model_name(run: RunDir, stage: Stage) -> dict[str, Any]:
    """What answers say about the model that made them."""
    return {"run": run.path.resolve().name, "stage": stage.name, "hash": stage.hash}


def load_policy(stage: Stage, ids: SemanticIds, device: str = "auto") -> Policy:
    """The stage's policy on its device, in bf16 where the device computes in it.

    Raises:
        StreamctlError: the artifacts are damaged or do not fit the tokenizer's codes.
        UsageError: no such device.
    """
    place = resolve_device(device)
    policy = Policy.load(stage.path, torch.from_numpy(ids.tokens().item_tokens(ids.codes)))
    return policy.to(place, torch.bfloat16 if has_bf16(place) else torch.float32)


def thought_length(run: RunDir, stage: Stage) -> int:
    """Think tokens that the model was trained with; a pretrained one does not think."""
    if stage.name == "pretrain":
        return 0
    return run.stage("annotate").manifest["config"]["length"]
