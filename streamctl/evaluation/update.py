"""Update: a newer log continues from the codes and weights of an older run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamctl import config as configs
from streamctl.baselines.registry import BASELINES, baseline_class, resolved
from streamctl.errors import StreamctlError
from streamctl.evaluation.makers import maker
from streamctl.evaluation.refit import in_order
from streamctl.progress import say
from streamctl.runs import RunDir, Stage
from streamctl.tokenizer.extend import extend
from streamctl.training.sft import TWIN

EPOCHS = 4  # for which weights that have been trained before go on
WARM = ("pretrain", "baselines/tiger")  # stages that begin with the older run's weights
STAGES = ("pretrain", "annotate", "sft", "rl", TWIN, "baselines/tiger")


def update(
    old: RunDir, run: RunDir, *, file: Path | None = None, sets: Sequence[str] = (),
    seed: int | None = None, device: str = "auto",
) -> list[str]:  # fmt: skip
    """Make the stages of an older run for a newer log, going on from what they have learned.

    Users, interactions and items may have come and gone. Items of both catalogues keep their
    codes, new ones get free ones by their text. Pretraining, SFT with evidence and TIGER go on
    from the older weights for EPOCHS epochs; the weights as they were are a candidate, too.
    Annotation, RL, counts, trees and re-rankers are made from these with the older run's
    settings. Methods with vectors of their own for items have to be trained anew. Interrupted,
    the same call goes on.

    Args:
        old: with tokenizer and one trained stage or more.
        run: its data stage is complete, and has no tokenizer of its own.
        file, sets, seed: change settings, as `config.resolve` takes them.

    Returns:
        the names of the stages that were made.

    Raises:
        UsageError: an unknown setting, or one that the older weights do not fit.
        StreamctlError: a stage is missing or stale, or the runs share no item.
    """
    if old.path.resolve() == run.path.resolve():
        raise StreamctlError(
            "a run cannot go on from itself",
            where=run.path,
            run="`streamctl data prepare NEWER --run OTHER`, then update with --run OTHER",
        )
    old.require("data")
    counted = [f"baselines/{name}" for name in BASELINES if not baseline_class(name).losses]
    wanted = [name for name in (*STAGES, *counted) if old.stage(name).complete]
    wanted = [name for name in in_order(old, wanted) if name not in ("data", "tokenizer")]
    wanted += old.stages("rerank")
    settings = {name: _settings(old, name, file, sets, seed) for name in wanted}
    extend(old, run)
    made = ["tokenizer"]
    for name, config in settings.items():
        parents = old.stage(name).manifest["parents"]
        if not all(run.stage(parent).complete for parent in parents):
            continue  # a ranker behind a method that is not taken over
        say(f"update: {name}")
        warm = {"warm": _weights(old, name)} if name in WARM else {}
        maker(name)[0](run, config, device=device, **warm)
        made.append(name)
    left = [name.rpartition("/")[2] for name in old.stages("baselines") if name not in made]
    if left:
        say(f"not taken over, for they know single items: {', '.join(left)}; train them again")
    return made


def _settings(
    old: RunDir, name: str, file: Path | None, sets: Sequence[str], seed: int | None
) -> Any:
    """A stage's settings in the older run, with what is to differ."""
    cls, made = maker(name)[1], old.require(name).manifest
    base = made["config"]
    if name in WARM or (name == "sft" and _evidence(old)):
        base = base | {"epochs": EPOCHS}
    if name == "pretrain":
        base = base | {"hops": made["hops"]}  # what the weights of evidence were trained with
    options = {"base": base, "file": file, "sets": sets, "seed": seed}
    if cls is configs.BaselineConfig:
        return resolved(base["name"], **options)
    return configs.resolve(cls, **options)


def _evidence(old: RunDir) -> bool:
    """Whether its thoughts are of evidence, whose weights are all that SFT trains."""
    stage = old.stage("pretrain")
    return stage.complete and stage.manifest["config"]["thoughts"] == "evidence"


def _weights(old: RunDir, name: str) -> Stage:
    """The older stage whose weights a stage begins with: for pretraining SFT's, where these are
    the pretrained ones and trained weights of evidence beside them."""
    both = name == "pretrain" and _evidence(old) and old.stage("sft").complete
    return old.require("sft" if both else name)
