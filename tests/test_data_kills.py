"""`data prepare` killed at any instant: run again it ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time

from forks import hashes

from benchmarks.prepare import write_log
from streamctl.runs import RunDir

KILLS = 3


def prepare(source, run):
    from streamctl.config import DataConfig
    from streamctl.data import prepare

    prepare(RunDir(run), DataConfig(source=str(source)))


def test_prepare_killed_at_random_instants_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = tmp_path / "interactions.csv"
    write_log(source, 40_000, seed=0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["streamctl.data.prepare", "pyarrow.parquet", "safetensors"])

    def start(run):
        process = context.Process(target=prepare, args=(source, run))
        process.start()
        return process

    for name in ("cold", "clean"):
        began = time.monotonic()
        start(tmp_path / name).join()
        span = time.monotonic() - began
    expected, chance = hashes(RunDir(tmp_path / "clean")), random.Random(0)
    killed = runs = 0
    while killed < KILLS:
        run = tmp_path / f"killed-{runs}"
        for _ in range(KILLS):
            process = start(run)
            process.join(chance.uniform(0, span))
            if process.exitcode is None:
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            assert not RunDir(run).stage("data").complete or hashes(RunDir(run)) == expected
        start(run).join()
        runs += 1
        assert hashes(RunDir(run)) == expected
    assert not list(tmp_path.rglob("*.previous"))
