"""The table: every method times every seed, one resumable job and one receipt each."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from streamctl import config as configs
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.evaluation.jobs import (
    JOBS,
    Plan,
    copy_stages,
    differences,
    identity,
    job_path,
)
from streamctl.evaluation.stage import RANKS, evaluate_run, read_result
from streamctl.files import BROKEN_ZIP
from streamctl.progress import say, warn
from streamctl.ranking import bootstrap_mean, gains
from streamctl.runs import RunDir, atomic_file, provenance, read_json

# recall@5, ndcg@5, recall@10, ndcg@10 as printed elsewhere: leave-one-out, whole catalogue.
PUBLISHED = {
    "amazon-2014-beauty": {
        "caser": (0.0205, 0.0131, 0.0347, 0.0176),
        "gru4rec": (0.0164, 0.0099, 0.0283, 0.0137),
        "bert4rec": (0.0203, 0.0124, 0.0347, 0.0170),
        "sasrec_bce": (0.0387, 0.0249, 0.0605, 0.0318),
        "sasrec_ce": (0.0543, 0.0315, 0.0821, 0.0405),
        "tiger": (0.0454, 0.0321, 0.0648, 0.0384),
        "tiger_vocabulary": (0.0454, 0.0321, 0.0648, 0.0384),
    }
}
LAST = 255  # a rank as it is kept: all that no metric reads are one
COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
REFERENCES = ("tiger", "sasrec_ce")  # what every row is compared with
TWINS = {  # what a thought is measured by: the answer without one (RL's is the twin of SFT)
    "no_thinking": (
        "stream_sft", "stream_rl", "stream_plain_rl", "random_thinking", "random_thinking_rl",
        "oracle_thinking",
    ),
}  # fmt: skip


def reproduce(run: RunDir, plan: Plan, *, force: bool = False) -> dict[str, Any]:
    """Run every job that has no receipt yet, and join the receipts to the table.

    A job works in RUN/reproduce/METHOD-SEED, itself a run whose stages resume; its receipt is
    written last, after the ranks of its users. All jobs share the run's data and tokenizer.

    Args:
        force: do jobs again that were made by another plan; each is kept as METHOD-SEED.previous.

    Returns:
        the table, also written to RUN/reproduce/table.json.

    Raises:
        UsageError: an unknown method, in the plan's methods or its settings.
        StreamctlError: a job is there that was made by another plan, data or tokenizer are missing
            or stale, or what a stage raises.
    """
    for name in plan.methods:
        if name not in JOBS:
            raise UsageError(f"unknown method {name!r}; {close_matches(name, JOBS)}")
    baselines = {name for name, job in JOBS.items() if job.fixed}
    owners = {stage.section for stage in configs.STAGES} | baselines
    for text in plan.sets:
        owner, dot, _ = text.partition("=")[0].partition(".")
        if dot and owner not in owners:
            known = close_matches(owner, owners)
            raise UsageError(f"--set {text}: no stage or baseline {owner!r}; {known}")
    for stage in dict.fromkeys(stage for name in plan.methods for stage in JOBS[name].stages):
        if stage in ("data", "tokenizer"):
            run.require(stage)
    jobs = [(name, seed) for seed in plan.seeds for name in plan.methods]
    if not force:
        for name, seed in jobs:
            _refuse_another_plan(run, plan, name, seed)
    began = time.monotonic()
    for number, (name, seed) in enumerate(jobs, 1):
        receipt = receipt_path(run, name, seed)
        wanted = identity(run, plan, name)
        if receipt.is_file() and not differences(read_json(receipt)["plan"], wanted):
            say(f"[{number}/{len(jobs)}] {name}, seed {seed}: complete already")
            _find_ranks(run, name, seed, wanted)
            continue
        if plan.budget and time.monotonic() - began > 3600 * plan.budget:
            say(f"budget of {plan.budget} hours used up; the same command continues")
            break
        say(f"[{number}/{len(jobs)}] {name}, seed {seed}")
        value = run_job(run, plan, name, seed) | {"plan": wanted}
        save_ranks(job_path(run, name, seed), value["rows"], ranks_path(receipt))
        with atomic_file(receipt) as path:
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return write_table(run, plan)


def receipt_path(run: RunDir, name: str, seed: int) -> Path:
    return run.path / "reproduce" / "receipts" / f"{name}-{seed}.json"


def ranks_path(receipt: Path) -> Path:
    """Where the ranks of a receipt's users are: beside it, and saved and brought back with it."""
    return receipt.with_suffix(".npz")


