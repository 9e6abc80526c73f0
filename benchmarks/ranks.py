"""One process against several: the same losses, the same metrics, and what a killed rank leaves.

    python benchmarks/ranks.py --json --save

Each training stage runs in one process and in two (gloo), with the same global batches, in fp32
and without dropout, whose masks belong to a rank; the losses of the first 50 steps are compared.
Then two ranks are started, one is killed with SIGKILL, and one process alone continues from what
they left. `eval` must give identical metrics. Throughputs are of this machine and this small shop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.forks import SETTINGS, SHOP, Answer, Commands
from streamctl.runs import RunDir, provenance

RESULTS = Path(__file__).parent / "results"
STEPS = 50
TOLERANCE = 1e-5
LONGER = [
    *("pretrain.epochs=4", "pretrain.dropout=0", "pretrain.batch=16"),
    *("annotate.fit_epochs=4", "annotate.batch=16"),
    *("sft.epochs=2", "sft.dropout=0", "sft.batch=16"),
    *("rl.steps=50", "rl.validate_every=25", "rl.patience=0"),
]
TRAINED = ("pretrain", "annotate", "sft", "rl")


@dataclass(frozen=True)
class Rank:
    """What a process of a job does before its command: environment, fp32, a record of its losses.

    Attributes:
        kill_at: the step after which rank `kill_rank` kills itself, every step being saved.
    """

    rank: int
    count: int
    port: int
    losses: Path
    kill_at: int = 0
    kill_rank: int = 1

    def __call__(self) -> None:
        from streamctl import device
        from streamctl.training import loop, rl

        if self.count > 1:
            os.environ |= {
                "RANK": str(self.rank),
                "LOCAL_RANK": str(self.rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
        device.has_bf16 = lambda where: False
        add, step = loop._Trainer.add, rl.Trainer.step
        if self.kill_at:
            loop.CHECKPOINT_EVERY_S = 0.0

        def recorded(trainer, metrics, weight):
            self._record(float(metrics["loss"]))
            add(trainer, metrics, weight)

        def stepped(*arguments, **options):
            metrics = step(*arguments, **options)
            self._record(metrics["loss"])
            return metrics

        loop._Trainer.add, rl.Trainer.step = recorded, stepped

    def _record(self, loss: float) -> None:
        path = self.losses.with_suffix(f".{self.rank}")
        with open(path, "a") as handle:
            handle.write(f"{loss!r}\n")
        steps = len(path.read_text().splitlines())
        if self.rank == self.kill_rank and steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def recorded(self) -> list[float]:
        """The losses of this rank's steps."""
        return [float(line) for line in self.losses.with_suffix(f".{self.rank}").open()]


def job(
    commands: Commands, words: list[str], count: int, losses: Path, **kill: int
) -> tuple[list[Answer], list[float]]:
    """Run a command in `count` processes; how each ended, and the losses that rank 0 saw."""
    with socket.socket() as free:
        # Held until the end, so that no one else is given the port; rank 0 may listen on it too.
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        members = [Rank(rank, count, port, losses, **kill) for rank in range(count)]
        processes = [commands.start(words, each, f"rank-{each.rank}") for each in members]
        answers = [commands.wait(one, f"rank-{number}") for number, one in enumerate(processes)]
    recorded = losses.with_suffix(".0").exists()
    return answers, members[0].recorded() if recorded else []


def difference(one: list[float], other: list[float]) -> dict[str, float]:
    """Largest absolute difference of two loss curves over the first steps, and the largest loss."""
    pairs = list(zip(one[:STEPS], other[:STEPS], strict=True))
    return {
        "steps": len(pairs),
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "largest_relative": max(abs(a - b) / max(abs(a), 1.0) for a, b in pairs),
        "first_loss": pairs[0][0],
        "last_loss": pairs[-1][0],
    }


def measure(folder: Path) -> dict[str, object]:
    """Every comparison, in runs below `folder`."""
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    commands = Commands(folder)
    options = ["--config", str(settings)]
    for text in LONGER:
        options += ["--set", text]

    def go(stage: str, run: Path, count: int, **kill: int):
        name = folder / f"{stage}-{run.name}-{count}-{len(kill)}"
        began = time.monotonic()
        answers, losses = job(commands, [stage, *options, "--run", str(run)], count, name, **kill)
        if not kill and any(answer.returncode for answer in answers):
            raise SystemExit(f"{stage} in {count} processes failed:\n{answers}")
        return answers, losses, time.monotonic() - began

    one, two = folder / "one", folder / "two"
    for words in (SHOP.split(), ["tokenize", "--config", str(settings)]):
        answer = commands.run([*words, "--run", str(one)])
        if answer.returncode:
            raise SystemExit(answer.stderr)
    rows = []
    for stage in TRAINED:
        shutil.copytree(one, two)
        killed = folder / "killed"
        shutil.copytree(one, killed)
        _, alone, alone_s = go(stage, one, 1)
        _, shared, shared_s = go(stage, two, 2)
        row = {"stage": stage, **difference(alone, shared)}
        row |= {"seconds": {"1": round(alone_s, 2), "2": round(shared_s, 2)}}
        if stage in ("pretrain", "sft"):
            answers, _, _ = go(stage, killed, 2, kill_at=20)
            resumable = (killed / stage / ".progress" / "checkpoint.safetensors").exists()
            _, rest, _ = go(stage, killed, 1)
            row["killed"] = {
                "exit_codes": [answer.returncode for answer in answers],
                "message": answers[0].stderr.strip().splitlines()[-1],
                "resumable": resumable,
                "continued_with": 1,
                "largest_difference": max(
                    abs(a - b) for a, b in zip(alone[len(alone) - len(rest) :], rest, strict=True)
                ),
            }
        rows.append(row)
        shutil.rmtree(two)
        shutil.rmtree(killed)
    shutil.copytree(one, two)
    go("eval", one, 1)
    go("eval", two, 2)
    metrics = [RunDir(run).stage("eval").json("metrics.json") for run in (one, two)]
    same = metrics[0] == metrics[1]
    hashes = [RunDir(run).stage("eval").manifest["artifacts"] for run in (one, two)]
    return {
        "rows": rows,
        "eval": {"identical": same, "identical_artifacts": hashes[0] == hashes[1]},
        "within": all(row["largest_relative"] <= TOLERANCE for row in rows) and same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/ranks.json")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streamctl-ranks-") as folder:
        result = {"name": "ranks", "tolerance": TOLERANCE, **measure(Path(folder))}
    result |= {"threads": 1, "wall_s": round(time.monotonic() - began, 1), **provenance()}
    if chosen.save:
        (RESULTS / "ranks.json").write_text(json.dumps(result, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(result, indent=1))
    sys.exit(0 if result["within"] else 1)


if __name__ == "__main__":
    main()
