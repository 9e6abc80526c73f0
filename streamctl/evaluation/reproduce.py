"""The table of a paper: every method with every seed, receipts, and a check that they repeat."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from streamctl import config as configs
from streamctl.baselines.registry import BASELINES, resolved, settings
from streamctl.baselines.train import train_baseline
from streamctl.data import load_data
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.evaluation.methods import RERANK, RERANKED, known_rows, method_names
from streamctl.evaluation.rerank import rerank
from streamctl.evaluation.stage import RANKS, evaluate_run, read_result
from streamctl.files import BROKEN_ZIP, atomic_file, disk_errors, read_json
from streamctl.progress import say, warn
from streamctl.provenance import provenance
from streamctl.ranking import bootstrap_seeds, gains
from streamctl.runs import MANIFEST, RunDir
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import TWIN, sft

Maker = tuple[Callable[..., Any], type]
# Stages in the order in which they are made; then baselines, then rankers behind methods.
MAKERS: dict[str, Maker] = {
    "tokenizer": (tokenize, configs.TokenizeConfig),
    "pretrain": (pretrain, configs.PretrainConfig),
    "annotate": (annotate, configs.AnnotateConfig),
    "sft": (sft, configs.SftConfig),
    "rl": (rl, configs.RlConfig),
    TWIN: (functools.partial(sft, twin=True), configs.SftConfig),
}
_STREAM = ("pretrain", "annotate", "sft", "rl")
_ALONE = ("transitions", "knn", "ranker", "caser", "gru4rec", "bert4rec", "sasrec_bce", "sasrec_ce")
METHODS: dict[str, tuple[str, ...]] = {
    "popularity": (),
    **{name: (f"baselines/{name}",) for name in (*_ALONE, "tiger")},
    "stream": _STREAM,
    "letter": (*_STREAM, TWIN),  # with its control, the same steps without a thought
}
# Re-ranked by one ranker, too, where all are there: on Beauty the best row (docs/results.md).
TOGETHER = ("stream_rl", "sasrec_ce", "bert4rec")
LETTER = ("pretrain.thoughts=vocabulary", "pretrain.retrieve=target")  # the paper's own stages
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
    "popularity", *_ALONE, "tiger", f"tiger{RERANKED}", f"sasrec_ce{RERANKED}",
    f"ranker{RERANKED}", "l0", "random_evidence", "letter_no_thinking", "letter_stream_pt",
    "letter_stream_sft", "letter_stream_rl", "stream_pt", "stream_sft", "stream_rl",
    f"stream_rl{RERANKED}",
)  # fmt: skip
OWNERS = "users"  # whose target each rank is of, where somebody has several
LAST = 255  # a rank as it is kept: all that no metric reads are one
TIMES = ("ms_per_user", "train_s")  # no rerun repeats them
SPENT = (*TIMES, "prefixes")


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        methods: of `METHODS`. seeds: each is trained once with each.
        size: of the generative models.
        sets: `stage.key=value` texts for every method, `METHOD.key=value` for one baseline.
        rerank: fit a ranker behind every method, too.
        budget: hours after which no further stage begins; 0 for no limit.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)
    size: configs.Size = "small"
    sets: tuple[str, ...] = ()
    rerank: bool = True
    budget: float = 0.0
    device: str = "auto"

    def check(self) -> None:
        """Refuse what is unknown before anything is trained.

        Raises:
            UsageError: an unknown method, stage, baseline or setting.
        """
        for name in self.methods:
            if name not in METHODS:
                raise UsageError(f"unknown method {name!r}; {close_matches(name, METHODS)}")
        owners = {stage.section for stage in configs.STAGES} | set(METHODS)
        for text in self.sets:
            owner, dot, _ = text.partition("=")[0].partition(".")
            if dot and owner not in owners:
                known = close_matches(owner, owners)
                raise UsageError(f"--set {text}: no stage or method {owner!r}; {known}")
            if owner in METHODS and owner not in self.methods:
                warn(f"--set {text} has no effect: {owner} is not one of the methods")
            key = text.partition("=")[0].removeprefix("baseline.")
            if owner == "baseline" and not any(key in settings(name) for name in BASELINES):
                raise UsageError(f"--set {text}: no baseline has such a setting")
        for name in self.methods:
            for stage in METHODS[name]:
                self.resolve(stage, 0, name)

    def resolve(self, stage: str, seed: int, method: str = "") -> Any:
        """A stage's configuration."""
        _, cls = maker(stage)
        fixed: dict[str, Any] = {"seed": seed}
        if "size" in cls.__dataclass_fields__ and (stage == "pretrain" or method == "tiger"):
            fixed["size"] = self.size
        if cls is configs.BaselineConfig:
            sets = [text for text in self.sets if text.startswith(("baseline.", f"{method}."))]
            return resolved(stage.removeprefix("baselines/"), sets=sets, **fixed)
        sections = {each.section for each in configs.STAGES}
        sets = [text for text in self.sets if text.partition(".")[0] in sections]
        sets += LETTER if method == "letter" else ()
        own = [text for text in self.sets if text.partition(".")[0] == method != ""]
        sets += [f"{cls.section}.{text.partition('.')[2]}" for text in own]
        return configs.resolve(cls, sets=sets, **fixed)


