"""Every stage is killed with SIGKILL and run again: the artifacts' hashes are the clean run's."""

from __future__ import annotations

import os
import signal

import kills
import pytest
from whole_run import before, call

from streamctl.runs import RunDir


class Killer:
    """Every step checkpointed, and a SIGKILL at the n-th call of one function.

    It comes after the call, but for the manifest: before it all work is done and nothing complete.
    """

    def __init__(self, where: str, count: str):
        self.where, self.count = where, int(count)

    def __call__(self) -> None:
        import torch

        from streamctl import stage as writing
        from streamctl.tokenizer import stage as tokenizer
        from streamctl.training import loop

        loop.CHECKPOINT_EVERY_S = tokenizer.CHECKPOINT_S = 0.0
        owner, name = {
            "checkpoint": (writing.StageWriter, "save_checkpoint"),
            "step": (torch.optim.AdamW, "step"),
            "manifest": (writing.StageWriter, "_write_manifest"),
            "artifact": (writing, "atomic_file"),
        }[self.where]
        original, calls = getattr(owner, name), 0

        def die_at_last() -> None:
            if calls == self.count:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if self.where == "manifest":
                die_at_last()
            result = original(*arguments, **options)
            die_at_last()
            return result

        setattr(owner, name, counted)


KILLS = [
    ("data", ("artifact", "2")),
    ("data", ("manifest", "1")),
    ("tokenizer", ("checkpoint", "1")),
    ("tokenizer", ("checkpoint", "3")),
    ("tokenizer", ("step", "7")),
    ("tokenizer", ("manifest", "1")),
    ("pretrain", ("checkpoint", "1")),
    ("pretrain", ("checkpoint", "9")),
    ("pretrain", ("step", "5")),
    ("pretrain", ("manifest", "1")),
    ("annotate", ("checkpoint", "1")),
    ("annotate", ("manifest", "1")),
    ("sft", ("checkpoint", "2")),
    ("sft", ("checkpoint", "9")),
    ("sft", ("step", "6")),
    ("sft", ("manifest", "1")),
    ("rl", ("checkpoint", "1")),
    ("rl", ("checkpoint", "3")),
    ("rl", ("step", "3")),
    ("rl", ("manifest", "1")),
    ("baselines/sasrec_ce", ("checkpoint", "3")),
    ("baselines/sasrec_ce", ("step", "2")),
    ("eval", ("checkpoint", "1")),
    ("eval", ("checkpoint", "4")),
    ("eval", ("manifest", "1")),
]


# With the paper's thoughts: rounds of labels, and rollouts of the whole policy.
LETTER_KILLS = [
    ("annotate", ("checkpoint", "1")),
    ("sft", ("checkpoint", "2")),
    ("sft", ("checkpoint", "9")),
    ("sft", ("artifact", "3")),
    ("rl", ("checkpoint", "3")),
    ("rl", ("step", "3")),
]


def named(value) -> str:
    return "-".join(value) if isinstance(value, tuple) else value


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("stage", "kill"), KILLS, ids=named)
def test_a_killed_stage_continues_to_the_same_artifacts(clean, commands, tmp_path, stage, kill):
    check_continues(clean, commands, tmp_path, stage, kill)


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("stage", "kill"), LETTER_KILLS, ids=named)
def test_a_killed_stage_of_the_letter_continues(letter, commands, tmp_path, stage, kill):
    check_continues(letter, commands, tmp_path, stage, kill)


def check_continues(whole, commands, folder, stage, kill) -> None:
    copy, settings = before(whole, stage, folder)
    killed = call(commands, copy, stage, settings, Killer(*kill))
    assert killed.returncode == -signal.SIGKILL, f"not killed: {killed.stderr}"
    assert not RunDir(copy).stage(stage).complete
    answer = call(commands, copy, stage, settings)
    assert answer.returncode == 0, answer.stderr
    expected = RunDir(whole[0]).stage(stage).manifest["artifacts"]
    assert RunDir(copy).stage(stage).manifest["artifacts"] == expected


def test_data_prepare_killed_at_any_instant_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "LOG_ROWS", 40_000)
    found = kills.prepares(tmp_path / "csv", kills=3, seed=0)
    assert found["kills"] == 3 and not found["differing"]


@pytest.mark.xdist_group("resume")
def test_a_stage_after_a_changed_parent_is_refused(clean, commands, tmp_path):
    copy, settings = before(clean, "sft", tmp_path)
    words = ["pretrain", "--force", "--set", "pretrain.lr=0.002"]
    redone = commands.run([*words, "--run", str(copy), "--config", str(settings)])
    assert redone.returncode == 0, redone.stderr
    answer = call(commands, copy, "sft", settings)
    assert answer.returncode == 1
    assert "annotate is stale" in answer.stderr
    assert f"streamctl annotate --run {copy}" in answer.stderr
