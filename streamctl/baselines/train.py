"""The stage `baselines/NAME`: one baseline, trained by the common loop on the common split."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from streamctl.baselines.base import Baseline
from streamctl.baselines.registry import baseline_class, no_setting
from streamctl.config import BaselineConfig
from streamctl.data import Examples, Split, load_data
from streamctl.device import derive_seed, resolve_device
from streamctl.errors import UsageError
from streamctl.progress import say
from streamctl.ranking import evaluate, sample_users
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.training.gathered import last_positions
from streamctl.training.loop import Batch, FitResult, fit
from streamctl.training.material import warm_start

VALIDATION_USERS = 2000
_ALWAYS = ("name", "seed")


def settle(run: RunDir, config: BaselineConfig) -> BaselineConfig:
    """The configuration with the method's own values where it leaves them open.

    Raises:
        UsageError: a setting that the method does not have, or a loss it cannot train with.
    """
    cls = baseline_class(config.name)
    own = cls.settings(run, config) | ({"loss": cls.losses[0]} if cls.losses else {})
    given = {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name not in _ALWAYS and (value := getattr(config, field.name)) is not None
    }
    for name in given:
        if name not in own:
            raise no_setting(config.name, name, own)
    loss = given.get("loss")
    if loss is not None and loss not in cls.losses:
        raise UsageError(
            f"{config.name} cannot train with loss {loss}; it takes {cls.losses[0]}",
            run=f"--loss {cls.losses[0]}, or leave it out" if cls.losses else "leave --loss out",
        )
    settled = dataclasses.replace(config, **(own | given))
    if settled.repeat and settled.loss != "ce":
        raise UsageError(
            f"repeat needs the loss over the whole catalogue, not {settled.loss}",
            run="--loss ce, or leave repeat out",
        )
    return settled


def whole_sequences(examples: Examples, history: int) -> Examples:
    """The training prefixes whose windows tile each user's sequence, the last one first of all.

    Predicting at every position of these windows, of `history` items at most, gives every training
    target exactly once. Examples are every prefix of every user, users together.
    """
    last = np.zeros(int(examples.users.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(last, examples.users, examples.end)
    return examples.subset((last[examples.users] - examples.end) % history == 0)


def train_baseline(
    run: RunDir, config: BaselineConfig, *, device: str = "auto", force: bool = False,
    warm: Stage | None = None,
) -> Stage:  # fmt: skip
    """Train one baseline and publish its best weights; the evaluation is `eval`'s.

    Args:
        config: open settings take the method's defaults.
        warm: TIGER in another run, whose weights this one begins with.

    Raises:
        UsageError: unknown name or setting.
        StreamctlError: a parent is missing or stale, or the stage is complete with other settings.
    """
    cls = baseline_class(config.name)
    for parent in cls.parents:
        run.require(parent)
    config = settle(run, config)
    name = f"baselines/{config.name}"
    with run.begin(name, config, parents=cls.parents, force=force) as stage:
        if stage is None:
            say(f"{name}: complete already")
            return run.stage(name)
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        model = cls.build(run, config)
        if warm is not None:
            warm_start(model.policy, warm)
        if cls.losses:
            result = _train(run, stage, model, config, device, start=warm is not None)
        else:
            split = load_data(run)[1]
            model.train_on(split)
            best = _validated(model, split, config.seed) if len(split.valid) else {}
            result = FitResult(best=best)
        model.cpu().save(stage)
        stage.publish(
            parameters=sum(w.numel() for w in model.parameters() if w.requires_grad),
            epochs=result.epochs,
            best_epoch=result.best_epoch,
            valid=result.best,
        )
    return run.stage(name)


def _train(
    run: RunDir, stage: StageWriter, model: Baseline, config: BaselineConfig, device: str,
    start: bool,
) -> FitResult:  # fmt: skip
    _, split = load_data(run)
    examples = split.train
    if config.positions is not None:
        examples = examples.subset(last_positions(examples, config.positions))
    if model.sequences:
        examples = whole_sequences(examples, split.history)
    mean_length = examples.lengths.mean()

    def loss(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, metrics = model.training_loss(batch)
        # Every position counts the same, whether its sequence is long or short.
        weight = batch.history.shape[1] / mean_length if model.sequences else 1.0
        return value * weight, metrics

    return fit(
        stage,
        model,
        config,
        loss=loss,
        examples=examples,
        # A run in which everything trains has nobody to validate with.
        validate=(lambda: _validated(model, split, config.seed)) if len(split.valid) else None,
        device=resolve_device(device),
        bf16=model.bf16,
        start=start,
        title=config.name,
    )


def _validated(model: Baseline, split: Split, seed: int) -> dict[str, float]:
    """recall@10 and ndcg@10 on a sample of validation users, seen items left out."""
    sample = sample_users(split.valid, VALIDATION_USERS, seed)
    found = evaluate(model, sample, n_items=split.n_items, masked=True).metrics
    return {key: found[key] for key in ("recall@10", "ndcg@10")}
