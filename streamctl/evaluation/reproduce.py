"""The table: every method times every seed, one resumable job and one receipt each."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamctl import config as configs
from streamctl.baselines.train import train_baseline
from streamctl.errors import UsageError, close_matches
from streamctl.evaluation.compare import bootstrap_mean
from streamctl.evaluation.metrics import gains
from streamctl.evaluation.stage import RANKS, evaluate_run, read_result
from streamctl.progress import say
from streamctl.runs import RunDir, atomic_file, provenance, read_json
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import sft

# recall@5, ndcg@5, recall@10, ndcg@10 as printed elsewhere: leave-one-out, whole catalogue.
PUBLISHED = {
    "amazon-2014-beauty": {
        "caser": (0.0205, 0.0131, 0.0347, 0.0176),
        "gru4rec": (0.0164, 0.0099, 0.0283, 0.0137),
        "bert4rec": (0.0203, 0.0124, 0.0347, 0.0170),
        "sasrec_bce": (0.0387, 0.0249, 0.0605, 0.0318),
        "sasrec_ce": (0.0543, 0.0315, 0.0821, 0.0405),
        "tiger": (0.0454, 0.0321, 0.0648, 0.0384),
    }
}
COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
REFERENCES = ("tiger", "sasrec_ce")  # what every row is compared with
# The stages before the methods part, copied into every job's folder.
_COMMON = ("data", "tokenizer")


@dataclass(frozen=True)
class Plan:
    """Settings of the whole matrix.

    Attributes:
        methods: jobs to run (see `JOBS`).
        seeds: each method is trained once with each.
        size: of the generative models.
        sets: `stage.key=value` texts for every job.
        budget: hours after which no further job begins; 0 for no limit.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    size: configs.Size = "small"
    sets: tuple[str, ...] = ()
    budget: float = 0.0
    device: str = "auto"

    def resolve(self, cls: type, seed: int, **fixed: Any) -> Any:
        if "size" in cls.__dataclass_fields__ and "size" not in fixed:
            fixed["size"] = self.size
        return configs.resolve(cls, sets=self.sets, seed=seed, **fixed)


def _baseline(name: str, **fixed: Any) -> Callable[[RunDir, Plan, int], None]:
    def train(run: RunDir, plan: Plan, seed: int) -> None:
        own = fixed if name == "tiger" else {"size": None} | fixed
        config = plan.resolve(configs.BaselineConfig, seed, name=name, **own)
        train_baseline(run, config, device=plan.device)

    return train


def _stream(run: RunDir, plan: Plan, seed: int) -> None:
    """The paper's three stages and the l = 0 twin: rows and controls of one model."""
    pretrain(run, plan.resolve(configs.PretrainConfig, seed), device=plan.device)
    annotate(run, plan.resolve(configs.AnnotateConfig, seed), device=plan.device)
    tuning = plan.resolve(configs.SftConfig, seed)
    sft(run, tuning, device=plan.device)
    rl(run, plan.resolve(configs.RlConfig, seed), device=plan.device)
    sft(run, tuning, device=plan.device, twin=True)


def _nothing(run: RunDir, plan: Plan, seed: int) -> None:
    """Popularity is counted by the evaluation."""


# Job -> how it trains; then the row of the evaluation that carries the job's own name.
JOBS: dict[str, Callable[[RunDir, Plan, int], None]] = {
    "popularity": _nothing,
    "caser": _baseline("caser"),
    "gru4rec": _baseline("gru4rec"),
    "bert4rec": _baseline("bert4rec"),
    "sasrec_bce": _baseline("sasrec", loss="bce"),
    "sasrec_ce": _baseline("sasrec", loss="ce"),
    "tiger": _baseline("tiger"),
    "stream": _stream,
}


def reproduce(run: RunDir, plan: Plan) -> dict[str, Any]:
    """Run every job that has no receipt yet, and join the receipts to the table.

    A job works in RUN/reproduce/METHOD-SEED, itself a run whose stages resume; its receipt is
    written last. All jobs share the run's data and tokenizer.

    Returns:
        the table, also written to RUN/reproduce/table.json.

    Raises:
        UsageError: an unknown method.
        StreamctlError: data or tokenizer are missing or stale, or what a stage raises.
    """
    for name in plan.methods:
        if name not in JOBS:
            raise UsageError(f"unknown method {name!r}; {close_matches(name, JOBS)}")
    for stage in _COMMON:
        run.require(stage)
    jobs = [(name, seed) for seed in plan.seeds for name in plan.methods]
    began = time.monotonic()
    for number, (name, seed) in enumerate(jobs, 1):
        receipt = receipt_path(run, name, seed)
        wanted = _identity(run, plan)
        if receipt.is_file() and read_json(receipt)["plan"] == wanted:
            say(f"[{number}/{len(jobs)}] {name}, seed {seed}: complete already")
            continue
        if plan.budget and time.monotonic() - began > 3600 * plan.budget:
            say(f"budget of {plan.budget} hours used up; the same command continues")
            break
        say(f"[{number}/{len(jobs)}] {name}, seed {seed}")
        value = run_job(run, plan, name, seed) | {"plan": wanted}
        with atomic_file(receipt) as path:
            path.write_text(json.dumps(value, indent=1) + "\n")
    return write_table(run, plan)


