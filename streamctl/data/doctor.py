"""What is wrong with a source, and the remedy for each: `data doctor`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.data.prepare import build
from streamctl.data.salvage import Damage, salvage
from streamctl.data.sources import find_source
from streamctl.data.sources.raw import RawLog
from streamctl.data.split import Split
from streamctl.data.statistics import id_rank, is_sorted_by_id, is_tie_biased
from streamctl.errors import StreamctlError

Level = Literal["good", "note", "warning", "error"]
_UNITS = ((1e17, "nanoseconds", 1e9), (1e14, "microseconds", 1e6), (1e11, "milliseconds", 1e3))
_FIRST_YEAR, _FIRST_SECOND = 1990, 631_152_000  # no public log is older
_ID_TIME = 0.5  # rank correlation of id and first appearance from which ids tell the time


@dataclass(frozen=True)
class Finding:
    """One thing examined: how bad it is, what was seen, and what to do about it."""

    topic: str
    level: Level
    what: str
    remedy: str = ""
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Examination:
    """All findings about a source, and the statistics `data prepare` would print of it."""

    source: str
    format: str
    files: list[str]
    findings: list[Finding]
    statistics: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    source: Path,
    config: DataConfig,
    *,
    columns: Mapping[str, str] | None = None,
) -> Examination:
    """Read a source as `data prepare` would and look for what makes results wrong.

    Bad lines do not stop it: they are listed, and the rest is examined without them.

    Raises:
        StreamctlError: no such path, no format that fits, or nothing at all can be read.
    """
    kind, files = find_source(source, config.format)
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            raw = kind.read(files, columns)
            damages: list[Damage] = []
        except StreamctlError as first:
            kept, damages = salvage(files, Path(folder), columns)
            if not damages:
                raise
            try:
                raw = kind.read(kept, columns)
            except StreamctlError:
                raise first from None  # it names the source's file, not the copy
    raw.files = tuple(filter(None, (files.interactions, files.items)))
    findings += _bad_lines(damages)
    findings += [*_duplicates(raw), *_times(raw), *_catalogue(raw)]
    statistics = None
    try:
        catalog, log, statistics = build(raw, config)
    except StreamctlError as error:
        findings.append(Finding("filters", "error", error.what, error.run or ""))
    else:
        findings += [
            *_filters(raw, statistics),
            *_order(raw, log, statistics),
            *_leakage(catalog, log, config),
            *_published(statistics),
        ]
    names = [str(path) for path in raw.files]
    return Examination(str(source), kind.name, names, findings, statistics)


def _bad_lines(damages: list[Damage]) -> Iterator[Finding]:
    if not damages:
        yield Finding("lines", "good", "every line is well formed")
    for damage in damages:
        yield Finding(
            "lines",
            "error",
            f"{damage.path.name}: {_count(damage.count, 'bad line')}; `data prepare` stops there",
            "mend or delete them; what follows was found without them",
            [f"{damage.path}:{line}: {reason}" for line, reason in damage.lines],
        )


def _duplicates(raw: RawLog) -> Iterator[Finding]:
    pairs = raw.users.astype(np.int64) * len(raw.item_ids) + raw.items
    order = (
        np.argsort(pairs, kind="stable") if raw.times is None else np.lexsort((raw.times, pairs))
    )
    same = np.diff(pairs[order]) == 0
    repeats = int(same.sum())
    total = len(pairs)
    if raw.timed:
        exact = int((same & (np.diff(raw.times[order]) == 0)).sum())
        if exact:
            yield Finding(
                "duplicates",
                "warning",
                f"{_count(exact, 'row')} ({exact / total:.1%}) repeat user, item and time exactly",
                "keep one of each, unless they are purchases of several pieces",
            )
    if repeats:
        yield Finding(
            "duplicates",
            "note",
            f"{_count(repeats, 'interaction')} ({repeats / total:.1%}) take an item that the user "
            "took before",
            "results with seen items masked cannot find these: report both, masked and unmasked",
        )
    else:
        yield Finding("duplicates", "good", "no user takes an item twice")


def _times(raw: RawLog) -> Iterator[Finding]:
    if raw.times is None or not raw.timed:
        yield Finding(
            "times",
            "note",
            "the source gives the order only: ties and the order itself cannot be checked",
            "prefer a copy of the log with its timestamps",
        )
        return
    times = raw.times
    unit, scale = "seconds", 1.0
    for least, name, parts in _UNITS:
        if np.median(times) >= least:
            unit, scale = name, parts
            break
    seconds = times / scale
    impossible = (seconds < _FIRST_SECOND) | (seconds > time.time() + 86_400)
    if impossible.all():
        yield Finding("times", "note", "the times are no clock times; only their order is used")
        return
    if impossible.any():
        example = times[impossible][0]
        yield Finding(
            "times",
            "error",
            f"{_count(int(impossible.sum()), 'time')} before {_FIRST_YEAR} or in the future, such "
            f"as {example} (most are in {unit})",
            "a missing time (0, -1), or another unit in a part of the file: put it right",
        )
    good = seconds[~impossible]
    span = " to ".join(time.strftime("%Y-%m-%d", time.gmtime(t)) for t in (good.min(), good.max()))
    yield Finding("times", "good", f"in {unit}, {span}")
    order = np.argsort(raw.users, kind="stable")
    backwards = (np.diff(times[order]) < 0) & (np.diff(raw.users[order]) == 0)
    if backwards.any():
        yield Finding(
            "times",
            "note",
            f"{_count(int(backwards.sum()), 'row')} come before an earlier one of the same user",
            "nothing: `data prepare` sorts by time",
        )


def _catalogue(raw: RawLog) -> Iterator[Finding]:
    if raw.catalogue is None:
        yield Finding(
            "items",
            "error",
            "no items file: every item gets its id as its text, and codes from it mean nothing",
            "put items.jsonl ({item_id, title, ...} a line) beside the interactions",
        )
        return
    taken, listed = set(raw.item_ids.to_pylist()), set(raw.catalogue.ids)
    missing = len(taken - listed)
    if missing:
        yield Finding(
            "items",
            "error" if missing > len(taken) / 2 else "warning",
            f"{_count(missing, 'item')} of {len(taken):,} in the log are not in the items file",
            "add them, or check that both files write ids alike (leading zeros, case)",
        )
    elif raw.catalogue.title is None:
        yield Finding("items", "warning", "no title column", "call the column `title`")
    else:
        yield Finding("items", "good", f"all {len(taken):,} items of the log are in the items file")
    unused = len(listed - taken)
    if unused:
        yield Finding(
            "items",
            "note",
            f"{_count(unused, 'item')} of the items file are in no interaction",
            "they stay out of the catalogue; --min-item 0 keeps them",
        )


def _filters(raw: RawLog, facts: dict[str, Any]) -> Iterator[Finding]:
    removed, read = facts["removed"], facts["read"]
    if not removed["users"] and not removed["items"]:
        yield Finding("filters", "good", "no filter takes anything")
        return
    lost = 1 - facts["interactions"] / read["interactions"]
    yield Finding(
        "filters",
        "warning" if lost > 0.5 else "note",
        f"users with fewer than {removed['min_user']} interactions and items with fewer than "
        f"{removed['min_item']} go, {removed['rounds']} times over: {removed['users']:,} of "
        f"{read['users']:,} users, {removed['items']:,} of {read['items']:,} items, {lost:.1%} of "
        "interactions",
        "--min-user and --min-item keep more; state them with results",
    )


def _order(raw: RawLog, log: InteractionLog, facts: dict[str, Any]) -> Iterator[Finding]:
    ascending, above = facts["ascending_ids"], facts["test_id_above_valid_id"]
    if is_sorted_by_id(facts):
        yield Finding(
            "order",
            "error",
            f"the sequences are sorted by item id ({ascending:.0%} of neighbours ascend), not by "
            "time: every result on them is meaningless",
            "get the log with its timestamps",
        )
    elif is_tie_biased(facts):
        yield Finding(
            "order",
            "warning",
            f"P(id of the test item > id of the valid item) is {above:.2f}, 0.50 is unbiased: "
            "items taken at the same time were sorted by id, or ids follow the time",
            "--ties shuffle" if raw.timed else "state it with results, or get the timestamps",
        )
    else:
        yield Finding("order", "good", "the order of items has nothing to do with their ids")
    if raw.timed:
        tied = log.timestamps[log.offsets[1:] - 1] == log.timestamps[log.offsets[1:] - 2]
        share = float(tied.mean())
        yield Finding(
            "order",
            "warning" if share > 0.1 else "good",
            f"{share:.1%} of users have their valid and test item at the same time; "
            f"{facts['tied_neighbours']:.1%} of all neighbours are at the same time",
            "which of them is the test item is chance: --ties shuffle, and state it"
            if share > 0.1
            else "",
        )


def _leakage(catalog: Catalog, log: InteractionLog, config: DataConfig) -> Iterator[Finding]:
    split = Split(log, config.history, len(catalog))
    everyone = np.arange(log.n_users)
    targets = split.test.targets
    cold = int((split.popularity()[targets] == 0).sum())
    if cold:
        yield Finding(
            "cold items",
            "warning" if cold > 0.05 * log.n_users else "note",
            f"{_count(cold, 'test item')} ({cold / log.n_users:.1%}) never occur in training",
            "only a model that reads text can find them; a higher --min-item leaves fewer",
        )
    else:
        yield Finding("cold items", "good", "every test item occurs in training")
    seen = split.test.seen(everyone)
    own = sum(int(t in s) for t, s in zip(targets.tolist(), seen, strict=True))
    if own:
        yield Finding(
            "leakage",
            "warning" if own > 0.05 * log.n_users else "note",
            f"{_count(own, 'test item')} ({own / log.n_users:.1%}) are in the user's own history",
            "repeat purchases: a model scores by copying. Report results with seen items masked",
        )
    else:
        yield Finding("leakage", "good", "no test item is in its user's own history")
    if log.timestamps is not None:
        first = np.full(len(catalog), np.iinfo(np.int64).max)
        np.minimum.at(first, log.items, log.timestamps)
        taken = np.flatnonzero(first < np.iinfo(np.int64).max)
        ranks = [np.argsort(np.argsort(v[taken])) for v in (id_rank(catalog.ids), first)]
        tie = float(np.corrcoef(*ranks)[0, 1]) if len(taken) > 2 else 0.0
        if abs(tie) > _ID_TIME:
            yield Finding(
                "leakage",
                "note",
                f"item ids follow the time of first appearance (rank correlation {tie:.2f})",
                "nothing here: `data prepare` numbers items at random; other tools may not",
            )


def _published(facts: dict[str, Any]) -> Iterator[Finding]:
    known = facts["published"]
    if known is None:
        return
    names = [n for n in ("users", "items", "interactions") if known[n] != facts[n]]
    if names:
        found = ", ".join(f"{n} {facts[n]:,} (published {known[n]:,})" for n in names)
        yield Finding(
            "published",
            "warning",
            f"not {known['name']} as in {known['source']}: {found}",
            "check the copy and the filters before comparing with published results",
        )
    else:
        yield Finding("published", "good", f"as {known['name']} in {known['source']}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
