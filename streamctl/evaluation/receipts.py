"""Receipts of a seed's models, and the table that joins them."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from streamctl.baselines.registry import BASELINES
from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import RERANKED
from streamctl.evaluation.stage import RANKS, read_result
from streamctl.files import BROKEN_ZIP, atomic_file, read_json
from streamctl.progress import warn
from streamctl.provenance import provenance
from streamctl.ranking import bootstrap_seeds, gains
from streamctl.runs import RunDir

# recall@5, ndcg@5, recall@10, ndcg@10 as printed elsewhere: leave-one-out, whole catalogue.
PUBLISHED = {
    "amazon-2014-beauty": {
        "caser": (0.0205, 0.0131, 0.0347, 0.0176),
        "gru4rec": (0.0164, 0.0099, 0.0283, 0.0137),
        "bert4rec": (0.0203, 0.0124, 0.0347, 0.0170),
        "sasrec_bce": (0.0387, 0.0249, 0.0605, 0.0318),
        "sasrec_ce": (0.0543, 0.0315, 0.0821, 0.0405),
        "tiger": (0.0454, 0.0321, 0.0648, 0.0384),
    },
    # TIGER and STREAM-Rec: STREAM-Rec's paper; the others: ETEGRec's. Both had whole texts.
    "amazon-2023-instruments": {
        "caser": (0.0242, 0.0154, 0.0392, 0.0202),
        "gru4rec": (0.0345, 0.0220, 0.0537, 0.0281),
        "bert4rec": (0.0305, 0.0196, 0.0483, 0.0253),
        "sasrec_bce": (0.0341, 0.0217, 0.0530, 0.0277),
        "tiger": (0.0333, 0.0215, 0.0532, 0.0279),
        "stream_sft": (0.0367, 0.0244, 0.0562, 0.0307),
        "stream_rl": (0.0398, 0.0261, 0.0608, 0.0329),
    },
}
COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
# What every row is compared with: all baselines, the strongest ones re-ranked, the policy after
# each stage, without a thought and with random evidence, and the paper's letter.
REFERENCES = (
    *BASELINES, f"tiger{RERANKED}", f"sasrec_ce{RERANKED}", f"ranker{RERANKED}",
    "l0", "random_evidence", "letter_no_thinking", "letter_stream_pt", "letter_stream_sft",
    "letter_stream_rl", "stream_pt", "stream_sft", "stream_rl", f"stream_rl{RERANKED}",
)  # fmt: skip
OWNERS = "users"  # whose target each rank is of, where somebody has several
LAST = 255  # a rank as it is kept: all that no metric reads are one
TIMES = ("ms_per_user", "train_s")  # no rerun repeats them
SPENT = (*TIMES, "prefixes")


def write_receipt(run: RunDir, job: RunDir, seed: int) -> None:
    """What was measured and how it was made; the users' ranks first, cut at `LAST`."""
    evaluated = job.stage("eval")
    result, made = read_result(evaluated), job.ancestors(["eval"])
    prefix = "letter_" if job.path.name.startswith("letter") else ""
    rows = result["methods"] | result["controls"]
    if prefix:
        rows = {name: row for name, row in rows.items() if _is_streams(name)}
    examples = len(load_data(job)[1].train)
    for row in rows.values():
        spent = job.ancestors(row["stages"])
        seconds = (spent[name]["wall_s"] for name in spent if name not in ("data", "tokenizer"))
        row["train_s"] = round(sum(seconds), 1)
        row["prefixes"] = sum(_prefixes(spent, name, examples) for name in spent)
    receipt = {
        "seed": seed,
        "rows": {prefix + name: row for name, row in rows.items()},
        "stages": {
            name: {key: manifest[key] for key in ("config", "seed", "wall_s", "hash")}
            for name, manifest in made.items()
            if name != "data"
        },
        **{key: result[key] for key in ("split", "users", "items", "ties", "data_hash", "winner")},
        **provenance(),
    }
    found = load_file(evaluated.file(RANKS))
    ranks = {
        prefix + name + end: np.minimum(found[name + end], LAST).astype(np.uint8)
        for name in rows
        for end in ("", "/masked")
    }
    if result["targets"] > result["users"]:
        ranks[OWNERS] = found["users"]
    path = run.path / "reproduce" / "receipts" / f"{job.path.name}.json"
    with atomic_file(path.with_suffix(".npz")) as part, part.open("wb") as file:
        np.savez_compressed(file, **ranks)
    with atomic_file(path) as part:
        part.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


def _prefixes(spent: Mapping[str, Mapping[str, Any]], name: str, examples: int) -> int:
    """How many prefixes of histories a stage's gradient steps saw, repeats counted.

    Args:
        spent: manifests of the stage and of all that it comes from. examples: of training.
    """
    made = spent[name]
    if name == "rl":
        return made["steps"] * made["config"]["batch"]
    seen = spent["annotate"] if name == "sft" else made
    return seen.get("examples", examples) * made.get("epochs", 0)


def _is_streams(name: str) -> bool:
    controls = ("no_thinking", "random_", "oracle_")
    return name.startswith(("stream_", *controls))


