"""The stage `eval`: every method and control of a run, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from streamctl.config import EvalConfig, to_dict
from streamctl.data import Examples, load_data
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import RERANKED, Models, Row, choose_rows, known_rows
from streamctl.evaluation.report import plot
from streamctl.evaluation.rerank import DECIDERS, deciders, ranks_by_folds
from streamctl.progress import say
from streamctl.ranking import (
    Recommender,
    bootstrap_mean,
    evaluate,
    gains,
    paired_difference,
    sample_users,
)
from streamctl.ranking.metrics import ItemFacts
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer import vectors as item_vectors

Kept = tuple[dict[str, Any], dict[str, np.ndarray], float]  # a row's entry, ranks and ms a user
METRICS, RANKS = "metrics.json", "ranks.safetensors"
CHOICE = "choice/"  # ranks of the validation users who choose
TIES = {"keep": "kept", "shuffle": "shuffled", "runs": "shuffled, all runs of ascending ids"}
# What each row is compared with, besides TIGER: the strongest baseline, and its own controls.
_CONTROLS = (
    "transitions", "knn", "ranker", "sasrec_ce", "l0", "random_evidence", "no_thinking",
)  # fmt: skip
AGAINST = {
    "stream_pt": _CONTROLS,
    "stream_sft": (*_CONTROLS, "random_thinking", "stream_pt"),
    "stream_rl": (*_CONTROLS, "random_thinking_rl", "stream_sft"),
}


def evaluate_run(
    run: RunDir, config: EvalConfig, *, device: str = "auto", force: bool = False
) -> Stage:
    """Evaluate every method and control that the run has the stages of, and choose the best.

    Figures are of `config.split`; the winner is the method of the highest masked ndcg@10 on (up to
    5,000) validation users, whatever the split. It is what the run answers with from then on.

    Redone whenever a stage it reads, the set of stages, or a setting has changed; rows whose own
    stages are as they were are taken over, unless forced, also those that `config.methods` leaves
    out. The last one is kept as `eval.previous`.
    Its artifacts hold no timing: latencies are in the manifest, and `read_result` joins them.

    Returns:
        the eval stage.

    Raises:
        UsageError: an unknown method is asked for.
        StreamctlError: no data stage, or a stage that is read is missing or stale.
    """
    run.require("data")
    held_out(run, config.split)
    rows, absent = choose_rows(run, config.methods)
    asked = {row.name for row in rows}
    known, gone = _unchanged(run, config, force)
    if force:
        known = {name: row for name, row in known.items() if name not in asked}
    if config.methods:  # the others stay, and so does a winner among them
        rows = [row for row in known_rows(run).values() if row.name in asked | known.keys()]
        if gone := sorted(gone - asked):
            say(f"out of date, and left out of the table: {', '.join(gone)}")
    parents = list(dict.fromkeys(name for row in rows for name in _made(run, row)))
    if absent and len(rows) == 1:
        say("nothing is trained yet: popularity is evaluated alone")
    elif absent:
        say(f"not in this run: {', '.join(absent)}")
    force = force or _outdated(run, config, parents)
    with run.begin("eval", config, parents=parents, force=force) as stage:
        if stage is None:
            say("eval: complete already")
            return run.stage("eval")
        _, split = load_data(run)
        # The seed of a sample of users is none of the run's: runs of several seeds are compared.
        examples = sample_users(getattr(split, config.split), config.users, 0)
        tokenized = run.stage("tokenizer").complete
        facts = ItemFacts(split.popularity(), item_vectors(run) if tokenized else None)
        table = _Table(stage, config, examples, deciders(split.valid), split.n_items, facts)
        models = Models(run, config, examples, device)
        if not stage.resumed:  # else what was interrupted has them, as far as it wanted them
            table.keep({row.name: known[row.name] for row in rows if row.name in known})
        for row in rows:
            if row.name not in table.entries:
                table.add(row.name, row.make(models), _decided(row))
        _judge_reranked(run, rows, table)
        _publish(run, stage, config, rows, table)
    return run.stage("eval")


def held_out(run: RunDir, split: str) -> Examples:
    """The targets to evaluate with.

    Raises:
        StreamctlError: there are none.
    """
    found = getattr(load_data(run)[1], split)
    if not len(found):
        raise StreamctlError(
            f"nobody is held out to evaluate with ({split}): everything trains here",
            where=run.path,
            run="`streamctl eval` of the run that this was made from",
        )
    return found


def _outdated(run: RunDir, config: EvalConfig, parents: list[str]) -> bool:
    stage = run.stage("eval")
    if not stage.complete:
        return False
    made = stage.manifest
    same = made["config"] == _settings(config) and set(made["parents"]) == set(parents)
    return not same or bool(stage.stale_parents())


def _settings(config: EvalConfig) -> dict[str, Any]:
    """As a manifest has them."""
    return json.loads(json.dumps(to_dict(config)))


def _unchanged(run: RunDir, config: EvalConfig, force: bool) -> tuple[dict[str, Kept], set[str]]:
    """Rows of the last evaluation, before one that was interrupted, that are still true; and the
    names of the others. None of a damaged one, which `force` makes anew."""
    stage = run.stage("eval")
    try:
        stage = stage if stage.complete else run.stage("eval.previous")
        if not stage.complete:
            return {}, set()
        manifest, wanted = stage.manifest, _settings(config)
        result, ranks = read_result(stage), load_file(stage.file(RANKS))
    except StreamctlError:
        if stage.name == "eval" and not force:
            raise
        return {}, set()  # what is kept for the user's eyes may be damaged
    before, known = result["methods"] | result["controls"], {}
    if all(manifest["config"].get(key) == wanted[key] for key in wanted if key != "methods"):
        for row in choose_rows(run, ())[0]:
            entry = before.get(row.name)
            stale = any(run.stage(name).outdated for name in row.stages)
            if entry is not None and not stale and entry["made"] == _made(run, row):
                names = (row.name, f"{row.name}/masked", CHOICE + row.name)
                kept = {name: ranks[name].numpy() for name in names if name in ranks}
                known[row.name] = entry, kept, entry.pop("ms_per_user")
    return known, {*before} - {*known}


def _made(run: RunDir, row: Row) -> dict[str, str]:
    """What a row's figures depend on: the data, the tokenizer where there is one, whose vectors say
    how diverse an answer is, and the stages that the row is read from."""
    facts = ("data", *("tokenizer",) * run.stage("tokenizer").complete)
    return {name: run.stage(name).hash for name in dict.fromkeys((*facts, *row.stages))}


@dataclass
class _Table:
    """Ranks and figures of the rows so far; a checkpoint after each row."""

    stage: StageWriter
    config: EvalConfig
    examples: Examples  # to test on
    deciders: Examples  # to choose by
    n_items: int
    facts: ItemFacts

    def __post_init__(self) -> None:
        empty = ({}, {"entries": {}, "latency": {}})
        tensors, meta = self.stage.load_checkpoint() or empty
        self.drawn = {"resamples": self.config.bootstrap, "seed": self.config.seed}
        self.ranks = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.entries: dict[str, dict[str, Any]] = meta["entries"]
        self.latency: dict[str, float] = meta["latency"]

    def add(self, name: str, recommender: Recommender, decided: bool) -> None:
        """Evaluate one row, seen items left in and masked, and keep it, so that an interruption
        does not lose it.

        Args:
            decided: whether it might win, so that validation users judge it.
        """
        options = {"n_items": self.n_items, "batch": self.config.batch}
        found = []
        for end in ("", "/masked"):
            done = evaluate(
                recommender, self.examples, masked=bool(end), facts=self.facts,
                title=f"eval {name}{' masked' if end else ''}", **options,
            )  # fmt: skip
            self.ranks[name + end] = done.ranks
            drawn = {"users": self.examples.users, **self.drawn}
            interval = bootstrap_mean(gains(done.ranks, 10), **drawn)
            found.append(done.metrics | {"interval": [interval.low, interval.high]})
            if not end:
                self.latency[name] = done.ms_per_user
            ms = round(done.ms_per_user, 4)
            self.stage.log(method=name, masked=bool(end), **done.metrics, ms_per_user=ms)
        self.entries[name] = {**found[0], "masked": found[1]}
        if decided and len(self.deciders):
            title = f"choose {name}"
            chosen = evaluate(recommender, self.deciders, masked=True, title=title, **options)
            self.ranks[CHOICE + name] = chosen.ranks
        self._save()

    def _save(self) -> None:
        tensors = {name: torch.from_numpy(ranks) for name, ranks in self.ranks.items()}
        self.stage.save_checkpoint(tensors, {"entries": self.entries, "latency": self.latency})

    def keep(self, rows: Mapping[str, Kept]) -> None:
        """Take over rows of the last evaluation, which an interruption may not lose either."""
        for name, (entry, ranks, latency) in rows.items():
            self.entries[name], self.latency[name] = entry, latency
            self.ranks |= ranks
        self._save()

    def winner(self, names: Sequence[str]) -> dict[str, Any] | None:
        """The best of some methods on validation, and how it differs from the next best."""
        scores = {name: gains(self.ranks[CHOICE + name], 10).mean() for name in names}
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        if not order:
            return None
        best = order[0]
        found: dict[str, Any] = {"method": best, "ndcg@10": float(scores[best]), "next": None}
        if len(order) > 1:
            pair = self.ranks[CHOICE + best], self.ranks[CHOICE + order[1]]
            interval = paired_difference(*pair, users=self.deciders.users, **self.drawn)
            found["next"] = {"method": order[1], **interval.as_dict()}
        return found

    def compare(self, name: str) -> dict[str, dict[str, Any]]:
        """Paired differences of a row to those it is measured by, where they are present."""
        found = {}
        options = {"users": self.examples.users, **self.drawn}
        for other in ("tiger", *AGAINST.get(name, ())):
            if other == name or other not in self.ranks:
                continue
            unmasked, masked = (
                paired_difference(self.ranks[name + end], self.ranks[other + end], **options)
                for end in ("", "/masked")
            )
            found[other] = {**unmasked.as_dict(), "masked": masked.as_dict()}
        return found


def _decided(row: Row) -> bool:
    """Whether validation users judge it here; re-ranked methods were judged by folds."""
    return row.eligible and not row.control and not row.name.endswith(RERANKED)


def _judge_reranked(run: RunDir, rows: list[Row], table: _Table) -> None:
    """Take over how validation users judged the rankers that they did not teach."""
    for row in rows:
        if row.eligible and row.name.endswith(RERANKED):
            found = ranks_by_folds(run.stage(row.stages[-1]))
            ends, wanted = found["ends"].numpy(), table.deciders.end
            if np.isin(wanted, ends).all():
                table.ranks[CHOICE + row.name] = found["after"].numpy()[
                    np.searchsorted(ends, wanted)
                ]
            else:
                say(
                    f"{row.name} learned from fewer validation users than choose, so it cannot "
                    f"win: rerank.users={DECIDERS} or more"
                )


def _publish(
    run: RunDir,
    stage: StageWriter,
    config: EvalConfig,
    rows: list[Row],
    table: _Table,
) -> None:
    data = run.stage("data")
    groups: dict[str, dict[str, Any]] = {"methods": {}, "controls": {}}
    for row in rows:
        note = {"note": row.note} if row.note else {}
        entry = table.entries[row.name] | note | {"stages": list(row.stages)}
        entry["made"] = _made(run, row)
        groups["controls" if row.control else "methods"][row.name] = entry
    labels = _labels(run, stage.parents)
    result = {
        "split": config.split,
        "users": len(np.unique(table.examples.users)),
        "targets": len(table.examples),
        "items": table.n_items,
        "ties": TIES[data.manifest["config"]["ties"]],
        "beam": config.beam,
        "seed": config.seed,
        "data_hash": data.hash,
        **groups,
        "comparisons": {row.name: table.compare(row.name) for row in rows},
        "thinking": labels,
        "collapsed": any(report["collapsed"] for report in labels.values()),
    }
    result["winner"] = table.winner(
        [row.name for row in rows if row.eligible and CHOICE + row.name in table.ranks]
    )
    stage.save_json(METRICS, result)
    kept = {name: torch.from_numpy(ranks) for name, ranks in table.ranks.items()}
    stage.save_tensors(RANKS, kept | {"users": torch.from_numpy(table.examples.users.copy())})
    extra = {"latency_ms": table.latency, "winner": result["winner"]}
    plot(_joined(result, extra), stage.path / "ndcg.png")
    stage.publish(**extra)


def _labels(run: RunDir, parents: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How varied the think labels are, by the stage that reports it."""
    kept = ("distinct_chains", "distinct_targets", "vocabulary", "perplexity", "perplexity_by_step")
    found = {}
    for name in parents:
        manifest = run.stage(name).manifest
        if "collapsed" in manifest:
            report = manifest["labels"][-1] if manifest.get("labels") else manifest  # last round's
            shown = {key: report[key] for key in kept if key in report}
            found[name] = shown | {"collapsed": manifest["collapsed"]}
    return found


def read_result(stage: Stage) -> dict[str, Any]:
    """The whole result of a complete eval stage: metrics.json and the latencies."""
    return _joined(stage.json(METRICS), stage.manifest)


def _joined(result: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    for group in ("methods", "controls"):
        for name, entry in result[group].items():
            entry["ms_per_user"] = extra["latency_ms"][name]
    return result