def save_ranks(job: RunDir, rows: Mapping[str, Any], target: Path) -> None:
    """Keep each row's ranks of the users, from which a table takes its paired intervals.

    Writes row of the table -> uint8 (E,), zero-based, cut at `LAST`; masked ones are under
    ROW/masked. Nothing for the wide beam, which depends on time.
    """
    found = load_file(job.stage("eval").file(RANKS))
    kept = {
        f"{shown}{end}": np.minimum(found[f"{entry['row']}{end}"], LAST).astype(np.uint8)
        for shown, entry in rows.items()
        for end in ("", "/masked")
        if entry["row"] in found
    }
    with atomic_file(target) as path, path.open("wb") as file:
        np.savez_compressed(file, **kept)


def _find_ranks(run: RunDir, name: str, seed: int, wanted: Mapping[str, Any]) -> None:
    """Keep the ranks of a finished job that has none beside its receipt, if it still has them."""
    receipt, job = receipt_path(run, name, seed), job_path(run, name, seed)
    made = _plan_of(run, name, seed)
    if ranks_path(receipt).is_file():
        return
    if made and not differences(made, wanted) and job.stage("eval").complete:
        save_ranks(job, read_json(receipt)["rows"], ranks_path(receipt))
    else:
        warn(f"{receipt.name} is without its users' ranks: its rows will have no intervals")


