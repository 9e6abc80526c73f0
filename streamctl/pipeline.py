"""All stages of a run, one after another, skipping what is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamctl import config as configs
from streamctl.progress import say
from streamctl.runs import RunDir, Stage


@dataclass(frozen=True)
class Settings:
    """Where the configuration of every stage comes from: file, `--set` texts and flags."""

    file: Path | None = None
    sets: Sequence[str] = ()
    seed: int | None = None
    size: str | None = None

    def resolve(self, cls: type, run: RunDir, stage: str, **fixed: Any) -> Any:
        """The stage's configuration; one that is complete keeps its own unless told otherwise."""
        base = {}
        if run.stage(stage).complete:
            base = run.stage(stage).manifest["config"]
        flags = {"seed": self.seed, "size": self.size}
        flags = {name: value for name, value in flags.items() if name in cls.__dataclass_fields__}
        return configs.resolve(cls, base=base, file=self.file, sets=self.sets, **flags, **fixed)


def run_all(run: RunDir, settings: Settings, *, device: str = "auto") -> Stage:
    """Tokenize, pretrain, annotate, SFT, RL, TIGER, the l = 0 twin, and the evaluation.

    A complete stage is skipped; one whose parents have changed is redone, the old one kept as
    `NAME.previous`. The data stage must be there (`data prepare` or `data synth` makes it).

    Returns:
        the eval stage.

    Raises:
        StreamctlError: what the stages raise.
    """
    from streamctl.baselines.train import train_baseline
    from streamctl.evaluation.stage import evaluate_run
    from streamctl.tokenizer.stage import tokenize
    from streamctl.training.annotate import annotate
    from streamctl.training.pretrain import pretrain
    from streamctl.training.rl import rl
    from streamctl.training.sft import sft

    run.require("data")

    def twin(run: RunDir, config: Any, **options: Any) -> Stage:
        return sft(run, config, twin=True, **options)

    def tiger(run: RunDir, config: Any, **options: Any) -> Stage:
        return train_baseline(run, config, **options)

    steps: tuple[tuple[str, Callable[..., Stage], type, dict[str, Any]], ...] = (
        ("tokenizer", tokenize, configs.TokenizeConfig, {}),
        ("pretrain", pretrain, configs.PretrainConfig, {}),
        ("annotate", annotate, configs.AnnotateConfig, {}),
        ("sft", sft, configs.SftConfig, {}),
        ("rl", rl, configs.RlConfig, {}),
        ("baselines/tiger", tiger, configs.BaselineConfig, {"name": "tiger"}),
        ("baselines/no_thinking", twin, configs.SftConfig, {}),
        ("eval", evaluate_run, configs.EvalConfig, {}),
    )
    # Every configuration is resolved first: a typing mistake in the last stage's costs seconds.
    resolved = [settings.resolve(cls, run, name, **fixed) for name, _, cls, fixed in steps]
    if resolved[1].thoughts == "evidence":  # its l = 0 twin is in the same policy
        kept = [place for place, step in enumerate(steps) if step[1] is not twin]
        steps, resolved = [steps[place] for place in kept], [resolved[place] for place in kept]
    for number, ((name, function, _, _), config) in enumerate(zip(steps, resolved, strict=True), 1):
        stage = run.stage(name)
        stale = stage.complete and bool(stage.stale_parents())
        state = "redone, its parents changed" if stale else "complete" if stage.complete else ""
        say(f"[{number}/{len(steps)}] {name} {state}".rstrip())
        function(run, config, device=device, force=stale)
    return run.stage("eval")
