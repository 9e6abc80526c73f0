"""Every stage is killed with SIGKILL and run again: the artifacts' hashes are the clean run's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from streamctl.runs import RunDir

SETTINGS = """
[tokenize]
encoder = "tfidf"
codes = 8
levels = 3
dim = 16
latent = 8
hidden = [32]
epochs = 12
batch = 64
neighbours = 10
[pretrain]
epochs = 2
batch = 64
[annotate]
length = 2
[sft]
rounds = 2
epochs = 1
batch = 64
[rl]
steps = 4
group = 4
batch = 16
negatives = 5
validate_every = 2
[baseline]
epochs = 2
[eval]
beam = 10
bootstrap = 50
"""
STAGES = {
    "data": ("data synth", "--users 120 --items 60 --seed 1"),
    "tokenizer": ("tokenize", ""),
    "pretrain": ("pretrain", ""),
    "annotate": ("annotate", ""),
    "sft": ("sft", ""),
    "rl": ("rl", ""),
    "baselines/sasrec": ("baseline sasrec", ""),
    "eval": ("eval", ""),
}
# Runs the command line with every step checkpointed and a SIGKILL at the n-th call of one function.
KILLER = """
import os, signal, sys, threading
import torch
where, count = sys.argv.pop(1), float(sys.argv.pop(1))
from streamctl import runs
from streamctl.training import loop
loop.CHECKPOINT_EVERY_S = 0.0
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def after(owner, name):
    original, calls = getattr(owner, name), [0]
    def counted(*arguments, **options):
        result = original(*arguments, **options)
        calls[0] += 1
        if calls[0] == count:
            kill()
        return result
    setattr(owner, name, counted)
if where == "checkpoint":
    after(runs.StageWriter, "save_checkpoint")
elif where == "step":
    after(torch.optim.AdamW, "step")
elif where == "publish":
    after(runs, "file_hash")
elif where == "artifact":
    after(runs, "atomic_file")
from streamctl.cli import main
main()
"""


def call(run, stage, settings, kill=None):
    words, extra = STAGES[stage]
    options = ["--run", str(run), *extra.split()]
    if stage != "data":
        options += ["--config", str(settings)]
    start = ["-c", KILLER, *kill] if kill else ["-m", "streamctl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *words.split(), *options],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run in which nothing was interrupted, and its settings."""
    folder = tmp_path_factory.mktemp("clean")
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    run = folder / "run"
    for stage in STAGES:
        answer = call(run, stage, settings)
        assert answer.returncode == 0, f"{stage}: {answer.stderr}"
    return run, settings


def before(clean, stage, folder):
    """A copy of the clean run as it was before `stage`."""
    run, settings = clean
    copy = folder / "run"
    names = list(STAGES)
    for name in names[: names.index(stage)]:
        shutil.copytree(run / name, copy / name)
    return copy, settings


KILLS = [
    ("data", ("artifact", "2")),
    ("data", ("publish", "1")),
    ("tokenizer", ("checkpoint", "1")),
    ("tokenizer", ("checkpoint", "3")),
    ("tokenizer", ("step", "7")),
    ("tokenizer", ("publish", "2")),
    ("pretrain", ("checkpoint", "1")),
    ("pretrain", ("checkpoint", "9")),
    ("pretrain", ("step", "5")),
    ("pretrain", ("publish", "1")),
    ("annotate", ("checkpoint", "1")),
    ("annotate", ("publish", "1")),
    ("sft", ("checkpoint", "2")),
    ("sft", ("checkpoint", "9")),
    ("sft", ("step", "6")),
    ("sft", ("publish", "1")),
    ("rl", ("checkpoint", "1")),
    ("rl", ("checkpoint", "3")),
    ("rl", ("step", "3")),
    ("rl", ("publish", "1")),
    ("baselines/sasrec", ("checkpoint", "3")),
    ("baselines/sasrec", ("step", "2")),
    ("eval", ("checkpoint", "1")),
    ("eval", ("checkpoint", "4")),
    ("eval", ("publish", "1")),
]


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    ("stage", "kill"),
    KILLS,
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_a_killed_stage_continues_to_the_same_artifacts(clean, tmp_path, stage, kill):
    copy, settings = before(clean, stage, tmp_path)
    killed = call(copy, stage, settings, kill)
    assert killed.returncode == -signal.SIGKILL, f"not killed: {killed.stderr}"
    assert not RunDir(copy).stage(stage).complete
    answer = call(copy, stage, settings)
    assert answer.returncode == 0, answer.stderr
    expected = RunDir(clean[0]).stage(stage).manifest["artifacts"]
    assert RunDir(copy).stage(stage).manifest["artifacts"] == expected


@pytest.mark.xdist_group("resume")
def test_a_stage_after_a_changed_parent_is_refused(clean, tmp_path):
    copy, settings = before(clean, "sft", tmp_path)
    redone = subprocess.run(
        [
            *(sys.executable, "-m", "streamctl", "pretrain", "--run", str(copy), "--force"),
            *("--config", str(settings), "--set", "pretrain.lr=0.002"),
        ],
        capture_output=True,
        text=True,
    )
    assert redone.returncode == 0, redone.stderr
    answer = call(copy, "sft", settings)
    assert answer.returncode == 1
    assert "annotate is stale" in answer.stderr
    assert f"streamctl annotate --run {copy}" in answer.stderr
