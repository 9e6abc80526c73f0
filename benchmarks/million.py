"""Every stage of a run on a shop of a million items: minutes, memory and what it reached.

    python benchmarks/million.py --json [--save] [--items 1000000] [--users 1120000]

A synthetic shop (about nine interactions a user) goes through `data synth` and `streamctl run` at
size tiny, each model for one epoch of the latest training target of each user: what is measured is
that it goes through, in which time and memory, not how good it is. Memory and processor time of a
stage are what the process holds at most (resident) and spends while the stage is made, read twice a
second. With `--folder`, a run that was broken off goes on; what was measured is kept there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import receipts

from streamctl.files import read_json
from streamctl.pipeline import STEPS
from streamctl.provenance import provenance
from streamctl.runs import RunDir

SETTINGS = (
    "tokenize.encoder=tfidf", "tokenize.epochs=2", "pretrain.epochs=1", "pretrain.positions=1",
    "pretrain.hops=16,16,16,8,16,0", "annotate.positions=1", "annotate.fit_epochs=0",
    "sft.epochs=1", "rl.steps=10", "rl.validate_every=5", "baseline.epochs=1",
    "eval.users=1000", "eval.methods=transitions,stream_sft",
)  # fmt: skip
KEPT = "spent.json"
ORDER = ("data", *(name for name in STEPS if "no_thinking" not in name), "eval")
Spent = dict[str, dict[str, float]]  # stage -> cpu_s, peak_gb


def usage(pid: int) -> tuple[float, float]:
    """Processor seconds that a process has spent, and the gigabytes that it holds now."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0, 0.0
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def watch(run: RunDir, words: list[str], spent: Spent) -> None:
    """Run a command; `spent` gets what it needs while each stage is the first unfinished one."""
    command = [sys.executable, "-m", "streamctl", *words, "--run", str(run.path)]
    with subprocess.Popen(command) as process:
        before = 0.0
        while process.poll() is None:
            stage = next((name for name in ORDER if not run.stage(name).complete), ORDER[-1])
            seconds, held = usage(process.pid)
            row = spent.setdefault(stage, {"cpu_s": 0.0, "peak_gb": 0.0})
            row["cpu_s"] += max(seconds - before, 0.0)
            row["peak_gb"] = max(row["peak_gb"], held)
            before = max(seconds, before)
            (run.path / KEPT).write_text(json.dumps(spent))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"`streamctl {words[0]}` ended with {process.returncode}")


def measure(folder: Path, users: int, items: int) -> dict:
    run = RunDir(folder / "million")
    run.path.mkdir(parents=True, exist_ok=True)
    spent: Spent = read_json(run.path / KEPT) if (run.path / KEPT).exists() else {}
    if not run.stage("data").complete:
        watch(run, ["data", "synth", "--users", str(users), "--items", str(items)], spent)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    watch(run, ["run", "--size", "tiny", *settings], spent)
    stages = [
        {
            "stage": name,
            "minutes": round(run.stage(name).manifest["wall_s"] / 60, 2),
            "cpu_minutes": round(spent[name]["cpu_s"] / 60, 2),
            "peak_gb": round(spent[name]["peak_gb"], 2),
        }
        for name in ORDER
    ]
    statistics = run.stage("data").json("statistics.json")
    return {
        "name": "million",
        **{name: statistics[name] for name in ("users", "items", "interactions")},
        "peak_gb": max(row["peak_gb"] for row in stages),
        "minutes": round(sum(row["minutes"] for row in stages), 1),
        "cpu_minutes": round(sum(row["cpu_minutes"] for row in stages), 1),
        "stages": stages,
        "settings": list(SETTINGS),
        "tokenizer": run.stage("tokenizer").json("report.json"),
        "rows": {
            name: {key: row[key] for key in ("ndcg@10", "recall@10")}
            for name, row in run.stage("eval").json("metrics.json")["methods"].items()
        },
        **provenance(),
    }


def main() -> None:
    parser = receipts.parser(__doc__)
    parser.add_argument("--users", type=int, default=1_120_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the run here, and go on with it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options.folder or Path(scratch), options.users, options.items)
    receipts.finish(result, options)


if __name__ == "__main__":
    main()
