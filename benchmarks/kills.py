"""SIGKILL at random instants in every stage of a run, resumed until it is complete.

    python benchmarks/kills.py --json --save [--folder FOLDER]

Two clean runs of every stage are made first; how long each stage took in the second, when nothing
is compiled any more, is the span in which its kills fall. Then runs with the same settings are
made in which every stage is killed ROUNDS times, each time at an instant drawn evenly over what
its span has left, and started again, until there have been `--kills` kills. They save a checkpoint
a second. The artifacts' hashes of every finished run must be the clean run's, and no stage may
have been set aside (`NAME.previous`), for nothing changed. With `--folder`, a campaign that was
broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))
from forks import SETTINGS, SHOP, Commands, hashes

from streamctl.files import atomic_file, read_json
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
# Every row that has a checkpoint; the wide beam, which has none, could outlast the time between
# two kills for ever.
ROWS = "eval.methods=popularity,tiger,stream_pt,stream_sft,stream_rl,no_thinking,random_thinking"
ROUNDS = 4  # kills of a stage in one run
POLL_S = 0.002


@dataclass(frozen=True)
class Marked:
    """In the command's process: a checkpoint a second, and a file as soon as `stage` begins."""

    stage: str
    mark: Path

    def __call__(self) -> None:
        from streamctl import runs
        from streamctl.tokenizer import stage
        from streamctl.training import loop, rl

        loop.CHECKPOINT_EVERY_S = rl.CHECKPOINT_EVERY_S = stage.CHECKPOINT_S = 1.0
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
        self.work += ["--set", ROWS]

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


@dataclass
class Progress:
    """What a campaign has done so far; `kills.json` in its folder."""

    killed: dict[str, int] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    runs: int = 0
    rounds: dict[str, int] = field(default_factory=dict)  # kills tried in the present run's stages
    wall_s: float = 0.0


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill and resume runs below `folder` until there have been `kills` kills."""
    began = time.monotonic()
    runs = Campaign(folder)
    cold, clean = RunDir(folder / "cold"), RunDir(folder / "clean")
    runs.finish(cold.path)
    runs.finish(clean.path)
    expected = hashes(clean)
    if hashes(cold) != expected:
        raise SystemExit("two clean runs differ")
    made = sorted(expected, key=lambda name: (clean.path / name / "manifest.json").stat().st_mtime)
    spans = {name: clean.stage(name).manifest["wall_s"] for name in made}
    file = folder / "kills.json"
    done = Progress(**read_json(file)) if file.exists() else Progress()
    earlier_s = done.wall_s

    def save() -> None:
        done.wall_s = earlier_s + time.monotonic() - began
        with atomic_file(file) as path:
            path.write_text(json.dumps(asdict(done), indent=1))

    while sum(done.killed.values()) < kills:
        run = RunDir(folder / f"killed-{done.runs}")
        for stage, span in spans.items():
            while (tried := done.rounds.get(stage, 0)) < ROUNDS:
                if sum(done.killed.values()) == kills or run.stage(stage).complete:
                    break
                chance = random.Random(f"{seed} {run.path.name} {stage} {tried}")
                after = chance.uniform(0, span * 0.75**tried)  # checkpoints keep some of the work
                if into := runs.kill(run.path, stage, after):
                    done.killed[into] = done.killed.get(into, 0) + 1
                done.rounds[stage] = tried + 1
                save()
        runs.finish(run.path)
        found = hashes(run)
        done.mismatches += [
            f"{run.path.name}/{stage}/{name}"
            for stage in {*expected, *found}
            for name in {*expected.get(stage, {}), *found.get(stage, {})}
            if expected.get(stage, {}).get(name) != found.get(stage, {}).get(name)
        ]
        done.set_aside += [str(path.relative_to(folder)) for path in run.path.rglob("*.previous")]
        done.runs += 1
        done.rounds = {}
        save()
    return {
        "kills": sum(done.killed.values()),
        "runs": done.runs,
        "mismatches": len(done.mismatches),
        "differing": done.mismatches,
        "set_aside": done.set_aside,
        "killed_in": dict(sorted(done.killed.items())),
        "clean_run_s": spans,
        "artifacts": sum(map(len, expected.values())),
        "seed": seed,
        "wall_s": round(done.wall_s, 1),
    }


def _prepare(source: Path, run: Path) -> None:
    from streamctl.config import DataConfig
    from streamctl.data import prepare

    prepare(RunDir(run), DataConfig(source=str(source)))


def prepare_campaign(folder: Path, kills: int, seed: int, interactions: int) -> dict[str, object]:
    """Kill `data prepare` at random instants, go on, and compare with a run left alone."""
    from benchmarks.prepare import write_log

    began = time.monotonic()
    source, temporary = folder / "interactions.csv", folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    write_log(source, interactions, seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["streamctl.data.prepare", "pyarrow.parquet", "safetensors"])

    def start(run: Path):
        process = context.Process(target=_prepare, args=(source, run))
        process.start()
        return process

    spans = []
    for name in ("cold", "clean"):
        before = time.monotonic()
        start(folder / name).join()
        spans.append(time.monotonic() - before)
    expected = hashes(RunDir(folder / "clean"))
    chance = random.Random(seed)
    killed = half = runs = 0
    mismatches = []
    while killed < kills:
        run, ends = folder / f"killed-{runs}", 0
        for _ in range(3):
            process = start(run)
            process.join(chance.uniform(0, spans[1]))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            ends += process.exitcode == -signal.SIGKILL
            half += RunDir(run).stage("data").complete and hashes(RunDir(run)) != expected
        start(run).join()
        killed += ends
        runs += 1
        if hashes(RunDir(run)) != expected:
            mismatches.append(run.name)
    return {
        "kills": killed,
        "runs": runs,
        "mismatches": len(mismatches) + half,
        "differing": mismatches,
        "set_aside": [str(path) for path in folder.rglob("*.previous")],
        "interactions": interactions,
        "clean_run_s": round(spans[1], 2),
        "seed": seed,
        "wall_s": round(time.monotonic() - began, 1),
    }


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
    parser.add_argument("--prepare", action="store_true", help="`data prepare` of a csv alone")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with them")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/kills.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="streamctl-kills-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.prepare:
            found = prepare_campaign(folder, options.kills, options.seed, interactions=400_000)
        else:
            found = campaign(folder, options.kills, options.seed)
        name = "kills-prepare" if options.prepare else "kills"
        result = {"name": name, **found}
    result |= {"threads": 1, **provenance()}
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
    sys.exit(1 if result["mismatches"] or result["set_aside"] else 0)


if __name__ == "__main__":
    main()