def write_table(run: RunDir) -> dict[str, Any]:
    """Join the receipts there are: means over seeds, intervals over users and seeds.

    Raises:
        StreamctlError: the receipts are of different data or users, or ranks are not a receipt's.
    """
    folder = run.path / "reproduce"
    paths = sorted((folder / "receipts").glob("seed-*.json"))
    paths += sorted((folder / "receipts").glob("letter-*.json"))  # its rows come last
    receipts = [read_json(path) for path in paths]
    if len({(each["data_hash"], each["split"], each["users"]) for each in receipts}) > 1:
        raise StreamctlError(
            "these receipts are of different data or users, so nothing can be compared",
            where=folder / "receipts",
            run="the same command after removing those of the other users or data",
        )
    for kind in ("seed", "letter"):
        of_kind = {
            path.name: receipt
            for path, receipt in zip(paths, receipts, strict=True)
            if path.name.startswith(kind)
        }
        _warn_of_other_settings(of_kind)
    entries: dict[str, list[Mapping[str, Any]]] = {}
    masked: dict[str, dict[int, np.ndarray]] = {}
    owners = None
    for path, receipt in zip(paths, receipts, strict=True):
        ranks = _read_ranks(path.with_suffix(".npz"), receipt)
        owners = ranks.get(OWNERS, owners)
        for name, row in receipt["rows"].items():
            entries.setdefault(name, []).append(row)
            own = gains(ranks[f"{name}/masked"], 10)
            masked.setdefault(name, {})[receipt["seed"]] = own
    source = Path(run.stage("data").manifest["config"]["source"]).name
    published = PUBLISHED.get(source, {})
    # Methods that are re-ranked together have a row of their own, without bare figures.
    names = dict.fromkeys(name.removesuffix(RERANKED) for name in entries)
    table = {
        "name": "reproduce",
        "data": source,
        "data_hash": run.stage("data").hash,
        "rows": [
            _table_row(name, entries, masked, owners, published.get(name.removeprefix("letter_")))
            for name in names
        ],
        **{key: receipts[0][key] for key in ("split", "users", "items", "ties") if receipts},
        **provenance(),
    }
    with atomic_file(folder / "table.json") as path:
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


def _warn_of_other_settings(receipts: Mapping[str, Mapping[str, Any]]) -> None:
    """Say where a mean over seeds is one over models that were made with different settings."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for file, receipt in receipts.items():
        for stage, made in receipt["stages"].items():
            config = made["config"] | {"seed": 0}
            before, other = first.setdefault(stage, (file, config))
            keys = [key for key in sorted({*config, *other}) if config.get(key) != other.get(key)]
            if keys and stage != "eval":
                warn(
                    f"{stage} has other settings in {file} than in {before} "
                    f"({', '.join(keys)}): the table's mean is over both"
                )


def _read_ranks(path: Path, receipt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The users' ranks beside a receipt.

    Raises:
        StreamctlError: they are missing, damaged, or not the receipt's.
    """
    try:
        with np.load(path) as file:
            ranks = dict(file)
        if all(
            abs(gains(ranks[name + end], 10).mean() - figures["ndcg@10"]) < 1e-9
            for name, row in receipt["rows"].items()
            for end, figures in (("", row), ("/masked", row["masked"]))
        ):
            return ranks
    except (OSError, KeyError, ValueError, *BROKEN_ZIP):
        pass
    raise StreamctlError(
        f"these are not the ranks of {path.stem}'s receipt",
        where=path,
        run="the same command after removing both: the receipt is written again",
    )


def _table_row(
    name: str,
    entries: Mapping[str, Sequence[Mapping[str, Any]]],
    masked: Mapping[str, Mapping[int, np.ndarray]],
    owners: np.ndarray | None,
    published: Sequence[float] | None,
) -> dict[str, Any]:
    """One method: means over seeds, bare and re-ranked, and 95% intervals of masked ndcg@10.

    Args:
        masked: masked ndcg@10 of all targets by method and seed. owners: whose targets these are,
            where somebody has several.
    """
    own, behind = entries.get(name), entries.get(name + RERANKED)

    def mean(rows: Sequence[Mapping[str, Any]] | None, key: str) -> float | None:
        return statistics.fmean(row[key] for row in rows) if rows else None

    row: dict[str, Any] = {"method": name, "seeds": len(own or behind)}
    row["rerank_seeds"] = len(behind or ())
    row |= {key: mean(own, key) for key in COLUMNS}
    for prefix, rows in (("", own), ("rerank_", behind)):
        inner = [entry["masked"] for entry in rows] if rows else None
        row[f"{prefix}ndcg@10_masked"] = mean(inner, "ndcg@10")
    row["rerank_ndcg@10"] = mean(behind, "ndcg@10")
    row |= {key: mean(own or behind, key) for key in SPENT}
    row["published"] = dict(zip(COLUMNS, published, strict=True)) if published else None
    for prefix, method in (("", name), ("rerank_", name + RERANKED)):
        others = [other for other in REFERENCES if other != method and other in masked]
        if method not in masked:
            continue
        mine = masked[method]
        [found] = bootstrap_seeds(np.stack([*mine.values()])[None], users=owners)
        row[f"{prefix}ndcg@10_masked_95"] = [found.low, found.high]
        # Methods are compared over the seeds that both have; those with the same ones share draws.
        common: dict[tuple[int, ...], list[str]] = {}
        for other in others:
            seeds = tuple(seed for seed in mine if seed in masked[other])
            common.setdefault(seeds, []).append(other)
        common.pop((), None)
        for seeds, rivals in common.items():
            pairs = [[mine[seed] - masked[rival][seed] for seed in seeds] for rival in rivals]
            differences = bootstrap_seeds(np.array(pairs), users=owners)
            for rival, found in zip(rivals, differences, strict=True):
                row[f"{prefix}vs_{rival}"] = [found.low, found.high]
    return row


def save_receipts(run: RunDir, folder: Path) -> None:
    """Copy the table to FOLDER/table-NAME.json, receipts and ranks to FOLDER/NAME/."""
    name, source = run.path.resolve().name, run.path / "reproduce"
    pairs = [(source / "table.json", folder / f"table-{name}.json")]
    pairs += [(path, folder / name / path.name) for path in (source / "receipts").glob("*")]
    for path, target in pairs:
        with atomic_file(target) as part:
            shutil.copyfile(path, part)
