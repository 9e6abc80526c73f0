"""Interaction tables with named columns: csv, tsv, parquet, jsonl; DuckDB reads all but json."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb

from streamctl.data.sources.items import USER_NAMES, find_column, good_rows, id_text, json_rows
from streamctl.data.sources.raw import SHOWN, RawLog, Reading, database_errors
from streamctl.data.sources.source import Files, Source, beside, parts_of, pick
from streamctl.data.sources.text import (
    delimiter_of,
    first_line,
    first_sentence,
    header_of,
    plain_name,
)
from streamctl.data.sources.times import DATE, INTEGER, LARGEST_TIME, NUMBER
from streamctl.errors import StreamctlError, did_you_mean

ITEM_NAMES = ("item_id", "item", "itemid", "iid", "parent_asin", "asin", "movieid", "product_id",
              "article_id", "sid")  # fmt: skip
TIME_NAMES = ("timestamp", "time", "ts", "unixreviewtime", "unix_time", "event_time", "datetime",
              "date", "t_dat")  # fmt: skip
POSITION_NAMES = ("position", "pos", "sequence_number")
RATING_NAMES = ("rating", "overall", "stars", "score")
EVENT_NAMES = ("event", "event_type", "eventtype", "behavior", "behavior_type", "action",
               "action_type", "interaction_type")  # fmt: skip
NEEDED = ("user", "item", "time")
ROLES = (*NEEDED, "rating", "event")
_USUAL = (USER_NAMES, ITEM_NAMES, TIME_NAMES + POSITION_NAMES, RATING_NAMES, EVENT_NAMES)
_KINDS = ("csv", "tsv", "parquet", "jsonl")
_LONGEST_LINE = 2_000_000
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_VALUE = re.compile(r"\d[\d.,:/TZ +-]*").fullmatch  # a number or a time, which no column is called
_TIME_HELP = (
    "write 2024-01-31, 2024-01-31 18:30:00 or a number, or name another column with "
    "--columns time=NAME"
)


def read_table(
    files: Files,
    reading: Reading,
    *,
    format_name: str,
    delimiter: str | None = None,
    names: Sequence[str] = (),
    quoted: bool = True,
) -> RawLog:
    """A table of interactions, a row each, or several that are the parts of a split.

    Args:
        files: .csv, .tsv, .parquet, .jsonl or .json, and all but parquet with .gz or .zst.
        delimiter: for text; by default a tab in .tsv and .inter, else what parts the header.
        names: the columns, where the file has no header.
        quoted: whether texts may be in double quotes.

    Raises:
        StreamctlError: a missing column (naming those found), a malformed line (file and line),
            a time that is no number or date, an empty file.
    """
    paths = files.parts or (files.interactions,)
    packed = {path: 4 if path.suffix.lower() in _COMPRESSIONS else 1 for path in paths if path}
    size = sum(path.stat().st_size * times for path, times in packed.items())
    raw = RawLog(size, reading, bool(files.parts))
    raw.format = format_name
    known = None  # whether the times of the parts so far are dates
    for part, path in enumerate(paths):
        if path is None:
            continue
        name = plain_name(path)
        with database_errors(path):
            again = None
            if name.endswith(".parquet"):
                roles = _parquet(raw, path, part, reading)
            elif name.endswith((".jsonl", ".json")):
                roles = _json(raw, path, part, reading)
            else:
                tabs = name.endswith((".tsv", ".inter"))
                parted = delimiter or ("\t" if tabs else delimiter_of(path))
                text = _Text(path, parted, quoted, *header_of(path, parted, names, quoted=quoted))
                roles = _wanted(raw, find_roles(text.header, reading.columns, path), reading, path)
                again = partial(_line_by_line, raw, text, part, reading, roles)
                if not _at_once(raw, text, part, roles):
                    again()
                    again = None
            dates = _check_values(raw, path, part, reading, roles, again) if roles else None
            known = dates if known is None else known
            if dates is not None and dates != known:
                words = ("dates", "numbers") if dates else ("numbers", "dates")
                raise StreamctlError(
                    f"{roles['time']} holds {words[0]} here and {words[1]} in {paths[0].name}",
                    where=path,
                    run="write all parts alike",
                )
            if not part and not raw.one("SELECT count(*) FROM staged"):
                raise StreamctlError(
                    "the file holds no interactions",
                    where=path,
                    run="a file with a line for each interaction: user_id,item_id,timestamp",
                )
            raw.timed = raw.timed and find_column([roles.get("time", "")], POSITION_NAMES) is None
    with database_errors(paths[0]):
        return raw.finish()


def find_roles(found: Sequence[str], columns: Mapping[str, str], path: Path) -> dict[str, str]:
    """The columns of users, items and times, and of ratings and events where there are such.

    Raises:
        StreamctlError: one that is needed is missing.
    """
    if len(set(found)) < len(found):
        twice = next(name for name in found if list(found).count(name) > 1)
        raise StreamctlError(
            f"column {twice!r} occurs twice in the header",
            where=path,
            line=1,
            run="rename one of the two",
        )
    usual = dict(zip(ROLES, _USUAL, strict=True))
    roles, missing, hints = {}, {}, []
    for role in ROLES:
        wanted = columns.get(role)
        name = wanted if wanted in found else None
        if name is None:
            name = find_column(found, [wanted.lower()] if wanted else usual[role])
        if name is not None:
            roles[role] = name
        elif wanted or role in NEEDED:
            missing[role] = wanted or {"time": "timestamp or position"}.get(role, f"{role}_id")
            near = did_you_mean(wanted or usual[role][0], [name[:80] for name in found[:100]])
            hints += [near] if near else []
    text = not plain_name(path).endswith((".parquet", ".jsonl", ".json"))
    if text and len(missing) == len(NEEDED) and not columns and any(map(_VALUE, found)):
        raise StreamctlError(
            f"the header is missing: the first line looks like data: {_listed(found)}",
            where=path,
            line=1,
            run="put a first line that names the columns above it: user_id,item_id,timestamp",
        )
    if missing:
        named = ",".join(f"{role}=NAME" for role in missing)
        other = ""
        if len(missing) == len(NEEDED):
            other = ", or a first line that names the columns"
        elif list(missing) == ["time"]:
            other = ", or a column position that counts each user's items from the oldest"
        elif "user" in missing and "item" in roles:
            other = "; or, if this file lists the items, `LOG --items THIS` with the log first"
        raise StreamctlError(
            "; ".join(
                [f"no column {', '.join(missing.values())}", f"columns: {_listed(found)}", *hints]
            ),
            where=path,
            run=f"--columns {named}{other}",
        )
    return roles


def _listed(names: Sequence[str]) -> str:
    """Column names for people, however many and long they are."""
    shown = [repr(name if len(name) <= 40 else name[:40] + "...") for name in names[:20]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(shown) + more


def _wanted(raw: RawLog, roles: dict[str, str], reading: Reading, path: Path) -> dict[str, str]:
    """The roles to read; those that are there and not asked for are noted.

    Raises:
        StreamctlError: a column that is asked for is missing.
    """
    wanted = {role: roles[role] for role in NEEDED}
    for role in ("rating", "event"):
        if getattr(reading, role):
            if role not in roles:
                raise StreamctlError(
                    f"no column of {role}s", where=path, run=f"--columns {role}=NAME"
                )
            wanted[role] = roles[role]
        elif role in roles:
            raw.unread[role] = roles[role]
    return wanted


@dataclass(frozen=True)
class _Text:
    """A text table; its rows begin behind line `first`."""

    path: Path
    delimiter: str
    quoted: bool
    first: int
    header: list[str]


def _at_once(raw: RawLog, text: _Text, part: int, roles: Mapping[str, str]) -> bool:
    """Stage a text table with DuckDB: whether all lines are well formed; else nothing is staged."""
    places = {role: f"c{text.header.index(name)}" for role, name in roles.items()}
    columns = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(text.header)))
    quote = '"' if text.quoted else ""
    compression = _COMPRESSIONS.get(text.path.suffix.lower(), "none")
    source = f"""
        read_csv({raw.link(text.path)}, delim = '{text.delimiter}', quote = '{quote}',
            escape = '{quote}', header = false, skip = {text.first}, auto_detect = false,
            compression = '{compression}', columns = {{{columns}}}, hive_partitioning = false,
            max_line_size = {_LONGEST_LINE}, strict_mode = true)"""
    try:
        raw.stage(places, source, part)
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error:  # a bad line, a file cut short, lines that end now so, now so
        return False
    return True


def _line_by_line(
    raw: RawLog, text: _Text, part: int, reading: Reading, roles: Mapping[str, str]
) -> None:
    """Stage a text table with the lines of its rows, and report those that are bad."""
    pick = itemgetter(*(text.header.index(name) for name in roles.values()))
    found = good_rows(
        text.path, reading, "keep" if reading.skip_bad else "utf-8", text.first,
        text.delimiter, len(text.header), quoted=text.quoted, strict=True,
    )  # fmt: skip
    raw.add_rows(("line", *roles), ((line, *pick(row)) for line, row in found), part)


def _check_values(
    raw: RawLog,
    path: Path,
    part: int,
    reading: Reading,
    roles: Mapping[str, str],
    again: Callable[[], None] | None,
) -> bool | None:
    """Delete the rows of this part without ids or a time, and report them.

    Args:
        again: stages the part anew with the lines of its rows; None: they are known, or the number
            of a row is its line.

    Returns:
        whether the times are dates; None: there are none.
    """
    here = f"FROM {_rows_of(raw, part)}"
    good = f"user_id <> '' AND item_id <> '' AND {INTEGER}"
    whole, total = raw.ask(f"SELECT count(*) FILTER ({good}), count(*) {here}")[0]
    if whole == total:
        return False if total else None
    raw.whole = False
    numbers, dates = raw.ask(f"SELECT count({NUMBER}), count({DATE}) {here}")[0]
    # In a column of both, what is rarer is wrong; among equals, what comes later.
    rarer = NUMBER if numbers < dates else DATE
    if numbers == dates and raw.one(f"SELECT {NUMBER} IS NULL {here} ORDER BY rowid LIMIT 1"):
        rarer = NUMBER
    kind = f"""CASE
        WHEN user_id IS NULL OR user_id = '' THEN 'user' WHEN item_id IS NULL OR item_id = ''
        THEN 'item' WHEN abs({NUMBER}) > {LARGEST_TIME} THEN 'large'
        WHEN {NUMBER} IS NULL AND {DATE} IS NULL THEN 'time'
        WHEN {rarer} IS NOT NULL THEN 'mixed' END"""
    count = raw.one(f"SELECT count({kind}) {here}")
    if count and again is not None:
        raw.con.execute(f"DELETE {here}")
        again()
        return _check_values(raw, path, part, reading, roles, None)
    if count:
        line = f"rowid - (SELECT min(rowid) {here}) + 1"
        line = f"coalesce(line, {line})" if "line" in raw.extra else line
        limit = SHOWN if reading.skip_bad else 1
        found = raw.ask(f"""
            SELECT {line}, {kind} AS kind, left(time, 100) {here} AND {kind} IS NOT NULL
            ORDER BY rowid LIMIT {limit}""")
        told = [(line, _reason(kind, roles, time)) for line, kind, time in found]
        if not reading.skip_bad:
            reading.bad(path, *told[0], None if found[0][1] in ("user", "item") else _TIME_HELP)
        reading.count(path, told, count)
        raw.con.execute(f"DELETE {here} AND {kind} IS NOT NULL")
    return rarer == NUMBER


def _rows_of(raw: RawLog, part: int) -> str:
    """The SQL of the staged rows of a part."""
    return f"staged WHERE part = {part}" if raw.split else "staged WHERE true"


def _reason(kind: str, roles: Mapping[str, str], time: str | None) -> str:
    """What is wrong with a row, in words."""
    if kind in ("user", "item"):
        return f"{roles[kind]} is empty"
    return (
        f"{roles['time']} is {time or ''!r}, "
        + {
            "large": "too large for a time",
            "time": "which is no number and no ISO date",
            "mixed": "but it is a number in some lines and a date in others",
        }[kind]
    )


def _parquet(raw: RawLog, path: Path, part: int, reading: Reading) -> dict[str, str]:
    source = f"read_parquet({raw.link(path)})"
    try:
        kinds = {name: kind for name, kind, *_ in raw.ask(f"DESCRIBE SELECT * FROM {source}")}
    except duckdb.Error as error:
        raise StreamctlError(
            f"not a parquet file: {first_sentence(error)}",
            where=path,
            run="write it anew, or save the log as .csv",
        ) from error
    roles = _wanted(raw, find_roles(list(kinds), reading.columns, path), reading, path)
    chosen = {role: _as_text(name, kinds[name], role, path) for role, name in roles.items()}
    try:
        raw.stage(chosen, source, part)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        reason = f"the parquet file is damaged: {first_sentence(error)}"
        if "utf" in str(error).lower():
            reason = "text that is not UTF-8 in " + ", ".join(map(repr, roles.values()))
        raise StreamctlError(reason, where=path, run="write it anew from where it came") from error
    return roles


def _as_text(name: str, kind: str, role: str, path: Path) -> str:
    """The SQL expression of a parquet column as text: 5.0 is 5, NaN is nothing.

    Raises:
        StreamctlError: it holds lists or other things that are no id, time or number.
    """
    column = '"' + name.replace('"', '""') + '"'
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION", "LIST")):
        what = "times" if role == "time" else f"{role}s" if role in ("rating", "event") else "ids"
        raise StreamctlError(
            f"column {name!r} holds {kind.lower()}, not {what}",
            where=path,
            run=f"--columns {role}=NAME, or a row for each of its values",
        )
    if role == "time" and (kind.startswith("TIME WITH") or kind in ("TIME", "TIME_NS", "INTERVAL")):
        raise StreamctlError(
            f"column {name!r} holds times of day ({kind.lower()}), which order nothing",
            where=path,
            run="--columns time=NAME of a column with dates",
        )
    if kind in ("FLOAT", "DOUBLE"):
        whole = f"{column} = trunc({column}) AND abs({column}) < 1e18"
        return f"""CASE WHEN isnan({column}) THEN NULL
            WHEN {whole} THEN try_cast({column} AS BIGINT)::VARCHAR ELSE {column}::VARCHAR END"""
    if kind.startswith("DECIMAL"):
        text = f"{column}::VARCHAR"
        return (
            f"CASE WHEN contains({text}, '.') THEN rtrim(rtrim({text}, '0'), '.') ELSE {text} END"
        )
    if kind == "BLOB":
        return f"decode({column})"
    return f"{column}::VARCHAR"


def _json(raw: RawLog, path: Path, part: int, reading: Reading) -> dict[str, str]:
    first_line(path, "replace")  # an empty file is an error
    lines = json_rows(path, reading)
    first = next(lines, None)
    if first is None:
        return {}
    roles = _wanted(raw, find_roles(list(first[1]), reading.columns, path), reading, path)

    def rows() -> Iterator[tuple[Any, ...]]:
        for line, row in chain([first], lines):
            missing = next((roles[r] for r in NEEDED if row.get(roles[r]) is None), None)
            if missing is not None and not reading.skip_bad:
                reading.bad(path, line, f"no {missing!r} here")
            yield line, *(id_text(row.get(name)) for name in roles.values())

    raw.add_rows(("line", *roles), rows(), part)
    return roles


def _find(path: Path) -> Files | None:
    names = [f"interactions.{kind}" for kind in _KINDS]
    if path.is_file():
        names += [f"*.{kind}" for kind in _KINDS]
    found = pick(path, *names)
    parts = () if found else parts_of(path, *_KINDS)
    items = beside(path, *(f"items.{kind}" for kind in _KINDS))
    return Files(found or parts[0], items, parts) if found or parts else None


SOURCE = Source(
    "table",
    "interactions.csv|tsv|parquet|jsonl (user_id, item_id, timestamp or position), or "
    "train.csv, valid.csv and test.csv of such, "
    "+ items.jsonl|csv|tsv|parquet",
    _find,
    partial(read_table, format_name="table"),
)
