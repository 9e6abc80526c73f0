"""A disk that fails or is full, a flipped byte: one line that names the file, nothing half."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import until
from forks import hashes
from whole_run import STAGES, before, call, words_of

from streamctl.runs import RunDir

ROOM_FOR_WORDS = 1500  # bytes that the error itself may take, on stderr
WRITES = [3**power for power in range(7)]
pytestmark = pytest.mark.xdist_group("resume")


@dataclass(frozen=True)
class SmallFiles:
    """No file of this process grows beyond `size` bytes: the disk is full in the middle of it."""

    size: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


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


def error_line(answer):
    """The one line of an expected failure."""
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.stderr
    return errors[0]


def check_line(answer, code):
    assert f"cannot be written: {os.strerror(code)}" in error_line(answer)


def files_of(run):
    return {
        path.relative_to(run)
        for path in run.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def check_same(run, stage, clean):
    assert hashes(RunDir(run))[stage] == hashes(RunDir(clean))[stage]


@pytest.mark.parametrize("stage", ["data", "tokenizer", "pretrain", "annotate"])
def test_a_disk_that_fills_in_a_file_is_named_and_the_stage_continues(
    clean, commands, tmp_path, stage
):
    sizes = {
        path.stat().st_size
        for path in (clean[0] / stage).rglob("*")
        if path.is_file() and path.suffix in (".npy", ".parquet", ".safetensors", ".json", ".toml")
    }
    copy, settings = before(clean, stage, tmp_path)
    # One byte short of the largest file, and of some smaller ones.
    limits = sorted(size - 1 for size in sizes if size > ROOM_FOR_WORDS)
    for limit in {limits[0], limits[len(limits) // 2], limits[-1]}:
        answer = call(commands, copy, stage, settings, SmallFiles(limit))
        line = error_line(answer)
        assert str(copy) in line and "cannot be written" in line
        assert not RunDir(copy).stage(stage).complete
        assert not list(copy.rglob("*.part"))
    answer = call(commands, copy, stage, settings)
    assert answer.returncode == 0, answer.stderr
    check_same(copy, stage, clean[0])


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
    check_same(copy, stage, clean[0])
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


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own and what mounts it again with other options, where we may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
        assert not (done.returncode and "remount" in options[1]), done.stderr
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    yield folder, mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_read_only_disk_is_named_by_every_stage(clean, commands, disk):
    folder, mount = disk
    for stage in ("data", "tokenizer", "pretrain", "annotate", "eval"):
        (folder / stage).mkdir()
        run, settings = before(clean, stage, folder / stage)
        known = files_of(run)
        mount("-o", "remount,ro")
        line = error_line(call(commands, run, stage, settings))
        mount("-o", "remount,rw")
        assert "Read-only file system" in line and str(run) in line
        assert files_of(run) == known


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(clean, commands, tmp_path):
    run, settings = before(clean, "tokenizer", tmp_path)
    run.chmod(0o555)
    line = error_line(call(commands, run, "tokenizer", settings))
    run.chmod(0o755)
    assert "Permission denied" in line and str(run) in line


def test_a_flipped_byte_in_any_artifact_is_noticed_and_named(clean, tmp_path):
    copy = shutil.copytree(clean[0], tmp_path / "run")
    run, checked = RunDir(copy), 0
    for stage, artifacts in hashes(run).items():
        for name in artifacts:
            path = copy / stage / name
            whole = path.read_bytes()
            for place in {0, len(whole) // 2, len(whole) - 1}:
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
                with pytest.raises(Exception, match=r"is damaged") as found:
                    run.require(stage)
                assert str(path) in str(found.value)
            path.write_bytes(whole)
            checked += 1
        run.require(stage)
    assert checked >= 20


def test_a_flipped_byte_in_a_manifest_is_noticed(clean, tmp_path):
    copy = shutil.copytree(clean[0], tmp_path / "run")
    path = copy / "data" / "manifest.json"
    whole = path.read_bytes()
    seal = whole.index(b'"seal"') + 1  # without its key nothing would be compared
    for place in (seal, *range(0, len(whole), 37)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if whole[place : place + 1].isspace():
            continue
        with pytest.raises(Exception, match=r"manifest\.json"):
            RunDir(copy).require("data")


def test_a_damaged_stage_is_not_called_complete(clean, commands, tmp_path):
    copy = shutil.copytree(clean[0], tmp_path / "run")
    path = copy / "tokenizer" / "codes.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    line = error_line(call(commands, copy, "tokenizer", clean[1]))
    assert str(path) in line and "--force" in line


def test_a_damaged_checkpoint_is_named(clean, commands, tmp_path):
    copy, settings = before(clean, "pretrain", tmp_path)
    killed = call(commands, copy, "pretrain", settings, kill_after_the_first_epoch)
    assert killed.returncode == -signal.SIGKILL
    path = copy / "pretrain" / ".progress" / "checkpoint.safetensors"
    whole = path.read_bytes()
    for place in (3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        line = error_line(call(commands, copy, "pretrain", settings))
        assert f"{path}: the checkpoint is damaged" in line
    path.unlink()
    assert call(commands, copy, "pretrain", settings).returncode == 0
    check_same(copy, "pretrain", clean[0])


def kill_after_the_first_epoch():
    from streamctl.runs import StageWriter

    save = StageWriter.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    StageWriter.save_checkpoint = save_and_die


def test_half_a_stage_never_takes_the_place_of_a_whole_one(tmp_path):
    from test_runs import make

    run = RunDir(tmp_path)
    make(run, "data", 1)
    make(run, "data", 2, force=True)
    (run.path / "data" / "manifest.json").unlink()  # killed while it was redone
    (run.path / "data" / "config.toml").unlink()
    make(run, "data", 3)
    assert run.stage("data").array("x.npy")[0] == 3
    assert run.stage("data.previous").array("x.npy")[0] == 1


@dataclass(frozen=True)
class HoldUp:
    """The command's process waits before its first checkpoint until a file is there."""

    file: Path

    def __call__(self) -> None:
        from streamctl.runs import StageWriter

        save = StageWriter.save_checkpoint

        def held_up(*arguments):
            while not self.file.exists():
                time.sleep(0.02)
            save(*arguments)

        StageWriter.save_checkpoint = held_up


def test_two_runs_of_everything_at_once_end_in_one_and_a_refusal(clean, commands, tmp_path):
    (copy, settings), go_on = before(clean, "pretrain", tmp_path), tmp_path / "go-on"
    words = words_of(copy, "pretrain", settings)
    first = commands.start(words, HoldUp(go_on), output="first")
    until(lambda: (copy / "pretrain" / "config.toml").exists() or not first.is_alive())
    second = commands.run(words)
    assert "another process is working on stage pretrain" in error_line(second)
    go_on.touch()
    assert commands.wait(first, "first").returncode == 0
    check_same(copy, "pretrain", clean[0])