def maker(stage: str) -> Maker:
    """What makes a stage of this name, and its configuration."""
    if stage.startswith("rerank/"):
        return rerank, configs.RerankConfig
    return MAKERS.get(stage, (train_baseline, configs.BaselineConfig))


def reproduce(run: RunDir, plan: Plan) -> dict[str, Any]:
    """Train and evaluate every method with every seed; what is complete is left as it is, unless
    what it was made from has changed.

    A seed's models are one run, RUN/reproduce/seed-N (the paper's letter: letter-N), which shares
    data and tokenizer with the run. Its receipt, with the ranks of all users beside it, is written
    last, in RUN/reproduce/receipts.

    Returns:
        the table, also written to RUN/reproduce/table.json.

    Raises:
        UsageError: the plan has something unknown.
        StreamctlError: what a stage raises: one that is there was made with other settings, ...
    """
    plan.check()
    began = time.monotonic()
    run.require("data")
    for seed in plan.seeds:
        for kind in ("seed", "letter"):
            methods = [name for name in plan.methods if (name == "letter") == (kind == "letter")]
            if not methods:
                continue
            if any(METHODS[name] for name in methods):
                run.require("tokenizer")
            job = RunDir(run.path / "reproduce" / f"{kind}-{seed}")
            for stage in ("data", "tokenizer"):
                if run.stage(stage).complete:
                    copy_stage(run, job, stage)
            done = all(_train(job, plan, name, seed, began) for name in methods)
            if not done:
                say(f"budget of {plan.budget} hours used up; the same command continues")
                return write_table(run)
            if plan.rerank and job.stage("tokenizer").complete:
                config = plan.resolve("rerank/", seed)
                rerank(job, config, device=plan.device)
                for together in _together(job):
                    joined = dataclasses.replace(config, methods=together)
                    rerank(job, joined, device=plan.device)
            config = configs.resolve(
                configs.EvalConfig,
                sets=[text for text in plan.sets if text.startswith("eval.")],
                seed=seed,
            )
            evaluate_run(job, config, device=plan.device)
            _write_receipt(run, job, seed)
    return write_table(run)


def _together(job: RunDir) -> list[tuple[str, ...]]:
    """Methods to re-rank by one ranker: `TOGETHER`, and those whose joint ranker is outdated."""
    joined = [
        name.removesuffix(RERANKED) for name in known_rows(job) if name.endswith(RERANKED)
    ]  # whether it helps or not
    outdated = [one for one in joined if "+" in one and job.stage(RERANK + one).outdated]
    wanted = ["+".join(TOGETHER)] if set(TOGETHER) <= set(method_names(job)) else []
    return [tuple(one.split("+")) for one in dict.fromkeys([*wanted, *outdated])]


def _train(job: RunDir, plan: Plan, method: str, seed: int, began: float) -> bool:
    """Make the stages of one method; False when the time is over."""
    for name in METHODS[method]:
        outdated = job.stage(name).outdated
        if job.stage(name).complete and not outdated:
            say(f"{job.path.name}: {name} is complete")
        elif plan.budget and time.monotonic() - began > 3600 * plan.budget:
            return False
        else:
            say(f"{job.path.name}: {name}")
        make, _ = maker(name)
        make(job, plan.resolve(name, seed, method), device=plan.device, force=outdated)
    return True


