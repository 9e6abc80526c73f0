"""The table of a paper: every method with every seed, receipts, and a check that they repeat."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamctl import config as configs
from streamctl.baselines.registry import BASELINES, resolved, settings
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.evaluation.makers import MAKERS, maker
from streamctl.evaluation.methods import RERANK, RERANKED, known_rows, method_names
from streamctl.evaluation.receipts import SPENT, write_receipt, write_table
from streamctl.evaluation.rerank import rerank
from streamctl.evaluation.stage import evaluate_run, read_result
from streamctl.files import read_json
from streamctl.progress import say, warn
from streamctl.provenance import provenance
from streamctl.runs import RunDir
from streamctl.training.sft import TWIN

_STREAM = ("pretrain", "annotate", "sft", "rl")
METHODS: dict[str, tuple[str, ...]] = {
    **{name: (f"baselines/{name}",) if name != "popularity" else () for name in BASELINES},
    "stream": _STREAM,
    "letter": (*_STREAM, TWIN),  # with its control, the same steps without a thought
}
# Re-ranked by one ranker, too, where all are there: on Beauty the best row (docs/results.md).
TOGETHER = ("stream_rl", "sasrec_ce", "bert4rec")
LETTER = ("pretrain.thoughts=vocabulary", "pretrain.retrieve=target")  # the paper's own stages


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
            for stage in METHODS[name] or (f"baselines/{name}",):
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
                    run.copy(stage, job)
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
            write_receipt(run, job, seed)
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
    run.copy("data", work)
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
