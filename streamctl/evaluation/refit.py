"""Refit: `final/`, the winner on all interactions, held-out ones included, for production."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from streamctl import config as configs
from streamctl.baselines.registry import baseline_class
from streamctl.baselines.train import train_baseline
from streamctl.config import RefitConfig
from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.evaluation.makers import maker
from streamctl.evaluation.methods import answerer, best_method, method_names
from streamctl.progress import say
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.training.sft import TWIN

FINAL = "final"
# What `publish` writes by itself; the rest of a manifest is the stage's own.
_EVERY_MANIFEST = {
    "schema", "stage", "hash", "artifacts", "parents", "config", "seed", "wall_s", "processes",
    "git", "versions", "machine", "peak_memory_mb", "seal",
}  # fmt: skip


def refit(run: RunDir, config: RefitConfig, *, device: str = "auto", force: bool = False) -> Stage:
    """Make RUN/final, itself a run: the winner with nothing held out.

    Counts, rows of other users and popularity are of all interactions. Weights that score codes or
    weigh evidence are taken as they are: what they learned does not hang on single interactions.
    Methods that know items by vectors of their own (GRU4Rec, SASRec, ...) train again on every
    interaction, for as many epochs as validation found. No evaluation reads it: there is nothing
    left to ask, and `eval` refuses.

    Raises:
        UsageError: an unknown method, or a control.
        StreamctlError: no method, a stage of it is missing or stale, or nothing is held out.
    """
    run.require("data")
    split = load_data(run)[1]
    if not len(split.valid) and not len(split.test):
        raise StreamctlError(
            "everything trains here already",
            where=run.path,
            run="`streamctl refit` of the run that this was made from",
        )
    if not config.method and method_names(run) == ["popularity"]:
        raise StreamctlError(
            "nothing is trained yet that could be refitted",
            where=run.path,
            run=f"`{run.command('run')}`, which trains every stage",
        )
    asked = bool(config.method)
    method, why = (config.method, "you chose it") if asked else best_method(run)
    row = answerer(run, method)
    config = dataclasses.replace(config, method=method)
    parents = list(dict.fromkeys(["data", *row.stages]))
    made = run.stage(FINAL).manifest if run.stage(FINAL).complete else {}
    # It was made as the best of then; from now on it is to answer whatever is best.
    force = force or (asked and made.get("method") == method and not made["asked"])
    with run.begin(FINAL, config, parents=parents, force=force) as stage:
        if stage is None:
            say(f"{FINAL}: complete already")
            return run.stage(FINAL)
        say(f"{FINAL}: {method}: {why}")
        final = RunDir(stage.path)
        _everything(run, final)
        for name in in_order(run, parents):
            if name != "data":
                say(f"{FINAL}: {name}")
                _again(run.stage(name), final, device)
        stage.publish(method=method, asked=asked, stages=in_order(run, parents))
        say(f"{FINAL}: {method}; `recommend` and `serve` use it")
    return run.stage(FINAL)


def in_order(run: RunDir, stages: Iterable[str]) -> list[str]:
    """Stages and all that they come from, parents first."""
    graph = {name: made["parents"] for name, made in run.ancestors(stages).items()}
    return list(TopologicalSorter(graph).static_order())


def _everything(run: RunDir, final: RunDir) -> None:
    """The data stage of a run in which every interaction trains."""
    source = run.stage("data")
    catalog, split = load_data(run)
    ends = split.log.offsets[1:]
    log = dataclasses.replace(split.log, cuts=np.stack([ends, ends], 1))
    config = configs.resolve(configs.DataConfig, base=source.manifest["config"])
    with final.begin("data", config) as stage:
        if stage is not None:
            log.save(stage)
            catalog.save(stage)
            _copy(source, stage, {"statistics.json"})
            stage.publish(**_own(source))


def _again(source: Stage, target: RunDir, device: str) -> None:
    """A stage in another run: trained anew where it must be, else as it is."""
    name = source.name
    own = name.removeprefix("baselines/")
    base = source.manifest["config"]
    # TIGER scores codes, like the policy.
    if own != name and name not in (TWIN, "baselines/tiger") and baseline_class(own).losses:
        more = {"epochs": source.manifest["best_epoch"] + 1, "patience": 0}
        config = configs.resolve(configs.BaselineConfig, base=base | more)
        train_baseline(target, config, device=device)
        return
    config = configs.resolve(maker(name)[1], base=base)
    with target.begin(name, config, parents=list(source.manifest["parents"])) as stage:
        if stage is not None:
            _copy(source, stage, set(source.manifest["artifacts"]))
            stage.publish(**_own(source), carried_from=source.hash)


def _copy(source: Stage, stage: StageWriter, names: set[str]) -> None:
    for name in sorted(names & source.manifest["artifacts"].keys()):
        (stage.path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(name), stage.path / name)
        stage.adopt(name)


def _own(source: Stage) -> dict[str, Any]:
    """What a stage says of itself in its manifest."""
    return {key: value for key, value in source.manifest.items() if key not in _EVERY_MANIFEST}
