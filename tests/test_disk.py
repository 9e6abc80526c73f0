"""A disk that fails at the n-th write of any command: one line, nothing half, and it continues."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass

import pytest
from whole_run import STAGES, before, call

from streamctl.runs import RunDir

pytestmark = pytest.mark.xdist_group("resume")
WRITES = [3**power for power in range(7)]


@dataclass(frozen=True)
class FailingDisk:
    """In the command's process: from the n-th call on, a step of every write fails."""

    step: str
    code: int
    number: int

    def __call__(self) -> None:
        from streamctl.tokenizer import stage as tokenizer
        from streamctl.training import loop, rl

        loop.CHECKPOINT_EVERY_S = rl.CHECKPOINT_EVERY_S = tokenizer.CHECKPOINT_S = 0.0
        works, calls = getattr(os, self.step), 0

        def fails(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= self.number:
                raise OSError(self.code, os.strerror(self.code))
            return works(*arguments, **options)

        setattr(os, self.step, fails)


FULL, READ_ONLY = ("fsync", errno.ENOSPC), ("replace", errno.EROFS)


def check_line(answer, code):
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.stderr
    assert f"cannot be written: {os.strerror(code)}" in errors[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_whole_or_not_there_and_continues_to_the_same_artifacts(
    clean, commands, tmp_path, stage
):
    copy, settings = before(clean, stage, tmp_path)
    failed = 0
    for number in WRITES:
        step, code = (FULL, READ_ONLY)[failed % 2]
        answer = call(commands, copy, stage, settings, FailingDisk(step, code, number))
        if answer.returncode == 0:
            break
        failed += 1
        check_line(answer, code)
        assert not RunDir(copy).stage(stage).complete
        assert not list(copy.rglob("*.part"))
    assert answer.returncode == 0 and failed >= 2
    expected = RunDir(clean[0]).stage(stage).manifest["artifacts"]
    assert RunDir(copy).stage(stage).manifest["artifacts"] == expected
    assert not list(copy.rglob("*.previous"))


def test_reproduce_loses_no_job_and_writes_no_half_receipt(clean, commands, tmp_path):
    copy, _ = before(clean, "pretrain", tmp_path)
    words = [
        "reproduce",
        str(copy),
        "--methods",
        "popularity,sasrec_ce",
        "--size",
        "tiny",
        "--no-rerank",
    ]
    words += ["--set", "baseline.epochs=2", "--set", "eval.bootstrap=50", "--set", "eval.beam=5"]
    failed = 0
    for number in WRITES:
        step, code = (FULL, READ_ONLY)[failed % 2]
        answer = commands.run(words, FailingDisk(step, code, number))
        for path in (copy / "reproduce").rglob("*.json"):
            json.loads(path.read_text())
        assert not list(copy.rglob("*.part"))
        if answer.returncode == 0:
            break
        failed += 1
        check_line(answer, code)
    assert answer.returncode == 0 and failed >= 3
    assert {path.name for path in (copy / "reproduce").iterdir()} == {
        "receipts", "table.json", "seed-0"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["recbole", "lcrec", "table-parquet", "amazon2023"])
def test_an_export_is_whole_files_only(clean, commands, tmp_path, name):
    words = ["data", "export", "--run", str(clean[0]), "--format", name]
    assert commands.run([*words, str(tmp_path / "whole" / "toy")]).returncode == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "toy").iterdir()}
    for number in WRITES:
        folder = tmp_path / str(number) / "toy"
        answer = commands.run([*words, str(folder)], FailingDisk(*FULL, number))
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert written.items() <= whole.items()
        if answer.returncode == 0:
            break
        check_line(answer, errno.ENOSPC)
    assert written == whole and number > 1
