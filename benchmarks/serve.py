"""The HTTP server under load, beside transformers' generate behind FastAPI on the same weights.

    python benchmarks/serve.py --json [--save] [--seconds 20]
    python benchmarks/serve.py --json [--save] --memory-minutes 10

Starts `streamctl serve` on loopback with a model of the paper's size (random weights: the work is
the same), compiled, and drives it with wrk (`apt-get install wrk`). wrk's connections pause for
exponential times, so that many of them arrive like a Poisson process; server and load share the
machine.
latency/*: single requests that arrive at LOAD of what one connection can ask for; beside it, as
`alone`, that connection, which is also how the peer is compared. saturation: four times what the
server can take; a refusal (429) is no error, everything else that is not an answer is one, a
deadline (504) too, for no request names its own. The peer runs beam search with a trie's
`prefix_allowed_tokens_fn`, one request at a time, without thinking. The memory run is a
call of its own, whose row joins the receipt: it needs minutes, not quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers

from streamctl.provenance import provenance
from streamctl.runs import RunDir

HERE = Path(__file__).resolve().parent
RECEIPT = HERE / "results" / "serve.json"
THINK, BEAM, K, DEADLINE_MS = 64, 20, 10, 1000
CONNECTIONS = 64
LOAD = 0.25  # share of the capacity at which single requests are timed
MORE = 4  # times the peer's requests a second
SAMPLE_S = 10  # between two looks at the memory
FLAT_MB = 10  # between the second fifth of the time and the last
GOALS = {"latency/l0": (25, 80), "latency/l64": (45, 120)}  # p50 and p99 in ms


def make_run(path: Path) -> RunDir:
    """A synthetic shop with a paper-size model of random weights in the place of a trained one."""
    import torch

    from streamctl.config import AnnotateConfig, PretrainConfig, SftConfig, TokenizeConfig
    from streamctl.data import synthesize
    from streamctl.model import Policy, PolicyConfig
    from streamctl.retrieval.evidence import SIZES
    from streamctl.tokenizer import SemanticIds
    from streamctl.tokenizer.stage import tokenize

    run = RunDir(path)
    synthesize(run, users=2000, items=peers.ITEMS)
    tokenize(run, TokenizeConfig(encoder="tfidf", dim=64, method="rqkmeans", neighbours=5))
    ids = SemanticIds.load(run.stage("tokenizer"))
    config = PolicyConfig.of_size("paper", ids.sizes, dedup=ids.dedup, thoughts="evidence")
    policy = Policy.build(config, torch.from_numpy(ids.tokens().item_tokens(ids.codes)), 0)
    parents = ["data", "tokenizer"]
    for name, settings, holds in (
        ("pretrain", PretrainConfig().settled(), True),
        ("annotate", AnnotateConfig(), False),
        ("sft", SftConfig(), True),
    ):
        with run.begin(name, settings, parents) as stage:
            for file in policy.save(stage.path) if holds else ():
                stage.adopt(file)
            stage.publish(hops=list(SIZES))
        parents = [*parents, name]
    return run


def bodies(run: RunDir, path: Path, think: int) -> None:
    """Requests, a line each: random items, histories as long as real ones."""
    from streamctl.data import Catalog

    ids = Catalog.load(run.stage("data")).ids
    random = np.random.default_rng(0)
    lengths = random.choice(peers.real_lengths()[0], 500)
    with open(path, "w") as handle:
        for length in lengths:
            history = [ids[item] for item in random.integers(0, len(ids), length)]
            handle.write(json.dumps({"history": history, "k": K, "think": think}) + "\n")


def peer(run: RunDir, port: int) -> None:
    """The peer's server; runs in a process of its own."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import T5ForConditionalGeneration

    from streamctl.data import Catalog
    from streamctl.tokenizer import SemanticIds, Tokens

    torch.set_num_threads(os.cpu_count() or 1)
    ids = SemanticIds.load(run.stage("tokenizer"))
    titles = Catalog.load(run.stage("data"))
    tokens = ids.tokens().item_tokens(ids.codes)
    model = T5ForConditionalGeneration.from_pretrained(run.path / "sft").eval()
    index = {item: row for row, item in enumerate(titles.ids)}
    items = {tuple(row): item for row, item in zip(tokens.tolist(), titles.ids, strict=True)}
    children: dict[tuple[int, ...], set[int]] = {}
    for row in items:
        for depth, token in enumerate(row):
            children.setdefault(row[:depth], set()).add(token)
    after = {prefix: sorted(found) for prefix, found in children.items()}
    app, one = FastAPI(), threading.Lock()

    @app.post("/v1/recommend")
    def recommend(body: dict) -> dict:
        rows = [index[item] for item in body["history"]]
        with one, torch.inference_mode():
            found = model.generate(
                input_ids=torch.from_numpy(tokens[rows]).reshape(1, -1),
                decoder_start_token_id=Tokens.BOS,
                max_new_tokens=tokens.shape[1],
                min_new_tokens=tokens.shape[1],
                num_beams=BEAM,
                num_return_sequences=K,
                prefix_allowed_tokens_fn=lambda _, prefix: after[tuple(prefix[1:].tolist())],
            )
        return {"items": [items.get(tuple(row)) for row in found[:, 1:].tolist()]}

    @app.get("/readyz")
    def ready() -> dict:
        return {}

    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def serving(command: list[str]):
    """(address, process) of a server, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    compiled = {**os.environ, "STREAMCTL_COMPILE": "wait"}
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)], env=compiled)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"{address}/readyz", timeout=5)
                break
            except OSError:
                time.sleep(0.25)
        yield address, process
    finally:
        process.terminate()
        process.wait(60)


def drive(address: str, file: Path, seconds: float, *, rate: float | None, connections: int):
    """What wrk saw: answers by kind and latencies of those with status 200.

    Args:
        rate: requests a second, spread over the connections; None: each as fast as it is answered.
    """
    pause = 0 if rate is None else 1000 * connections / rate
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s",
         "-s", HERE / "serve.lua", f"{address}/v1/recommend", "--", str(file), str(pause)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stderr.strip().splitlines()[-1])


class Memory:
    """Resident MB of a process and its children, sampled every SAMPLE_S seconds."""

    def __init__(self, pid: int):
        import psutil

        self.process, self.curve = psutil.Process(pid), []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(SAMPLE_S):
            every = [self.process, *self.process.children(recursive=True)]
            self.curve.append(round(sum(one.memory_info().rss for one in every) / 2**20, 1))

    def growth(self) -> dict[str, Any]:
        """Median of the second fifth of the time beside that of the last, and the curve."""
        self.stop.set()
        self.thread.join()
        fifth, half = max(1, len(self.curve) // 5), len(self.curve) // 2
        early = statistics.median(self.curve[fifth : 2 * fifth])
        late = statistics.median(self.curve[-fifth:])
        slope = np.polyfit(np.arange(len(self.curve) - half), self.curve[half:], 1)[0]
        return {
            "early_mb": early,
            "late_mb": late,
            "grown_mb": late - early,
            "mb_a_minute_in_second_half": round(slope * 60 / SAMPLE_S, 3),
            "sample_s": SAMPLE_S,
            "curve_mb": self.curve,
        }


def row(case: str, ours: float, unit: str, other: float | None, better: float | None, **more):
    name = "FastAPI + transformers generate" if other is not None else None
    base = {"case": case, "ours": ours, "unit": unit, "peer_name": name, "peer": other}
    return {**base, "ratio": better, **more}


def errors(found: dict) -> int:
    """What is neither an answer nor a refusal."""
    return found["late"] + found["other"] + found["connection_errors"]


@contextmanager
def our_server(run: RunDir):
    command = ["-m", "streamctl", "serve", "--run", str(run.path), "--method", "stream_sft"]
    with serving([*command, "--deadline-ms", str(DEADLINE_MS)]) as served:
        yield served


def measure(run: RunDir, folder: Path, seconds: float) -> list[dict]:
    """Rows of single requests and of saturation."""
    files = {think: folder / f"l{think}.jsonl" for think in (0, THINK)}
    for think, file in files.items():
        bodies(run, file, think)
    with serving([__file__, "--peer", str(run.path)]) as (address, _):
        drive(address, files[0], 3, rate=None, connections=1)
        single = drive(address, files[0], seconds, rate=None, connections=1)
        theirs = drive(address, files[0], seconds, rate=None, connections=4)
    rows = []
    with our_server(run) as (address, _):
        for think, file in files.items():
            alone = drive(address, file, seconds, rate=None, connections=1)
            rate = LOAD * alone["ok"] / alone["seconds"]
            found = drive(address, file, seconds, rate=rate, connections=CONNECTIONS)
            case = f"latency/l{think}"
            other = single["p50_ms"] if think == 0 else None
            better = other / alone["p50_ms"] if other else None  # both on one connection
            goals = dict(zip(("p50_ms", "p99_ms"), GOALS[case], strict=True))
            reached = not errors(found) and all(found[name] < goals[name] for name in goals)
            more = {"wrk": found, "alone": alone, "rate": rate, "load": LOAD}
            more |= {"errors": errors(found)}
            more |= {"goals": goals, "reached": reached}
            rows.append(row(case, found["p50_ms"], "ms p50", other, better, **more))
        flat = drive(address, files[0], seconds, rate=None, connections=CONNECTIONS)
        capacity = flat["ok"] / flat["seconds"]
        full = drive(address, files[0], seconds, rate=4 * capacity, connections=512)
        done = full["ok"] / full["seconds"]
        before = theirs["ok"] / theirs["seconds"]
        goals = {"ratio": MORE, "p99_ms": DEADLINE_MS, "errors": 0}
        reached = done / before > MORE and full["p99_ms"] <= DEADLINE_MS and not errors(full)
        more = {"wrk": full, "rate": 4 * capacity, "errors": errors(full), "goals": goals}
        more |= {"reached": reached, "peer_wrk": theirs}
        rows.append(row("saturation", done, "requests/s", before, done / before, **more))
    return rows


def remember(run: RunDir, folder: Path, minutes: float) -> list[dict]:
    """The row of the memory run: fast and slow requests without a pause."""
    file = folder / "mixed.jsonl"
    for think in (0, THINK):
        bodies(run, folder / "part.jsonl", think)
        with open(file, "a") as handle:
            handle.write((folder / "part.jsonl").read_text())
    with our_server(run) as (address, process):
        drive(address, file, 10, rate=None, connections=8)
        memory = Memory(process.pid)
        found = drive(address, file, 60 * minutes, rate=None, connections=8)
        grown = memory.growth()
    goals = {"grown_mb": FLAT_MB, "errors": 0}
    reached = grown["grown_mb"] < FLAT_MB and not errors(found)
    more = {"wrk": found, "errors": errors(found), **grown, "goals": goals, "reached": reached}
    minutes = len(grown["curve_mb"]) * SAMPLE_S / 60  # a run may be stopped for a while
    more |= {"minutes": round(minutes, 1), "load_after": os.getloadavg()[0]}
    return [row("memory", grown["grown_mb"], "MB grown", None, None, **more)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/serve.json")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--memory-minutes", type=float, help="the memory run, alone")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(RunDir(options.peer), options.port)
        return
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing. Next: apt-get install wrk")
    began, busy = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run")
        if options.memory_minutes:
            rows = remember(run, Path(folder), options.memory_minutes)
        else:
            rows = measure(run, Path(folder), options.seconds)
    receipt = {"name": "serve", **provenance(), "threads": os.cpu_count(), "seed": 0}
    receipt |= {"load_before": busy, "wall_s": round(time.time() - began, 1), "rows": rows}
    receipt["lengths"] = peers.real_lengths()[1]
    if options.save:
        if RECEIPT.exists():  # the rows of the other call stay
            kept = json.loads(RECEIPT.read_text())
            own = {one["case"] for one in rows}
            others = [one for one in kept["rows"] if one["case"] not in own]
            receipt = (kept if options.memory_minutes else receipt) | {"rows": [*rows, *others]}
        RECEIPT.write_text(json.dumps(receipt, indent=1) + "\n")
    if options.json:
        print(json.dumps(receipt, indent=1))


if __name__ == "__main__":
    main()
