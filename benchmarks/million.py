"""Every stage of a run on a shop of a million items: minutes, memory and what it reached.

    python benchmarks/million.py --json [--save] [--items 1000000] [--users 1120000]

A synthetic shop (about nine interactions a user) goes through `data synth` and `streamctl run` at
size tiny, each model for one epoch of the latest training targets of each user: what is measured is
that it goes through, in which time and memory, not how good it is. The memory of a stage is the
most that the process holds while the stage is made (resident, read twice a second). With
`--folder`, a run that was broken off goes on; minutes and memory of finished stages are kept there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from streamctl.files import read_json
from streamctl.pipeline import STEPS
from streamctl.runs import RunDir, provenance

RESULT = Path(__file__).parent / "results" / "million.json"
SETTINGS = (
    "tokenize.encoder=tfidf", "tokenize.epochs=2", "pretrain.epochs=1", "pretrain.positions=1",
    "annotate.positions=1", "sft.epochs=1", "rl.steps=10", "rl.validate_every=5",
    "baseline.epochs=1", "eval.users=2000",
)  # fmt: skip
ORDER = ("data", *(name for name in STEPS if "no_thinking" not in name), "eval")


def resident_gb(pid: int) -> float:
    """Gigabytes of memory that a process holds now; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def watch(run: RunDir, words: list[str], peaks: dict[str, float]) -> None:
    """Run a command; `peaks` gets the most memory while each stage was the first unfinished one."""
    command = [sys.executable, "-m", "streamctl", *words, "--run", str(run.path)]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            stage = next((name for name in ORDER if not run.stage(name).complete), ORDER[-1])
            peaks[stage] = max(peaks.get(stage, 0.0), resident_gb(process.pid))
            (run.path / "peaks.json").write_text(json.dumps(peaks))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"`streamctl {words[0]}` ended with {process.returncode}")


def measure(folder: Path, users: int, items: int) -> dict:
    run = RunDir(folder / "million")
    run.path.mkdir(parents=True, exist_ok=True)
    kept = run.path / "peaks.json"
    peaks = read_json(kept) if kept.exists() else {}
    if not run.stage("data").complete:
        watch(run, ["data", "synth", "--users", str(users), "--items", str(items)], peaks)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    watch(run, ["run", "--size", "tiny", *settings], peaks)
    stages = [
        {
            "stage": name,
            "minutes": round(run.stage(name).manifest["wall_s"] / 60, 2),
            "peak_gb": round(peaks[name], 2),
        }
        for name in ORDER
    ]
    statistics = run.stage("data").json("statistics.json")
    return {
        "name": "million",
        **{name: statistics[name] for name in ("users", "items", "interactions")},
        "peak_gb": max(row["peak_gb"] for row in stages),
        "minutes": round(sum(row["minutes"] for row in stages), 1),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_120_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the run here, and go on with it")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/million.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options.folder or Path(scratch), options.users, options.items)
    text = json.dumps(result, indent=1)
    if options.save:
        RESULT.write_text(text + "\n")
    if options.json:
        print(text)


if __name__ == "__main__":
    main()
