"""Two processes of one thread beside one process of two: what each stage gets through.

    python benchmarks/ranks.py --json [--save] [--size small] [--batch 512]

A synthetic shop goes through every stage under torchrun (gloo) and in a single process, the same
batches in both, with the same two cores. `ratio` is the throughput of two processes over that of
one; the goal is 0.9. Training stages log sequences a second, without imports and files; for the
others the stage's own wall time is taken. That both reach the same weights, to the last digits of
float64, and that a killed rank can be gone on from, is what tests/test_distributed.py checks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import receipts

from streamctl.provenance import provenance
from streamctl.runs import RunDir

GOAL = 0.9
TRAINED, OTHERS = ("pretrain", "sft", "rl"), ("annotate", "eval")
ORDER = ("pretrain", "annotate", "sft", "rl", "eval")
SHORT = """
[tokenize]
encoder = "tfidf"
codes = 64
levels = 3
epochs = 20
[pretrain]
epochs = 2
[annotate]
[sft]
rounds = 1
epochs = 1
[rl]
steps = 6
validate_every = 6
[eval]
methods = ["popularity", "stream_pt"]
bootstrap = 50
"""


def command(ranks: int, words: list[str]) -> float:
    """Run a command of streamctl in so many processes that share two threads; wall seconds."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        start += ["--"]
    began = time.monotonic()
    answer = subprocess.run(
        [*start, "streamctl", *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(2 // ranks)},
    )  # fmt: skip
    if answer.returncode:
        raise SystemExit(f"{' '.join(words)} in {ranks} processes failed:\n{answer.stderr}")
    return time.monotonic() - began


def throughput(run: RunDir, name: str) -> float:
    """Sequences a second, or the inverse of the seconds that the stage took."""
    stage = run.stage(name)
    if name in TRAINED:
        lines = (stage.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line).get("sequences_per_s") for line in lines]
        return float(np.median([rate for rate in rates if rate]))
    return 1 / stage.manifest["wall_s"]


def measure(folder: Path, size: str, batch: int, users: int) -> list[dict[str, object]]:
    """A row a stage. Both go on from the stages that the single process has made."""
    settings = folder / "settings.toml"
    settings.write_text(SHORT, encoding="utf-8")
    options = ["--config", str(settings)]
    for stage in TRAINED:
        options += ["--set", f"{stage}.batch={batch if stage != 'rl' else max(2, batch // 16)}"]
    options += ["--set", f"pretrain.size={size}"]
    one, two = RunDir(folder / "one"), RunDir(folder / "two")
    command(1, ["data", "synth", "--users", str(users), "--items", "500", "--run", str(one.path)])
    command(1, ["tokenize", *options, "--run", str(one.path)])
    rows = []
    for stage in ORDER:
        shutil.rmtree(two.path, ignore_errors=True)
        shutil.copytree(one.path, two.path)
        seconds = {
            "2": command(2, [stage, *options, "--run", str(two.path)]),
            "1": command(1, [stage, *options, "--run", str(one.path)]),
        }
        alone, shared = throughput(one, stage), throughput(two, stage)
        row = {"stage": stage, "ours": shared, "peer": alone, "ratio": shared / alone}
        unit = "sequences/s" if stage in TRAINED else "stages/s"
        rows.append(row | {"unit": unit, "goal": GOAL, "wall_s": seconds})
        print(f"{stage:10} {row['ratio']:.2f}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = receipts.parser(__doc__)
    parser.add_argument("--size", default="small", help="of the model")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--users", type=int, default=1000)
    chosen = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="streamctl-ranks-") as folder:
        rows = measure(Path(folder), chosen.size, chosen.batch, chosen.users)
    result = {"name": "ranks", "size": chosen.size, "batch": chosen.batch, "load": list(load)}
    result |= {"rows": rows, **provenance()}
    receipts.finish(result, chosen)


if __name__ == "__main__":
    main()
