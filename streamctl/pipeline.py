"""All stages of a run, one after another, skipping what is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamctl import config as configs
from streamctl.baselines.registry import BASELINES, resolved
from streamctl.errors import UsageError
from streamctl.evaluation.makers import maker
from streamctl.evaluation.stage import evaluate_run
from streamctl.progress import say
from streamctl.runs import RunDir, Stage
from streamctl.training.sft import TWIN


@dataclass(frozen=True)
class Settings:
    """Where the configuration of every stage comes from: file, `--set` texts and flags."""

    file: Path | None = None
    sets: Sequence[str] = ()
    seed: int | None = None
    size: str | None = None

    def resolve(self, cls: type, run: RunDir, stage: str) -> Any:
        """The stage's configuration; one that is complete keeps its own unless told otherwise."""
        base = {}
        if run.stage(stage).complete:
            base = run.stage(stage).manifest["config"]
        if stage == "eval":
            base.pop("methods", None)  # of one evaluation
        flags = {"seed": self.seed, "size": self.size}
        flags = {name: value for name, value in flags.items() if name in cls.__dataclass_fields__}
        options = {"base": base, "file": self.file, **flags}
        if cls is configs.BaselineConfig:
            return resolved(stage.removeprefix("baselines/"), sets=self.sets, **options)
        sets = [text for text in self.sets if text.partition(".")[0] not in BASELINES]
        return configs.resolve(cls, sets=sets, **options)


STEPS = (
    "tokenizer", "pretrain", "annotate", "sft", "rl", TWIN, "baselines/transitions",
    "baselines/knn", "baselines/ranker", "baselines/tiger",
)  # fmt: skip


def run_all(run: RunDir, settings: Settings, *, device: str = "auto") -> Stage:
    """Every stage of STREAM-Rec, what it is compared with, and the evaluation.

    A complete stage is skipped; one whose parents have changed is redone, the old one kept as
    `NAME.previous`, as are baselines and re-rankers made by hand, so that eval finds none of older
    data. The data stage must be there (`data prepare` or `data synth` makes it). The
    control without a thought is a model of its own only where thoughts are of the vocabulary:
    thinking with evidence, it is in the same policy.

    Returns:
        the eval stage.

    Raises:
        StreamctlError: what the stages raise.
    """
    run.require("data")
    steps = (*STEPS, *_outdated_baselines(run))
    for text in settings.sets:
        name = text.partition(".")[0]
        if name in BASELINES and f"baselines/{name}" not in steps:
            raise UsageError(
                f"--set {text}: `run` does not train {name}", run=run.command(f"baselines/{name}")
            )
    # Every configuration is resolved first: a typing mistake in the last stage's costs seconds.
    chosen = {name: settings.resolve(maker(name)[1], run, name) for name in steps}
    for name in _rerankers(run, steps):
        chosen[name] = settings.resolve(configs.RerankConfig, run, name)
    chosen["eval"] = settings.resolve(configs.EvalConfig, run, "eval")
    if chosen["pretrain"].thoughts == "evidence":
        del chosen[TWIN]
    for number, (name, config) in enumerate(chosen.items(), 1):
        outdated = run.stage(name).outdated
        state = "redone, its parents changed" if outdated else ""
        say(f"[{number}/{len(chosen)}] {name} {state}".rstrip())
        make = evaluate_run if name == "eval" else maker(name)[0]
        # An evaluation knows itself which of its rows still hold.
        make(run, config, device=device, force=outdated and name != "eval")
    return run.stage("eval")


def _outdated_baselines(run: RunDir) -> list[str]:
    """Complete baselines beside those of `STEPS` whose parents have changed."""
    made = (run.stage(name) for name in run.stages("baselines"))
    return [stage.name for stage in made if stage.name not in STEPS and stage.outdated]


def _rerankers(run: RunDir, steps: Sequence[str]) -> list[str]:
    """Complete re-rankers behind what is there or about to be: what they read may change."""

    def there(name: str) -> bool:
        return name in steps or run.stage(name).complete

    rankers = run.stages("rerank")
    return [name for name in rankers if all(map(there, run.stage(name).manifest["parents"]))]