def copy_stage(source: RunDir, target: RunDir, name: str) -> None:
    """Copy a complete stage to another run, unless it is there; the manifest comes last."""
    folders = source.stage(name).path, target.stage(name).path
    if target.stage(name).complete:
        if target.stage(name).hash != source.stage(name).hash:
            raise StreamctlError(
                f"{target.path.name} was made from another {name}",
                where=target.path,
                run=f"mv {target.path} {target.path}.previous, then the same command",
            )
        return
    with disk_errors(folders[1]):
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(*folders, ignore=ignored, dirs_exist_ok=True)
        shutil.copy2(*(folder / MANIFEST for folder in folders))


def ancestors(run: RunDir, stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Manifests of stages and of all that they come from, by name."""
    waiting, found = list(stages), {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = run.stage(name).manifest
            waiting += found[name]["parents"]
    return found


def _write_receipt(run: RunDir, job: RunDir, seed: int) -> None:
    """What was measured and how it was made; the users' ranks first, cut at `LAST`."""
    evaluated = job.stage("eval")
    result, made = read_result(evaluated), ancestors(job, ["eval"])
    prefix = "letter_" if job.path.name.startswith("letter") else ""
    rows = result["methods"] | result["controls"]
    if prefix:
        rows = {name: row for name, row in rows.items() if _is_streams(name)}
    examples = len(load_data(job)[1].train)
    for row in rows.values():
        spent = ancestors(job, row["stages"])
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
    pairs += [(path, folder / name / path.name) for path in (source / "receipts").iterdir()]
    for path, target in pairs:
        with atomic_file(target) as part:
            shutil.copyfile(path, part)


def check_receipt(run: RunDir, path: Path, *, device: str = "auto") -> dict[str, Any]:
    """Make what a receipt describes again, in RUN/check/NAME, and compare every figure.

    Returns:
        `same`, `figures` (how many were compared), `differences` (row, metric, receipt, now),
        `stages` whose artifacts differ, and `changed`: versions and machine.

    Raises:
        StreamctlError: no such receipt, or it is of other data.
    """
    receipt = read_json(path, run="--check with a file of RUN/reproduce/receipts")
    if not isinstance(receipt, dict) or not {"stages", "data_hash", "rows"} <= receipt.keys():
        raise StreamctlError(
            "not a receipt of `streamctl reproduce`",
            where=path,
            run="a file of RUN/reproduce/receipts, or of the folder that --save named",
        )
    if run.require("data").hash != receipt["data_hash"]:
        raise StreamctlError(
            f"the receipt is of other data than {run.path}",
            where=path,
            run="`streamctl data prepare` with the source and the settings of the receipt",
        )
    work = RunDir(run.path / "check" / path.stem)
    copy_stage(run, work, "data")
    recorded = receipt["stages"]
    order = [name for name in MAKERS if name in recorded]
    order += [name for name in recorded if name.startswith("baselines/") and name not in order]
    order += [name for name in recorded if name.startswith("rerank/")]
    for name in order:
        say(f"check: {name}")
        make, cls = maker(name)
        make(work, configs.resolve(cls, base=recorded[name]["config"]), device=device)
    config = configs.resolve(configs.EvalConfig, base=recorded["eval"]["config"])
    result = read_result(evaluate_run(work, config, device=device))
    now = result["methods"] | result["controls"]
    figures, differences = 0, []
    for name, row in receipt["rows"].items():
        fresh = dict(_flat(now[name.removeprefix("letter_")]))
        for metric, value in _flat(row):
            figures += 1
            if fresh.get(metric) != value:
                differences.append(
                    {"row": name, "metric": metric, "receipt": value, "now": fresh.get(metric)}
                )
    stages = [name for name in recorded if work.stage(name).hash != recorded[name]["hash"]]
    here = provenance()
    changed = {
        key: {"receipt": receipt.get(key), "now": here[key]}
        for key in ("versions", "machine", "git")
        if receipt.get(key) != here[key]
    }
    same = not differences and not stages
    return {
        "same": same, "figures": figures, "differences": differences, "stages": stages,
        "changed": changed,
    }  # fmt: skip


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(name, number) of every metric in a row, masked ones and intervals included."""
    for name, value in entry.items():
        if isinstance(value, Mapping) and name == "masked":
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list) and all(isinstance(each, float) for each in value):
            yield from ((f"{prefix}{name}/{number}", each) for number, each in enumerate(value))
        elif isinstance(value, int | float) and name not in SPENT:
            yield prefix + name, value
