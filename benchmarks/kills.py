"""SIGKILL at random instants through a whole run, resumed until it is complete.

    python benchmarks/kills.py --json --save

A clean run of every stage is made first. Then runs with the same settings are killed at random
instants, a fifteenth of the clean run's time apart at the most, and started again, until there
have been `--kills` kills. They save a checkpoint a second. The artifacts' hashes of every finished
run must be the clean run's.

Commands run in forks of a server that has imported everything: what is killed is the work, not
the seconds of imports before it. tests/test_resume.py uses the same forks.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
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
# Every row that has a checkpoint; the wide beam, which has none, could outlast the time between
# two kills for ever.
ROWS = "eval.methods=popularity,tiger,stream_pt,stream_sft,stream_rl,no_thinking,random_thinking"
SHOP = "data synth --users 40 --items 40 --seed 1"
_PRELOAD = ["streamctl.pipeline", "streamctl.evaluation.stage", "streamctl.training.rl",
            "streamctl.tokenizer.stage", "streamctl.baselines.train", "streamctl.training.sft",
            "streamctl.training.pretrain", "streamctl.cli", "streamctl.kernels.cpu_quantize",
            "streamctl.kernels.trie_topk.numba_cpu", "faiss", "matplotlib.backends.backend_agg",
            "sklearn.decomposition", "sklearn.feature_extraction.text", "torch._dynamo",
            "typer.rich_utils"]  # fmt: skip


def command(words: Sequence[str], output: Path, arm: Callable[[], None] | None) -> None:
    """The console command in this process: stdout to OUTPUT.out, stderr to OUTPUT.err."""
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    import torch

    from streamctl.cli import main

    torch.set_num_threads(1)
    if arm is not None:
        arm()
    sys.argv = ["streamctl", *words]
    main()


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code (-9 when it was killed) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs console commands in forks; outputs go to files in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOAD)

    def start(
        self, words: Sequence[str], arm: Callable[[], None] | None = None, output: str = "command"
    ):
        """A process of the command; `arm` is called in it first, `output` names its files."""
        process = self.context.Process(target=command, args=(words, self.folder / output, arm))
        process.start()
        return process

    def wait(self, process, output: str = "command") -> Answer:
        process.join()
        texts = ((self.folder / f"{output}.{kind}").read_text() for kind in ("out", "err"))
        return Answer(process.exitcode, *texts)

    def run(self, words: Sequence[str], arm: Callable[[], None] | None = None) -> Answer:
        """Run to the end. `arm` is called in the fork before the command."""
        return self.wait(self.start(words, arm))


def hashes(run: RunDir) -> dict[str, dict[str, str]]:
    """Every complete stage's artifacts and their hashes."""
    found = {}
    for path in sorted(run.path.rglob("manifest.json")):
        name = str(path.parent.relative_to(run.path))
        found[name] = run.stage(name).manifest["artifacts"]
    return found


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill and resume runs below `folder` until there have been `kills` kills."""
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    commands = Commands(folder)
    work = ["run", "--config", str(settings), "--size", "tiny", "--seed", "0", "--set", ROWS]

    def finish(run: Path) -> float:
        began = time.monotonic()
        for words in ([*SHOP.split(), "--run", str(run)], [*work, "--run", str(run)]):
            answer = commands.run(words)
            if answer.returncode:
                raise SystemExit(f"{' '.join(words)} failed:\n{answer.stderr}")
        return time.monotonic() - began

    took = finish(folder / "clean")
    expected = hashes(RunDir(folder / "clean"))
    chance = random.Random(seed)
    done, runs, mismatches, stages = 0, 0, [], {}
    while done < kills:
        run = folder / f"killed-{runs}"
        while done < kills:
            words = [*work, "--run", str(run)]
            if not RunDir(run).stage("data").complete:
                words = [*SHOP.split(), "--run", str(run)]
            process = commands.start(words, save_often)
            process.join(chance.uniform(0, took / 15))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            answer = commands.wait(process)
            if answer.returncode == -signal.SIGKILL:
                done += 1
                stage = stage_in_work(run)
                stages[stage] = stages.get(stage, 0) + 1
            elif answer.returncode:
                raise SystemExit(f"{' '.join(words)} failed:\n{answer.stderr}")
            elif RunDir(run).stage("eval").complete:
                break
        finish(run)
        found = hashes(RunDir(run))
        mismatches += [
            f"{run.name}/{stage}/{name}"
            for stage in {*expected, *found}
            for name in {*expected.get(stage, {}), *found.get(stage, {})}
            if expected.get(stage, {}).get(name) != found.get(stage, {}).get(name)
        ]
        runs += 1
    return {
        "kills": done,
        "runs": runs,
        "mismatches": len(mismatches),
        "differing": mismatches,
        "killed_in": dict(sorted(stages.items())),
        "artifacts": sum(map(len, expected.values())),
        "clean_run_s": round(took, 1),
        "seed": seed,
    }


def save_often() -> None:
    """A checkpoint a second instead of a minute: kills fall between all of them."""
    from streamctl.tokenizer import stage
    from streamctl.training import loop, rl

    loop.CHECKPOINT_EVERY_S = rl.CHECKPOINT_EVERY_S = stage.CHECKPOINT_S = 1.0


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
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/kills.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streamctl-kills-") as folder:
        result = {"name": "kills", **campaign(Path(folder), options.kills, options.seed)}
    result |= {"threads": 1, "wall_s": round(time.monotonic() - began, 1), **provenance()}
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
    sys.exit(1 if result["mismatches"] else 0)


if __name__ == "__main__":
    main()