def receipt_path(run: RunDir, name: str, seed: int) -> Path:
    return run.path / "reproduce" / "receipts" / f"{name}-{seed}.json"


def _identity(run: RunDir, plan: Plan) -> dict[str, Any]:
    """What a receipt depends on besides its method and seed."""
    hashes = {name: run.stage(name).hash for name in _COMMON}
    return {"size": plan.size, "sets": list(plan.sets), "stages": hashes}


def run_job(run: RunDir, plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Train one method with one seed, evaluate it, and say how it was done."""
    job = _job_folder(run, plan, name, seed)
    JOBS[name](job, plan, seed)
    rows = (name.split("_")[0],) if name != "stream" else ()
    config = plan.resolve(configs.EvalConfig, seed, methods=rows)
    result = read_result(evaluate_run(job, config, device=plan.device))
    found = result["methods"] | result["controls"]
    if name == "stream":  # rows that other jobs have of their own
        found = {row: entry for row, entry in found.items() if row not in ("popularity", "tiger")}
    else:
        found = {name: found[rows[0]]}
    stages = {
        path: {key: job.stage(path).manifest[key] for key in ("config", "seed", "wall_s")}
        for path in job.stage("eval").manifest["parents"]
        if path not in _COMMON
    }
    return {"method": name, "seed": seed, "rows": found, "stages": stages, **provenance()} | {
        key: result[key] for key in ("split", "users", "items", "ties", "data_hash", "comparisons")
    }


def _job_folder(run: RunDir, plan: Plan, name: str, seed: int) -> RunDir:
    """The job's own run with copies of the common stages; one of another plan is set aside."""
    job = RunDir(run.path / "reproduce" / f"{name}-{seed}")
    note, wanted = job.path / "plan.json", _identity(run, plan)
    if note.is_file() and read_json(note) == wanted:
        return job
    if job.path.exists():
        previous = job.path.with_name(job.path.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        job.path.rename(previous)
    for stage in _COMMON:
        shutil.copytree(run.stage(stage).path, job.stage(stage).path)
    with atomic_file(note) as path:
        path.write_text(json.dumps(wanted, indent=1) + "\n")
    return job


def write_table(run: RunDir, plan: Plan) -> dict[str, Any]:
    """Join the receipts there are: means and spreads over seeds, paired intervals over users."""
    receipts = [
        read_json(path)
        for name in JOBS
        for path in sorted((run.path / "reproduce" / "receipts").glob(f"{name}-*.json"))
    ]
    receipts = [receipt for receipt in receipts if receipt["plan"] == _identity(run, plan)]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    gained: dict[str, list[np.ndarray]] = {}
    for receipt in receipts:
        job = RunDir(run.path / "reproduce" / f"{receipt['method']}-{receipt['seed']}")
        ranks = _ranks(job)
        for name, entry in receipt["rows"].items():
            rows.setdefault(name, []).append(entry)
            own = ranks.get("sasrec" if name.startswith("sasrec") else name)
            if own is not None:
                gained.setdefault(name, []).append(gains(own, 10))
    source = run.stage("data").manifest["config"]["source"]
    published = PUBLISHED.get(Path(source).name, {})
    table = {
        "name": "reproduce",
        "data": Path(source).name,
        "data_hash": run.stage("data").hash,
        "size": plan.size,
        "sets": list(plan.sets),
        "rows": [
            _row(name, entries, gained, published.get(name)) for name, entries in rows.items()
        ],
        **{key: receipts[0][key] for key in ("split", "users", "items", "ties") if receipts},
        **provenance(),
    }
    with atomic_file(run.path / "reproduce" / "table.json") as path:
        path.write_text(json.dumps(table, indent=1) + "\n")
    return table


def _ranks(job: RunDir) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(job.stage("eval").file(RANKS))


def _row(
    name: str,
    entries: Sequence[Mapping[str, Any]],
    gained: Mapping[str, Sequence[np.ndarray]],
    published: Sequence[float] | None,
) -> dict[str, Any]:
    """One line: means over seeds, the spread of ndcg@10, intervals of the difference over users.

    With several seeds a user's gain is its mean over them, so that the interval is of the method
    and not of one lucky seed.
    """
    row: dict[str, Any] = {"method": name, "seeds": len(entries)}
    row |= {key: statistics.fmean(entry[key] for entry in entries) for key in COLUMNS}
    masked = [entry["masked"]["ndcg@10"] for entry in entries]
    row["ndcg@10_masked"] = statistics.fmean(masked)
    values = [entry["ndcg@10"] for entry in entries]
    row["ndcg@10_spread"] = [min(values), max(values)]
    row["ms_per_user"] = statistics.fmean(entry["ms_per_user"] for entry in entries)
    row["published"] = dict(zip(COLUMNS, published, strict=True)) if published else None
    for other in REFERENCES:
        row[f"vs_{other}"] = None
        if name != other and name in gained and other in gained:
            own, theirs = (np.mean(gained[key], axis=0) for key in (name, other))
            interval = bootstrap_mean(own - theirs)
            row[f"vs_{other}"] = [interval.low, interval.high]
    return row
