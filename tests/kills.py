"""SIGKILL at random instants in every stage of a run, resumed until it is complete.

    python tests/kills.py [--save] [--kills 100]

Two clean runs of every stage are made first; how long each stage took in the second, when nothing
is compiled any more, is the span in which its kills fall. Then runs with the same settings are
made in which every stage is killed ROUNDS times, each time at an instant drawn evenly over what
its span has left, and started again, until there have been `--kills` kills. They save a checkpoint
a second. The artifacts' hashes of every finished run must be the clean run's, and no stage may
have been set aside (`NAME.previous`), for nothing changed. Half as many kills fall into `data
prepare` of a csv alone, from its first instant to its last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from forks import SETTINGS, SHOP, Commands, hashes
from pyarrow import csv

from streamctl.files import file_hash
from streamctl.provenance import provenance
from streamctl.runs import RunDir

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kills.json"
ROUNDS = 4  # kills of a stage in one run
POLL_S = 0.002
LOG_ROWS = 400_000  # of the csv


@dataclass(frozen=True)
class Marked:
    """In the command's process: a checkpoint a second, and a file as soon as `stage` begins."""

    stage: str
    mark: Path

    def __call__(self) -> None:
        from streamctl import runs
        from streamctl.tokenizer import stage
        from streamctl.training import loop

        loop.CHECKPOINT_EVERY_S = stage.CHECKPOINT_S = 1.0
        begin = runs.RunDir.begin

        def begin_marked(run, name, *arguments, **options):
            if name == self.stage:
                self.mark.touch()
            return begin(run, name, *arguments, **options)

        runs.RunDir.begin = begin_marked


@dataclass
class Campaign:
    """Runs below a folder, and what became of the kills in them."""

    folder: Path

    def __post_init__(self) -> None:
        settings = self.folder / "settings.toml"
        settings.write_text(SETTINGS)
        self.commands = Commands(self.folder)
        self.work = ["run", "--config", str(settings), "--size", "tiny", "--seed", "0"]

    def words(self, run: Path) -> list[str]:
        """The command that goes on with a run."""
        started = RunDir(run).stage("data").complete
        return [*(self.work if started else SHOP.split()), "--run", str(run)]

    def finish(self, run: Path) -> None:
        """Go on with a run to its end."""
        while not RunDir(run).stage("eval").complete:
            answer = self.commands.run(self.words(run))
            if answer.returncode:
                raise SystemExit(f"{run.name} failed:\n{answer.stderr}")

    def kill(self, run: Path, stage: str, after_s: float) -> str | None:
        """Kill the run's command `after_s` seconds into a stage; the stage that it fell into.

        None if the command was faster.
        """
        mark = self.folder / "begun"
        mark.unlink(missing_ok=True)
        process = self.commands.start(self.words(run), Marked(stage, mark))
        while process.exitcode is None and not mark.exists():
            process.join(POLL_S)
        process.join(after_s)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        answer = self.commands.wait(process)
        if answer.returncode == -signal.SIGKILL:
            return stage_in_work(run)
        if answer.returncode:
            raise SystemExit(f"{run.name} failed:\n{answer.stderr}")
        return None


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill and resume runs below `folder` until there have been `kills` kills."""
    runs = Campaign(folder)
    cold, clean = RunDir(folder / "cold"), RunDir(folder / "clean")
    runs.finish(cold.path)
    runs.finish(clean.path)
    expected = hashes(clean)
    if hashes(cold) != expected:
        raise SystemExit("two clean runs differ")
    made = sorted(expected, key=lambda name: (clean.path / name / "manifest.json").stat().st_mtime)
    spans = {name: clean.stage(name).manifest["wall_s"] for name in made}
    killed: Counter[str] = Counter()
    mismatches, set_aside, number = [], [], 0
    while killed.total() < kills:
        run = RunDir(folder / f"killed-{number}")
        for stage, span in spans.items():
            for tried in range(ROUNDS):
                if killed.total() == kills or run.stage(stage).complete:
                    break
                chance = random.Random(f"{seed} {run.path.name} {stage} {tried}")
                after = chance.uniform(0, span * 0.75**tried)  # checkpoints keep some of the work
                if into := runs.kill(run.path, stage, after):
                    killed[into] += 1
        runs.finish(run.path)
        found = hashes(run)
        mismatches += [
            f"{run.path.name}/{stage}/{name}"
            for stage in {*expected, *found}
            for name in {*expected.get(stage, {}), *found.get(stage, {})}
            if expected.get(stage, {}).get(name) != found.get(stage, {}).get(name)
        ]
        set_aside += [str(path.relative_to(folder)) for path in run.path.rglob("*.previous")]
        number += 1
    return {
        "kills": killed.total(),
        "runs": number,
        "mismatches": len(mismatches),
        "differing": mismatches,
        "set_aside": set_aside,
        "killed_in": dict(sorted(killed.items())),
        "clean_run_s": spans,
        "artifacts": sum(map(len, expected.values())),
        "seed": seed,
    }


def prepares(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill `data prepare` of a csv at any instant and give the same command again."""
    folder.mkdir()
    chance, log = np.random.default_rng(seed), folder / "log.csv"
    columns = {
        "user_id": chance.integers(0, LOG_ROWS // 10, LOG_ROWS),
        "item_id": chance.integers(0, LOG_ROWS // 80, LOG_ROWS),
        "timestamp": np.sort(chance.integers(10**9, 2 * 10**9, LOG_ROWS)),
    }
    csv.write_csv(pa.table(columns), log)
    commands = Commands(folder)
    made, killed, differing = [], 0, []

    def prepare(run: Path, after_s: float | None = None) -> int:
        process = commands.start(["data", "prepare", str(log), "--run", str(run)])
        process.join(after_s)
        process.kill()
        answer = commands.wait(process)
        if answer.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"{run.name} failed:\n{answer.stderr}")
        return answer.returncode

    def files(run: Path) -> dict[str, str]:
        return {
            str(path.relative_to(run)): file_hash(path)
            for path in run.rglob("*")
            if path.is_file() and path.name != "manifest.json"  # which says when it was made
        }

    for name in ("cold", "clean"):
        began = time.monotonic()
        prepare(folder / name)
        span = time.monotonic() - began
        made.append(files(folder / name))
    if made[0] != made[1]:
        raise SystemExit("two clean runs differ")
    number = 0
    while killed < kills:
        run = folder / f"prepared-{number}"
        killed += prepare(run, chance.uniform(0, span)) != 0
        prepare(run)
        if files(run) != made[0] or not RunDir(run).stage("data").complete:
            differing.append(run.name)
        shutil.rmtree(run)
        number += 1
    return {"kills": killed, "differing": differing, "rows": LOG_ROWS, "clean_run_s": span}


def stage_in_work(run: Path) -> str:
    """The stage that a killed command had begun, or "between stages"."""
    for progress in sorted(run.rglob(".progress")):
        if not (progress.parent / "manifest.json").exists():
            return str(progress.parent.relative_to(run))
    return "between stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kills.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streamctl-kills-") as folder:
        found = campaign(Path(folder), options.kills, options.seed)
        found["prepare"] = prepares(Path(folder) / "csv", options.kills // 2, options.seed)
    wall = round(time.monotonic() - began, 1)
    text = json.dumps(
        {"name": "kills", **found, "wall_s": wall, "threads": 1, **provenance()}, indent=1
    )
    print(text)
    if options.save:
        RESULT.write_text(text + "\n")
    sys.exit(bool(found["mismatches"] or found["set_aside"] or found["prepare"]["differing"]))


if __name__ == "__main__":
    main()
