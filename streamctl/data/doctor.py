"""What is wrong with a source, as it was read and as it would be prepared: `data doctor`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.clean import FIRST_YEAR, moment_text, time_units
from streamctl.data.log import InteractionLog, forget, ranges
from streamctl.data.prepare import build, reading_of
from streamctl.data.sources import find_source, read_source
from streamctl.data.sources.items import as_number
from streamctl.data.sources.raw import PARTS, Damage, ItemTable, RawLog, database_errors
from streamctl.data.split import Split
from streamctl.data.statistics import Finding, findings, id_rank, user_items
from streamctl.errors import StreamctlError, count_of

_UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
_FIRST_SECOND = 631_152_000  # of FIRST_YEAR
_ID_TIME = 0.5  # rank correlation of id and first appearance from which ids tell the time
_HEAVY = 0.1  # share of a log from which one user is no customer


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


def examine(source: Path, config: DataConfig) -> Examination:
    """Read a source as `data prepare` would and look for what makes results wrong.

    Bad lines do not stop it: they are listed, and the rest is examined without them.

    Raises:
        StreamctlError: no such path, no format that fits, or nothing at all can be read.
    """
    kind, _ = find_source(source, config.format)
    reading = reading_of(dataclasses.replace(config, skip_bad=1.0))
    items = Path(config.items) if config.items else None
    try:
        raw = read_source(source, config.format, items=items, reading=reading)
    except StreamctlError:
        # Where bad lines alone are in the way, the first one says more than what is left.
        reading = reading_of(dataclasses.replace(config, skip_bad=0.0))
        raw = read_source(source, config.format, items=items, reading=reading)
    with database_errors():
        found = [
            *files_found(raw),
            *bad_lines(raw, reading.damages),
            *repeated_and_unordered(raw),
            *clock(raw),
            *described_items(raw),
            *parts(raw),
        ]
    statistics = None
    try:
        catalog, log, statistics = build(raw, config)
    except StreamctlError as error:
        found.append(Finding("filters", "error", error.what, error.run or ""))
    else:
        found += [
            *filters(statistics),
            *findings(statistics),
            *ties(log, statistics),
            *leakage(catalog, log),
        ]
    names = [str(path) for path in raw.files]
    return Examination(str(source), kind.name, names, found, statistics)


def files_found(raw: RawLog) -> Iterator[Finding]:
    """What the source is: its files, their sizes, what is in them."""
    sizes = ", ".join(f"{path.name} ({decimal(path.stat().st_size)})" for path in raw.files)
    described = ""
    if raw.catalogue is not None:
        columns = ", ".join(raw.catalogue.columns) or "none"
        described = f"; {count_of(len(raw.catalogue.ids), 'described item')}, columns: {columns}"
    read = raw.sizes
    yield Finding(
        "files",
        "good",
        f"{raw.format}: {sizes}: {count_of(read['interactions'], 'interaction')} of "
        f"{count_of(read['users'], 'user')} and {count_of(read['items'], 'item')}"
        f"{described}",
    )


def bad_lines(raw: RawLog, damages: list[Damage]) -> Iterator[Finding]:
    """The lines that no reader can take, with their files and numbers."""
    if not damages:
        yield Finding("lines", "good", "every line is well formed")
    for damage in damages:
        share = max(map(raw.bad_share, damages))
        lines = [f"{damage.path}:{line}: {reason}" for line, reason in damage.lines]
        if damage.count > len(lines):
            lines.append(f"... and {damage.count - len(lines):,} more")
        yield Finding(
            "lines",
            "error",
            f"{damage.path.name}: {count_of(damage.count, 'bad line')}; `data prepare` stops there",
            f"--skip-bad {share:g} leaves them out, as what follows does; or mend them",
            lines,
        )


def repeated_and_unordered(raw: RawLog) -> Iterator[Finding]:
    """Rows that repeat others, rows before an earlier one of their user, and one user too many."""
    total = len(raw)
    repeats = raw.one("SELECT count(*) - count(DISTINCT (u, i)) FROM log")
    exact = raw.one("SELECT count(*) - count(DISTINCT (u, i, t)) FROM log") * raw.timed
    if exact:
        yield Finding(
            "duplicates",
            "warning",
            f"exact repeats of user, item and time: {count_of(exact, 'row')} ({exact / total:.1%})",
            "--drop-repeats, unless they are purchases of several pieces",
        )
    if repeats:
        yield Finding(
            "duplicates",
            "note",
            "items that the user took before: "
            f"{count_of(repeats, 'interaction')} ({repeats / total:.1%})",
            "--one-per-item keeps the first; or report results masked and unmasked, for masked "
            "ones cannot find these",
        )
    else:
        yield Finding("duplicates", "good", "no user takes an item twice")
    backwards = raw.one("""
        SELECT count(*) FROM (SELECT t < lag(t) OVER (PARTITION BY u ORDER BY row) AS b FROM log)
        WHERE b""")
    if backwards:
        yield Finding(
            "times",
            "note",
            f"not in the order of time: {count_of(backwards, 'row')}",
            "nothing: `data prepare` sorts by time",
        )
    name, most, middle = raw.ask("""
        SELECT arg_max(name, n), max(n), median(n)
        FROM (SELECT u, count(*) AS n FROM log GROUP BY u) JOIN users USING (u)""")[0]
    if most and most > _HEAVY * total and most > 20 * middle:
        yield Finding(
            "users",
            "warning",
            f"user {name!r} has {most / total:.1%} of all interactions ({most:,}; half of the "
            f"users have {middle:,.0f} or fewer): a crawler, or a shop's own account",
            f"--max-per-user {max(50, round(20 * middle))} keeps the latest of each user",
        )


def clock(raw: RawLog) -> Iterator[Finding]:
    """The unit and the span of the times, and those that cannot be."""
    if not raw.timed:
        yield Finding(
            "times",
            "note",
            "the source gives the order only: ties and the order itself cannot be checked",
            "prefer a copy of the log with its timestamps",
        )
        return
    parts = time_units(raw)
    unit = "dates" if raw.dates else _UNITS.get(round(parts / raw.scale), "parts of a second")
    least, latest = _FIRST_SECOND * parts, (time.time() + 86_400) * parts
    wrong, example, first, last = raw.ask(
        """SELECT count(*) FILTER (t < $1 OR t > $2), arg_min(t, row) FILTER (t < $1 OR t > $2),
            min(t) FILTER (t BETWEEN $1 AND $2), max(t) FILTER (t BETWEEN $1 AND $2) FROM log""",
        round(least),
        round(latest),
    )[0]
    if wrong == len(raw):
        yield Finding("times", "note", "the times are no clock times; only their order is used")
        return
    if wrong:
        yield Finding(
            "times",
            "error",
            f"{count_of(wrong, 'time')} before {FIRST_YEAR} or in the future, such as "
            f"{moment_text(raw, example)} (most are in {unit}): a missing time (0, -1), or another "
            "unit in a part of the file",
            f"--since {FIRST_YEAR}-01-01 --until {time.strftime('%Y-%m-%d')} leaves them out",
        )
    span = " to ".join(time.strftime("%Y-%m-%d", time.gmtime(t / parts)) for t in (first, last))
    yield Finding("times", "good", f"in {unit}, {span}")


def described_items(raw: RawLog) -> Iterator[Finding]:
    """Whether the items file describes the items of the log."""
    if raw.catalogue is None:
        yield Finding(
            "items",
            "error",
            "no items file: every item gets its id as its text, and codes from it mean nothing",
            "--items FILE, a line {item_id, title, ...} for each item",
        )
        return
    taken, listed = set(raw.names("items")), set(raw.catalogue.ids)
    missing = taken - listed
    if missing:
        plain = set(map(as_number, listed))
        alike = sum(as_number(item) in plain for item in missing)
        yield Finding(
            "items",
            "error" if len(missing) > len(taken) / 2 else "warning",
            f"not in the items file: {count_of(len(missing), 'item')} of {len(taken):,} in the "
            f"log, such as {min(missing)[:60]!r}",
            "--ids number: both files have the same numbers, written in two ways"
            if alike > len(missing) / 2
            else "--described keeps the others; or check that both files write ids alike",
        )
    else:
        yield Finding("items", "good", f"all {len(taken):,} items of the log are in the items file")
    yield from _titles(raw.catalogue, taken)
    unused = len(listed - taken)
    if unused:
        yield Finding(
            "items",
            "note",
            f"in no interaction: {count_of(unused, 'item')} of the items file",
            "they stay out of the catalogue; --min-item 0 keeps them",
        )


def _titles(catalogue: ItemTable, taken: set[str]) -> Iterator[Finding]:
    """Items of the log that the items file lists without a title."""
    if catalogue.title is None:
        yield Finding("items", "warning", "no title column", "call the column `title`")
        return
    rows = zip(catalogue.ids, catalogue.columns[catalogue.title], strict=True)
    untitled = [item for item, title in rows if item in taken and not title.strip()]
    if untitled:
        yield Finding(
            "items",
            "warning" if len(untitled) > 0.05 * len(taken) else "note",
            f"no title: {count_of(len(untitled), 'item')} of {len(taken):,}, such as "
            f"{untitled[0][:60]!r}",
            "fill their titles in: until then people are shown the id, and an item without any "
            "text gets codes that mean nothing",
        )


def parts(raw: RawLog) -> Iterator[Finding]:
    """Whether what a source says to train on knows what it says to test."""
    if not raw.split:
        return
    again = raw.one("""
        SELECT count(*) FROM (SELECT u, i, t FROM log GROUP BY u, i, t
            HAVING min(part) = 0 AND max(part) > 0 AND count(t) > 0)""")
    late = raw.one("""
        SELECT count(*) FROM (SELECT max(t) FILTER (part = 0) > min(t) FILTER (part > 0) AS late
            FROM log GROUP BY u) WHERE late""")
    rows = raw.ask("SELECT part, count(*) FROM log GROUP BY part ORDER BY part")
    sizes = ", ".join(f"{PARTS[part]} {count:,}" for part, count in rows)
    if again or (late and raw.timed):
        yield Finding(
            "leakage",
            "warning",
            f"split already ({sizes}), but train shares {count_of(again, 'interaction')} with a "
            f"later part, and holds what comes after a target of {count_of(late, 'user')}",
            "--split leave-one-out or --split-at 80%,90% makes a split of all parts together",
        )
    else:
        yield Finding("leakage", "good", f"split already ({sizes}), and train holds nothing later")


def filters(facts: dict[str, Any]) -> Iterator[Finding]:
    """What each filter takes."""
    removed, read = facts["removed"], facts["read"]
    if not removed["users"] and not removed["items"]:
        yield Finding("filters", "good", "no filter takes anything")
        return
    lost = 1 - facts["interactions"] / read["interactions"]
    yield Finding(
        "filters",
        "warning" if lost > 0.5 else "note",
        f"in {count_of(removed['rounds'], 'round')} go {removed['users']:,} of {read['users']:,} "
        f"users, {removed['items']:,} of {read['items']:,} items, {lost:.1%} of interactions",
        "--min-user and --min-item keep more; state them with results",
        [
            f"{count_of(removed[which], noun)} with fewer than {removed[least]} interactions, and "
            f"{count_of(removed[f'interactions_of_{which}'], 'interaction')} with them"
            for which, noun, least in (
                ("short_users", "user", "min_user"),
                ("rare_items", "item", "min_item"),
            )
        ],
    )


def ties(log: InteractionLog, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether chance decides which interaction is the test."""
    if log.timestamps is None or log.cuts is not None:
        return
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