def run_job(run: RunDir, plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """Train one method with one seed, evaluate it, and say how it was done."""
    job = _job_folder(run, plan, name, seed)
    JOBS[name].train(job, plan, seed)
    own = JOBS[name].rows
    config = plan.resolve(configs.EvalConfig, seed, methods=tuple(own))
    result = read_result(evaluate_run(job, config, device=plan.device))
    found = result["methods"] | result["controls"]
    if not own:  # rows that other jobs have of their own
        own = {row: row for row in found if row not in ("popularity", "tiger")}
    stages = {
        stage: {key: manifest[key] for key in ("config", "seed", "wall_s", "hash")}
        for stage, manifest in ancestors(job, job.stage("eval").manifest["parents"]).items()
        if stage != "data"
    }
    rows = {
        shown: found[row] | {"row": row, "train_s": _train_seconds(job, found[row])}
        for row, shown in own.items()
    }
    return {"method": name, "seed": seed, "rows": rows, "stages": stages, **provenance()} | {
        key: result[key] for key in ("split", "users", "items", "ties", "data_hash", "comparisons")
    }


def ancestors(run: RunDir, stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Manifests of stages and of all that they come from, by name."""
    waiting, found = list(stages), {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = run.stage(name).manifest
            waiting += found[name]["parents"]
    return found


def _train_seconds(job: RunDir, entry: Mapping[str, Any]) -> float | None:
    """Wall time of every stage that a row's model comes from; None for the wide beam's."""
    if "stages" not in entry:
        return None
    spent = ancestors(job, entry["stages"]).items()
    seconds = (made["wall_s"] for name, made in spent if name not in ("data", "tokenizer"))
    return round(sum(seconds), 1)


def _plan_of(run: RunDir, name: str, seed: int) -> dict[str, Any] | None:
    """`identity` of the plan that a job's folder was made by; None if there is no such job."""
    note = job_path(run, name, seed).path / "plan.json"
    return read_json(note) if note.is_file() else None


def _refuse_another_plan(run: RunDir, plan: Plan, name: str, seed: int) -> None:
    """Raise rather than train a job again that was made by other settings or from other stages."""
    made, wanted = _plan_of(run, name, seed), identity(run, plan, name)
    receipt = receipt_path(run, name, seed)
    if made is None and receipt.is_file():
        made = read_json(receipt)["plan"]
    other = differences(made, wanted) if made else []
    if not other:
        return
    raise StreamctlError(
        f"{name}, seed {seed} was made by another plan ({'; '.join(other)})",
        where=job_path(run, name, seed).path,
        run="the same command with the settings that it was made with, or with --force (does it "
        f"again and keeps the old one as {name}-{seed}.previous)",
    )


def _job_folder(run: RunDir, plan: Plan, name: str, seed: int) -> RunDir:
    """The job's own run with the stages it starts from; one of another plan is set aside."""
    job, receipt = job_path(run, name, seed), receipt_path(run, name, seed)
    wanted = identity(run, plan, name)
    made = _plan_of(run, name, seed)
    if made is None or differences(made, wanted):
        job.path.mkdir(parents=True, exist_ok=True)
        for source, kept in ((receipt, "receipt.json"), (ranks_path(receipt), "receipt.npz")):
            if source.is_file():
                source.rename(job.path / kept)
        if any(not file.name.endswith(".part") for file in job.path.iterdir()):
            previous = job.path.with_name(job.path.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            job.path.rename(previous)
        with atomic_file(job.path / "plan.json") as path:
            path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    copy_stages(run, name, seed)
    return job


def valid_receipts(run: RunDir, plan: Plan) -> list[Path]:
    """Receipts of this plan's size and settings, of any seed and method, in the table's order."""
    return [path for path in _all_receipts(run) if _is_of(run, plan, read_json(path))]


def _all_receipts(run: RunDir) -> list[Path]:
    folder = run.path / "reproduce" / "receipts"
    return [path for name in JOBS for path in sorted(folder.glob(f"{name}-[0-9]*.json"))]


def _is_of(run: RunDir, plan: Plan, receipt: Mapping[str, Any]) -> bool:
    """Whether a receipt is of this plan; a plan with settings that its method lacks is another."""
    try:
        return not differences(receipt["plan"], identity(run, plan, receipt["method"]))
    except UsageError:
        return False


def save_receipts(run: RunDir, plan: Plan, folder: Path) -> None:
    """Copy the table to FOLDER/table-NAME.json, its receipts and their ranks to FOLDER/NAME/."""
    name = run.path.resolve().name
    receipts = valid_receipts(run, plan)
    ranks = [path for path in map(ranks_path, receipts) if path.is_file()]
    for source, target in (
        (run.path / "reproduce" / "table.json", folder / f"table-{name}.json"),
        *((path, folder / name / path.name) for path in (*receipts, *ranks)),
    ):
        with atomic_file(target) as path:
            shutil.copyfile(source, path)


def write_table(run: RunDir, plan: Plan) -> dict[str, Any]:
    """Join the receipts there are: means and spreads over seeds, paired intervals over users."""
    paths = valid_receipts(run, plan)
    if others := [path.stem for path in _all_receipts(run) if path not in paths]:
        warn(f"not in the table, made by another plan: {', '.join(others)}")
    receipts = [read_json(path) for path in paths]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    gained: dict[str, list[np.ndarray]] = {}
    for path, receipt in zip(paths, receipts, strict=True):
        ranks = _ranks(ranks_path(path), receipt)
        for name, entry in receipt["rows"].items():
            rows.setdefault(name, []).append(entry)
            if name in ranks:
                gained.setdefault(name, []).append(gains(ranks[name], 10))
    source = run.stage("data").manifest["config"]["source"]
    published = PUBLISHED.get(Path(source).name, {})
    table = {
        "name": "reproduce",
        "data": Path(source).name,
        "data_hash": run.stage("data").hash,
        "size": plan.size,
        "sets": list(plan.sets),
        "rows": [_row(name, rows, gained, published.get(name)) for name in rows],
        **{key: receipts[0][key] for key in ("split", "users", "items", "ties") if receipts},
        **provenance(),
    }
    with atomic_file(run.path / "reproduce" / "table.json") as path:
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def _ranks(source: Path, receipt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `save_ranks` kept of a receipt; none without its file.

    Receipts of one plan are of the same users, in the same order: it says data and `eval.users`.
    """
    if not source.is_file():
        return {}
    try:
        with np.load(source) as file:
            found = dict(file)
        same = all(
            abs(gains(found[name], 10).mean() - entry["ndcg@10"]) < 1e-12
            for name, entry in receipt["rows"].items()
            if name in found
        )
    except (ValueError, *BROKEN_ZIP):
        same = False
    if not same or any(len(ranks) != receipt["users"] for ranks in found.values()):
        raise StreamctlError(
            f"these are not the ranks of {receipt['method']}, seed {receipt['seed']}",
            where=source,
            run="the same command without that file (its rows then have no intervals)",
        )
    return found


def _row(
    name: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    gained: Mapping[str, Sequence[np.ndarray]],
    published: Sequence[float] | None,
) -> dict[str, Any]:
    """One line: means over seeds, the spread of ndcg@10, intervals of the difference over users.

    With several seeds a user's gain is its mean over them, so that the interval is of the method
    and not of one lucky seed. It takes the ranks of every seed of both rows.
    """
    entries = rows[name]
    row: dict[str, Any] = {"method": name, "seeds": len(entries)}
    row |= {key: statistics.fmean(entry[key] for entry in entries) for key in COLUMNS}
    masked = [entry["masked"]["ndcg@10"] for entry in entries]
    row["ndcg@10_masked"] = statistics.fmean(masked)
    values = [entry["ndcg@10"] for entry in entries]
    row["ndcg@10_spread"] = [min(values), max(values)]
    row["ms_per_user"] = statistics.fmean(entry["ms_per_user"] for entry in entries)
    spent = [entry["train_s"] for entry in entries if entry["train_s"] is not None]
    row["train_s"] = statistics.fmean(spent) if spent else None
    row["published"] = dict(zip(COLUMNS, published, strict=True)) if published else None
    twin = next((twin for twin, rows in TWINS.items() if name in rows), None)
    compared = {other: other for other in REFERENCES} | {"twin": twin}
    for key, other in compared.items():
        row[f"vs_{key}"] = None
        both = {method for method in (name, other) if method in rows}
        if len(both) == 2 and all(len(gained.get(each, ())) == len(rows[each]) for each in both):
            own, theirs = (np.mean(gained[method], axis=0) for method in (name, other))
            interval = bootstrap_mean(own - theirs)
            row[f"vs_{key}"] = [interval.low, interval.high]
    return row
