"""Shared fixtures: where the real data lies, and the console command in a subprocess."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# Results are compared to the last bit in many places: the faster way, which is found by measuring,
# is chosen where that is what is tested.
os.environ.setdefault("STREAMCTL_DECODE", "packed")
# How long an example takes says what else the machine does, not whether the property holds.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def until(holds: Callable[[], object], seconds: float = 300) -> None:
    """Wait for a condition; a machine that does much else at the same time is given long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def real_data(name: str) -> Path:
    """Folder of a real data set, or skip with the reason."""
    base = Path(os.environ.get("STREAMCTL_DATA", ROOT.parent / "shared" / "data"))
    if not (base / name).is_dir():
        pytest.skip(f"no real data at {base / name} (set STREAMCTL_DATA)")
    return base / name


@pytest.fixture(autouse=True)
def environment():
    """What a command called in this process told it (STREAMCTL_COMPILE) ends with the test."""
    before = {name: value for name, value in os.environ.items() if name.startswith("STREAMCTL_")}
    yield
    for name in [name for name in os.environ if name.startswith("STREAMCTL_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def streamctl():
    """Run the console command: `streamctl("data", "synth", ...)` -> CompletedProcess."""

    def call(*words: object, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "streamctl", *map(str, words)]
        environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=environment, **options
        )

    return call


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """Console commands in forks of a process that has imported everything."""
    from forks import Commands

    return Commands(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def clean(tmp_path_factory, commands):
    """A run of every stage in which nothing was interrupted, and its settings.

    Its tests are of the xdist group "resume", so that it is made once.
    """
    from whole_run import STAGES, whole

    return whole(commands, tmp_path_factory.mktemp("clean"), STAGES)


@pytest.fixture(scope="session")
def letter(tmp_path_factory, commands):
    """The same with the paper's thoughts, up to RL."""
    from whole_run import STAGES, whole

    stages = list(STAGES)[: list(STAGES).index("rl") + 1]
    return whole(commands, tmp_path_factory.mktemp("letter"), stages, 'thoughts = "vocabulary"')


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs to serve, side by side, `first` and `second`, with different weights."""
    from serving_run import KEYS, make_run

    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first", seed=0)
    make_run(folder / "second", seed=1)
    (folder / "keys").write_text(f"read {KEYS['read']}\nwrite {KEYS['write']}\n")
    return folder


@pytest.fixture
def own(runs, tmp_path):
    """A copy of the runs that a test may change."""
    return shutil.copytree(runs, tmp_path / "runs")