def leakage(catalog: Catalog, log: InteractionLog) -> Iterator[Finding]:
    """Test items that no model can know, and those that every model can copy or guess."""
    split, size = Split(log, n_items=len(catalog)), len(catalog)
    trained, taken, own = np.zeros(size, bool), np.zeros(size, bool), 0
    tested, appears = np.zeros(size, np.int64), np.full(size, np.iinfo(np.int64).max)
    for first, last in ranges(log.offsets):
        part = slice(log.offsets[first], log.offsets[last])
        items, lengths = log.items[part], log.lengths[first:last]
        places = np.arange(part.start, part.stop)
        again = np.ones(len(items), bool)  # taken by its user before
        again[np.unique(user_items(log, first, last, size), return_index=True)[1]] = False
        test = places >= np.repeat(split.test_from[first:last], lengths)
        test[log.offsets[first:last] - part.start] = False  # nothing to predict it from
        taken[items] = True
        trained[items[places < np.repeat(split.valid_from[first:last], lengths)]] = True
        tested += np.bincount(items[test], minlength=size)
        own += int((again & test).sum())
        if log.timestamps is not None:
            np.minimum.at(appears, items, log.timestamps[part])
        forget(log.items)
        forget(log.timestamps)
    total, cold = max(int(tested.sum()), 1), int(tested[~trained].sum())
    if cold:
        yield Finding(
            "cold items",
            "warning" if cold > 0.05 * total else "note",
            f"never in training: {count_of(cold, 'test item')} ({cold / total:.1%})",
            "only a model that reads text can find them; a higher --min-item leaves fewer",
        )
    else:
        yield Finding("cold items", "good", "every test item occurs in training")
    if own:
        yield Finding(
            "leakage",
            "warning" if own > 0.05 * total else "note",
            f"in the user's own history: {count_of(own, 'test item')} ({own / total:.1%})",
            "repeat purchases: a model scores by copying. --one-per-item takes them out; or "
            "report results with seen items masked",
        )
    else:
        yield Finding("leakage", "good", "no test item is in its user's own history")
    if log.timestamps is None or taken.sum() < 3:
        return
    ranks = [np.argsort(np.argsort(v[taken])) for v in (id_rank(catalog.ids), appears)]
    tie = float(np.corrcoef(*ranks)[0, 1])
    if abs(tie) > _ID_TIME:
        yield Finding(
            "leakage",
            "note",
            f"item ids follow the time of first appearance (rank correlation {tie:.2f})",
            "nothing here: `data prepare` numbers items at random; other tools may not",
        )
