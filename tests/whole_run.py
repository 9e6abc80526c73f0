"""Every stage of a run by its command, for tests that break one and go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from forks import SETTINGS, SHOP, Answer, Commands

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


def words_of(run: Path, stage: str, settings: Path) -> list[str]:
    """The command that makes a stage."""
    words = [*STAGES[stage].split(), "--run", str(run)]
    return words if stage == "data" else [*words, "--config", str(settings)]


def call(commands: Commands, run: Path, stage: str, settings: Path, arm=None) -> Answer:
    """Make a stage; `arm` is called in the command's process first."""
    return commands.run(words_of(run, stage, settings), arm)


def whole(
    commands: Commands, folder: Path, stages: Iterable[str], pretrain: str = ""
) -> tuple[Path, Path]:
    """A run of these stages and its settings, `pretrain` a line more in their table."""
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS.replace("[pretrain]", f"[pretrain]\n{pretrain}"))
    for stage in stages:
        answer = call(commands, folder / "run", stage, settings)
        assert answer.returncode == 0, f"{stage}: {answer.stderr}"
    return folder / "run", settings


def before(clean: tuple[Path, Path], stage: str, folder: Path) -> tuple[Path, Path]:
    """A copy of the clean run as it was before `stage`, and its settings."""
    run, settings = clean
    copy = folder / "run"
    copy.mkdir()
    names = list(STAGES)
    for name in names[: names.index(stage)]:
        shutil.copytree(run / name, copy / name)
    return copy, settings
