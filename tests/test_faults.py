"""A full disk, a read-only one and a flipped byte: one line that names the file, nothing half."""

from __future__ import annotations

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
from forks import SETTINGS, SHOP, Commands, hashes

from streamctl.runs import RunDir

STAGES = {
    "data": SHOP,
    "tokenizer": "tokenize",
    "pretrain": "pretrain --set pretrain.epochs=1",
    "annotate": "annotate --set annotate.fit_epochs=0",
    "eval": "eval --methods popularity",
}
ROOM_FOR_WORDS = 1500  # bytes that the error itself may take, on stderr
pytestmark = pytest.mark.xdist_group("faults")


@dataclass(frozen=True)
class SmallFiles:
    """No file of this process grows beyond `size` bytes: the disk is full in the middle of it."""

    size: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Commands, settings, and a run with every stage complete."""
    folder = tmp_path_factory.mktemp("shop")
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    commands = Commands(folder)
    for stage in STAGES:
        answer = commands.run(words_of(stage, folder / "run", settings))
        assert answer.returncode == 0, answer.stderr
    return commands, settings, folder / "run"


def words_of(stage, run, settings):
    words = [*STAGES[stage].split(), "--run", str(run)]
    return words if stage == "data" else [*words, "--config", str(settings)]


def before(run, stage, copy):
    """A copy of a run as it was before `stage`."""
    names = list(STAGES)
    copy.mkdir(parents=True, exist_ok=True)
    for name in names[: names.index(stage)]:
        shutil.copytree(run / name, copy / name)
    return copy


def error_line(answer):
    """The one line of an expected failure."""
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, answer.stderr
    return errors[0]


def files_of(run):
    return {
        path.relative_to(run)
        for path in run.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def check_nothing_half_written(run, stage):
    """No stage is complete that is not whole, and every file under a final name is whole."""
    assert not RunDir(run).stage(stage).complete
    assert not list(run.rglob("*.part"))


@pytest.mark.parametrize("stage", ["data", "tokenizer", "pretrain", "annotate"])
def test_a_disk_that_fills_at_any_file_is_named_and_the_stage_continues(shop, tmp_path, stage):
    commands, settings, clean = shop
    sizes = {
        path.stat().st_size
        for path in (clean / stage).rglob("*")
        if path.is_file() and path.suffix in (".npy", ".parquet", ".safetensors", ".json", ".toml")
    }
    copy = before(clean, stage, tmp_path / "run")
    # One byte short of the largest file, and of some smaller ones.
    limits = sorted(size - 1 for size in sizes if size > ROOM_FOR_WORDS)
    for limit in {limits[0], limits[len(limits) // 2], limits[-1]}:
        answer = commands.run(words_of(stage, copy, settings), SmallFiles(limit))
        line = error_line(answer)
        assert str(copy) in line
        assert "cannot be written" in line
        check_nothing_half_written(copy, stage)
    answer = commands.run(words_of(stage, copy, settings))
    assert answer.returncode == 0, answer.stderr
    assert hashes(RunDir(copy))[stage] == hashes(RunDir(clean))[stage]


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own, where this machine lets us: `disk(kilobytes) -> folder`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", *options, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not (done.returncode and "remount" in options[1]), done.stderr
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")

    yield folder, mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_small_disk_fills_wherever_it_likes_and_grows_again(shop, disk):
    commands, settings, clean = shop
    folder, mount = disk
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs")
    run, filled, size = folder / "run", 0, 16
    for stage in ("data", "tokenizer"):
        while True:
            answer = commands.run(words_of(stage, run, settings))
            if answer.returncode == 0:
                break
            filled += 1
            assert "No space left" in error_line(answer) or "requested and" in answer.stderr
            check_nothing_half_written(run, stage)
            size *= 2
            assert size < 2**16
            mount("-o", f"remount,size={size}k")
    assert filled >= 4
    mount("-o", "remount,size=64m")
    for stage in ("data", "tokenizer"):
        assert hashes(RunDir(run))[stage] == hashes(RunDir(clean))[stage]


def test_a_read_only_disk_is_named_by_every_stage(shop, disk):
    commands, settings, clean = shop
    folder, mount = disk
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    for stage in STAGES:
        run = before(clean, stage, folder / stage.replace("/", "-"))
        known = files_of(run)
        mount("-o", "remount,ro")
        line = error_line(commands.run(words_of(stage, run, settings)))
        mount("-o", "remount,rw")
        assert "Read-only file system" in line and str(run) in line
        assert files_of(run) == known


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(shop, tmp_path):
    commands, settings, clean = shop
    run = before(clean, "tokenizer", tmp_path / "run")
    run.chmod(0o555)
    line = error_line(commands.run(words_of("tokenizer", run, settings)))
    run.chmod(0o755)
    assert "Permission denied" in line and str(run) in line


def test_a_flipped_byte_in_any_artifact_is_noticed_and_named(shop, tmp_path):
    _, _, clean = shop
    copy = tmp_path / "run"
    shutil.copytree(clean, copy)
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


def test_a_flipped_byte_in_a_manifest_is_noticed(shop, tmp_path):
    _, _, clean = shop
    copy = tmp_path / "run"
    shutil.copytree(clean, copy)
    path = copy / "data" / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if whole[place : place + 1].isspace():
            continue
        with pytest.raises(Exception, match=r"manifest\.json"):
            RunDir(copy).require("data")


def test_a_damaged_stage_is_not_called_complete(shop, tmp_path):
    commands, settings, clean = shop
    copy = tmp_path / "run"
    shutil.copytree(clean, copy)
    path = copy / "tokenizer" / "codes.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    line = error_line(commands.run(words_of("tokenizer", copy, settings)))
    assert str(path) in line and "--force" in line


def test_a_damaged_checkpoint_is_named(shop, tmp_path):
    commands, settings, clean = shop
    copy = before(clean, "pretrain", tmp_path / "run")
    words = words_of("pretrain", copy, settings)
    killed = commands.run(words, kill_after_the_first_epoch)
    assert killed.returncode == -signal.SIGKILL
    path = copy / "pretrain" / ".progress" / "checkpoint.safetensors"
    whole = path.read_bytes()
    for place in (3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        line = error_line(commands.run(words))
        assert f"{path}: the checkpoint is damaged" in line
    path.unlink()
    assert commands.run(words).returncode == 0
    assert hashes(RunDir(copy))["pretrain"] == hashes(RunDir(clean))["pretrain"]


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


def test_two_runs_of_everything_at_once_end_in_one_and_a_refusal(shop, tmp_path):
    commands, settings, clean = shop
    copy, go_on = before(clean, "pretrain", tmp_path / "run"), tmp_path / "go-on"
    words = words_of("pretrain", copy, settings)
    first = commands.start(words, HoldUp(go_on), output="first")
    until(lambda: (copy / "pretrain" / "config.toml").exists() or not first.is_alive())
    second = commands.run(words)
    assert "another process is working on stage pretrain" in error_line(second)
    go_on.touch()
    assert commands.wait(first, "first").returncode == 0
    assert hashes(RunDir(copy))["pretrain"] == hashes(RunDir(clean))["pretrain"]
