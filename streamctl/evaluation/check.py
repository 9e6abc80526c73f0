"""A receipt run again: every stage from its recorded configuration, every figure compared."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamctl import config as configs
from streamctl.baselines.train import train_baseline
from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.evaluation.jobs import copy_stage
from streamctl.evaluation.stage import TIES, evaluate_run, read_result
from streamctl.progress import say
from streamctl.runs import RunDir, Stage, provenance, read_json
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import TWIN, sft

TIMES = ("ms_per_user", "train_s")  # no rerun repeats them
# Stages in the order in which they are made; baselines come after these.
_MAKERS: dict[str, tuple[Callable[..., Stage], type]] = {
    "tokenizer": (tokenize, configs.TokenizeConfig),
    "pretrain": (pretrain, configs.PretrainConfig),
    "annotate": (annotate, configs.AnnotateConfig),
    "sft": (sft, configs.SftConfig),
    "rl": (rl, configs.RlConfig),
    TWIN: (functools.partial(sft, twin=True), configs.SftConfig),
}
_BASELINE = (train_baseline, configs.BaselineConfig)
_FROM = {"annotate": "pretrain", "sft": "annotate", "rl": "sft", TWIN: "pretrain"}


def check_receipt(run: RunDir, path: Path, *, device: str = "auto") -> dict[str, Any]:
    """Rerun what a receipt of `reproduce` or of benchmarks/pipeline.py describes, and compare.

    The stages are made in RUN/check/NAME, itself a run that resumes, from a copy of the run's data
    stage and from the configurations and seeds in the receipt.

    Args:
        run: its data stage is made of what the receipt's was. Its hash may differ, since the
            report of another version may say more: then items and ties have to agree, and the
            figures decide.

    Returns:
        `same`, `figures` (how many were compared), `differences` (row, metric, receipt, now),
        `stages` whose artifacts have another hash, and `changed`: versions, machine and data.

    Raises:
        StreamctlError: no such receipt, or it is of other data.
    """
    receipt = read_json(path)
    if not isinstance(receipt, dict) or not {"stages", "data_hash"} <= receipt.keys():
        raise StreamctlError(
            "not a receipt of trained stages", where=path, run="a file of `streamctl reproduce`"
        )
    data = run.require("data")
    if data.hash != receipt["data_hash"]:
        _refuse_other_data(run, receipt, path)
        say("check: the data stage has another hash than in the receipt, the figures will tell")
    recorded = receipt["stages"]
    for name, parent in _FROM.items():
        if name in recorded and parent not in recorded:
            raise StreamctlError(
                f"the receipt does not say how {parent} was made, from which {name} starts",
                where=path,
                run="a receipt of this version",
            )
    work = RunDir(run.path / "check" / path.stem)
    if work.stage("data").complete and work.stage("data").hash != data.hash:
        shutil.rmtree(work.path)  # a check of what the run's data were before
    if not work.stage("data").complete:
        copy_stage(run, work, "data")
    order = [*_MAKERS, *(name for name in sorted(recorded) if name.startswith("baselines/"))]
    for name in dict.fromkeys(order):
        if name in recorded:
            say(f"check: {name}")
            make, cls = _MAKERS.get(name, _BASELINE)
            settings = recorded[name]["config"]
            if name in _MAKERS or name == "baselines/tiger":  # others never had a setting of BEFORE
                before = configs.BEFORE.items()
                settings = {key: value for key, value in before if key in vars(cls)} | settings
            make(work, configs.resolve(cls, base=settings), device=device)
    result = read_result(evaluate_run(work, _evaluation(receipt), device=device))
    return compare(receipt, result, work)


def _refuse_other_data(run: RunDir, receipt: Mapping[str, Any], path: Path) -> None:
    """Raise rather than train for hours on what cannot be the receipt's data."""
    known = receipt.get("evaluation", receipt)
    data = run.stage("data")
    items, ties = load_data(run)[1].n_items, TIES[data.manifest["config"]["ties"]]
    if (known["items"], known["ties"]) != (items, ties):
        raise StreamctlError(
            f"the receipt is of other data than {data.path}: {known['items']:,} items with ties "
            f"{known['ties']}, where these are {items:,} with ties {ties}",
            where=path,
            run="`streamctl data prepare` with the source and the settings of the receipt",
        )


def _evaluation(receipt: Mapping[str, Any]) -> configs.EvalConfig:
    """The evaluation's configuration: recorded as a stage, or as the plan of a job."""
    if "eval" in receipt["stages"]:
        return configs.resolve(configs.EvalConfig, base=receipt["stages"]["eval"]["config"])
    rows = tuple(entry["row"] for entry in receipt["rows"].values() if "stages" in entry)
    plan = receipt["plan"]
    base = plan.get("settings", {}).get("eval", {})
    sets = [text for text in plan.get("sets", ()) if text.startswith("eval.")]  # of older receipts
    own = {"seed": receipt["seed"], "methods": rows}
    return configs.resolve(configs.EvalConfig, base=base, sets=sets, **own)


def compare(receipt: Mapping[str, Any], result: Mapping[str, Any], work: RunDir) -> dict[str, Any]:
    """What is the same in a receipt and in the evaluation of its rerun."""
    now = result["methods"] | result["controls"]
    figures, differences = 0, []
    for name, entry in _rows(receipt):
        fresh = now[entry.get("row", name)]
        for metric, value in _flat(entry):
            figures += 1
            again = dict(_flat(fresh)).get(metric)
            if again != value:
                differences.append({"row": name, "metric": metric, "receipt": value, "now": again})
    here = provenance() | {"data_hash": work.stage("data").hash}
    same_data = here["data_hash"] == receipt["data_hash"]
    stages = [
        name
        for name, stage in receipt["stages"].items()
        if "hash" in stage
        and (same_data or name not in ("data", "eval"))  # eval's artifact holds the data's hash
        and work.stage(name).hash != stage["hash"]
    ]
    changed = {
        key: {"receipt": receipt.get(key), "now": here[key]}
        for key in ("versions", "machine", "git", "data_hash")
        if receipt.get(key) != here[key]
    }
    return {
        "same": not differences and not stages,
        "figures": figures,
        "differences": differences,
        "stages": stages,
        "changed": changed,
    }


def _rows(receipt: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a receipt but the wide beam, whose width is a matter of time."""
    evaluation = receipt.get("evaluation", {})
    rows = receipt.get("rows") or evaluation["methods"] | evaluation["controls"]
    return ((name, entry) for name, entry in rows.items() if "stages" in entry)


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, number) of every metric in a row, masked ones and intervals included."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list) and all(isinstance(each, float) for each in value):
            yield from ((f"{prefix}{name}/{number}", each) for number, each in enumerate(value))
        elif isinstance(value, int | float) and name not in TIMES:
            yield prefix + name, value
