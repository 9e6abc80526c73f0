"""Every stage of a run by its command, for tests that break one and go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.forks import SHOP, Answer, Commands

STAGES = {
    "data": SHOP,
    "tokenizer": "tokenize",
    "pretrain": "pretrain",
    "annotate": "annotate",
    "sft": "sft",
    "rl": "rl",
    "baselines/sasrec_ce": "baseline sasrec_ce",
    "eval": "eval",
}


def call(commands: Commands, run: Path, stage: str, settings: Path, arm=None) -> Answer:
    """Make a stage; `arm` is called in the command's process first."""
    options = ["--run", str(run)]
    if stage != "data":
        options += ["--config", str(settings)]
    return commands.run([*STAGES[stage].split(), *options], arm)


def before(clean: tuple[Path, Path], stage: str, folder: Path) -> tuple[Path, Path]:
    """A copy of the clean run as it was before `stage`, and its settings."""
    run, settings = clean
    copy = folder / "run"
    copy.mkdir()
    names = list(STAGES)
    for name in names[: names.index(stage)]:
        shutil.copytree(run / name, copy / name)
    return copy, settings
