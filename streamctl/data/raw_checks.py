"""What is wrong with a log as it was read, before any filter: lines, duplicates, times, items."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from streamctl.data.columns import chunks
from streamctl.data.findings import Finding, count_of
from streamctl.data.order import deal
from streamctl.data.salvage import Damage
from streamctl.data.sources.raw import RawLog

_UNITS = ((1e17, "nanoseconds", 1e9), (1e14, "microseconds", 1e6), (1e11, "milliseconds", 1e3))
_FIRST_YEAR, _FIRST_SECOND = 1990, 631_152_000  # no public log is older
_SAMPLE = 1_000_000  # times that tell the unit


def files_found(raw: RawLog) -> Iterator[Finding]:
    """What the source is: its files, their sizes, what is in them."""
    sizes = ", ".join(f"{path.name} ({_bytes(path.stat().st_size)})" for path in raw.files)
    described = ""
    if raw.catalogue is not None:
        columns = ", ".join(raw.catalogue.columns) or "none"
        described = f"; {count_of(len(raw.catalogue.ids), 'described item')}, columns: {columns}"
    yield Finding(
        "files",
        "good",
        f"{raw.format}: {sizes}: {count_of(len(raw.users), 'interaction')} of "
        f"{count_of(len(raw.user_ids), 'user')} and {count_of(len(raw.item_ids), 'item')}"
        f"{described}",
    )


def bad_lines(damages: list[Damage]) -> Iterator[Finding]:
    """The lines that no reader can take, with their files and numbers."""
    if not damages:
        yield Finding("lines", "good", "every line is well formed")
    for damage in damages:
        yield Finding(
            "lines",
            "error",
            f"{damage.path.name}: {count_of(damage.count, 'bad line')}; `data prepare` stops there",
            "mend or delete them; what follows was found without them",
            [f"{damage.path}:{line}: {reason}" for line, reason in damage.lines],
        )


def repeated_and_unordered(raw: RawLog) -> Iterator[Finding]:
    """Rows that repeat others, and rows that come before an earlier one of their user."""
    exact, repeats, backwards = _count_rows(raw)
    total = len(raw.users)
    if exact:
        yield Finding(
            "duplicates",
            "warning",
            f"{count_of(exact, 'row')} ({exact / total:.1%}) repeat user, item and time exactly",
            "keep one of each, unless they are purchases of several pieces",
        )
    if repeats:
        yield Finding(
            "duplicates",
            "note",
            f"{count_of(repeats, 'interaction')} ({repeats / total:.1%}) take an item that the "
            "user took before",
            "results with seen items masked cannot find these: report both, masked and unmasked",
        )
    else:
        yield Finding("duplicates", "good", "no user takes an item twice")
    if backwards:
        yield Finding(
            "times",
            "note",
            f"{count_of(backwards, 'row')} come before an earlier one of the same user",
            "nothing: `data prepare` sorts by time",
        )


def _count_rows(raw: RawLog) -> tuple[int, int, int]:
    """(exact repeats, rows with an item that the user took before, rows out of order).

    A range of users at a time, so that memory does not hold the log.
    """
    exact = repeats = backwards = 0
    counts = np.zeros(len(raw.user_ids), np.int64)
    for part in chunks(len(raw.users), raw.users):
        counts += np.bincount(raw.users[part], minlength=len(counts))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    everyone = np.arange(len(counts), dtype=np.int32)
    everything = np.zeros(len(raw.item_ids), np.int32)
    for rows in deal(raw, everyone, everything, offsets):
        users, items = rows["user"], rows["item"]
        times = rows["time"] if raw.timed else np.zeros(len(rows), np.int64)
        order = np.argsort(users, kind="stable")
        same_user = np.diff(users[order]) == 0
        backwards += int((same_user & (np.diff(times[order]) < 0)).sum())
        order = np.lexsort((times, items, users))
        same = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
        repeats += int(same.sum())
        if raw.timed:
            exact += int((same & (np.diff(times[order]) == 0)).sum())
    return exact, repeats, backwards


def clock(raw: RawLog) -> Iterator[Finding]:
    """The unit and the span of the times, and those that cannot be."""
    if raw.times is None or not raw.timed:
        yield Finding(
            "times",
            "note",
            "the source gives the order only: ties and the order itself cannot be checked",
            "prefer a copy of the log with its timestamps",
        )
        return
    unit, scale = "seconds", 1.0
    middle = np.median(raw.times[:: max(1, len(raw.times) // _SAMPLE)])
    for least, name, parts in _UNITS:
        if middle >= least:
            unit, scale = name, parts
            break
    impossible, example = 0, 0
    first, last = np.inf, -np.inf
    latest = time.time() + 86_400
    for part in chunks(len(raw.times), raw.times):
        seconds = raw.times[part] / scale
        wrong = (seconds < _FIRST_SECOND) | (seconds > latest)
        if wrong.any():
            example = example if impossible else int(raw.times[part][wrong][0])
            impossible += int(wrong.sum())
        if not wrong.all():
            good = seconds[~wrong]
            first, last = min(first, good.min()), max(last, good.max())
    if impossible == len(raw.times):
        yield Finding("times", "note", "the times are no clock times; only their order is used")
        return
    if impossible:
        yield Finding(
            "times",
            "error",
            f"{count_of(impossible, 'time')} before {_FIRST_YEAR} or in the future, such as "
            f"{example} (most are in {unit})",
            "a missing time (0, -1), or another unit in a part of the file: put it right",
        )
    span = " to ".join(time.strftime("%Y-%m-%d", time.gmtime(t)) for t in (first, last))
    yield Finding("times", "good", f"in {unit}, {span}")


def described_items(raw: RawLog) -> Iterator[Finding]:
    """Whether the items file describes the items of the log."""
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
            f"{count_of(missing, 'item')} of {len(taken):,} in the log are not in the items file",
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
            f"{count_of(unused, 'item')} of the items file are in no interaction",
            "they stay out of the catalogue; --min-item 0 keeps them",
        )


def _bytes(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
