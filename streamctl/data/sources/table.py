"""Interaction tables with named columns: csv, tsv, parquet, jsonl; DuckDB reads all but json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from streamctl.data.sources.items import USER_NAMES, find_column, id_text, json_rows
from streamctl.data.sources.raw import RawLog, database_errors
from streamctl.data.sources.reading import SHOWN, Reading
from streamctl.data.sources.source import Files, Source, beside, parts_of, pick
from streamctl.data.sources.text import (
    delimiter_of,
    first_line,
    first_sentence,
    lines_at,
    numbered,
    plain_copy,
    plain_name,
    records,
    wrong_encoding,
)
from streamctl.data.sources.times import DATE, INTEGER, LARGEST_TIME, NUMBER
from streamctl.errors import StreamctlError, count_of, did_you_mean

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
            if name.endswith(".parquet"):
                roles, rows = _parquet(raw, path, part, reading), None
            elif name.endswith((".jsonl", ".json")):
                roles = _json(raw, path, part, reading)
                rows = partial(json_rows, path, Reading(skip_bad=True))
            else:
                text = _Text(path, delimiter, names, quoted)
                roles, rows = _delimited(raw, text, part, reading), text.rows
            dates = _check_values(raw, path, part, reading, roles, rows) if roles else None
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


class _Text:
    """A text table: its columns, and its rows as a slow reader sees them.

    Raises:
        StreamctlError: an empty file, or a first line that is no header.
    """

    def __init__(self, path: Path, delimiter: str | None, names: Sequence[str], quoted: bool):
        self.path, self.quoted = path, quoted
        tabs = plain_name(path).endswith((".tsv", ".inter"))
        self.delimiter = delimiter or ("\t" if tabs else delimiter_of(path))
        self.first, text = first_line(path)
        self.header = list(names)
        if names:
            self.first = 0
        else:
            source = [(self.first, text)]
            row = next(records(source, self.delimiter, quoted, path), (0, [""]))[1]
            self.header = [name.strip() for name in row]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(line, row) of the rows that are well formed."""
        source = numbered(self.path, "replace")
        for line, row in records(source, self.delimiter, self.quoted, self.path):
            if line > self.first and len(row) == len(self.header):
                yield line, row


def _delimited(raw: RawLog, text: _Text, part: int, reading: Reading) -> dict[str, str]:
    """Stage a text table; its roles."""
    path, header = text.path, text.header
    roles = _wanted(raw, find_roles(header, reading.columns, path), reading, path)
    places = {role: f"c{header.index(name)}" for role, name in roles.items()}
    columns = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(header)))
    quote = '"' if text.quoted else ""

    def stage(file: Path, compression: str) -> None:
        source = f"""
            read_csv({raw.link(file)}, delim = '{text.delimiter}',
                quote = '{quote}', escape = '{quote}', header = false, skip = {text.first},
                auto_detect = false, compression = '{compression}', columns = {{{columns}}},
                hive_partitioning = false, max_line_size = {_LONGEST_LINE}, strict_mode = true,
                store_rejects = true, rejects_limit = 0)"""
        raw.stage(places, source, part)

    file = path
    try:
        stage(file, _COMPRESSIONS.get(path.suffix.lower(), "none"))
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as first:
        # A compressed file that is cut short, lines that end now so, now so: of plain bytes with
        # one kind of line end what can be read is read, and what cannot is named.
        raw.con.execute("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans")
        raw.con.execute(f"DELETE FROM {_rows_of(raw, part)}")
        file = plain_copy(path, Path(raw.folder.name) / f"plain{part}", reading)
        try:
            stage(file, "none")
        except duckdb.Error:
            reason = first_sentence(first).removeprefix("Invalid Input Error: ")
            raise StreamctlError(
                f"not CSV: {reason}",
                where=path,
                run="give each line the columns of the header; quote texts that hold a delimiter",
            ) from first
    _rejects(raw, text, file, reading)
    return roles


def _rejects(raw: RawLog, text: _Text, file: Path, reading: Reading) -> None:
    """Report the lines that DuckDB left out of `file`."""
    path, width = text.path, len(text.header)
    limit = SHOWN if reading.skip_bad else 1
    found = raw.ask(f"""
        SELECT line_byte_position, any_value(error_type)::VARCHAR, left(any_value(csv_line), 10000)
        FROM reject_errors GROUP BY line_byte_position ORDER BY line_byte_position LIMIT {limit}""")
    count = raw.one("SELECT count(DISTINCT line_byte_position) FROM reject_errors")
    raw.con.execute("DROP TABLE reject_errors; DROP TABLE reject_scans")
    told = []
    # A line that is left out begins with the blank ones before it.
    blank = [len(content) - len(content.lstrip("\r\n")) for _, _, content in found]
    places = [place - 1 + skip for (place, _, _), skip in zip(found, blank, strict=True)]
    for line, (_, kind, content) in zip(lines_at(file, places), found, strict=True):
        reason = "not CSV: a quote that is not closed, or text behind its end"
        if kind == "INVALID ENCODING":
            if not reading.skip_bad:
                raise wrong_encoding(path, line)
            reason = "not UTF-8 text"
        elif kind == "LINE SIZE OVER MAXIMUM":
            reason = f"a line of more than {_LONGEST_LINE // 10**6} MB"
        elif kind.endswith("COLUMNS"):
            source = [(line, content.strip("\r\n"))]
            row = next(records(source, text.delimiter, text.quoted, path), (0, [""]))[1]
            reason = f"{count_of(len(row), 'column')} where the header has {width}"
        told.append((line, reason))
    if told and not reading.skip_bad:
        reading.bad(path, *told[0])
    if told:
        reading.count(path, told, count)


def _check_values(
    raw: RawLog,
    path: Path,
    part: int,
    reading: Reading,
    roles: Mapping[str, str],
    rows: Callable[[], Iterator[tuple[int, Any]]] | None,
) -> bool | None:
    """Delete the rows of this part without ids or a time, and report them.

    Args:
        rows: the file's rows with their lines; None: the number of a row is its line.

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
    raw.con.execute(f"""
        CREATE TABLE wrong AS SELECT rowid AS place, left(time, 100) AS text, CASE
            WHEN user_id IS NULL OR user_id = '' THEN 'user' WHEN item_id IS NULL OR item_id = ''
            THEN 'item' WHEN abs({NUMBER}) > {LARGEST_TIME} THEN 'large'
            WHEN {NUMBER} IS NULL AND {DATE} IS NULL THEN 'time'
            WHEN {rarer} IS NOT NULL THEN 'mixed' END AS kind {here} AND kind IS NOT NULL""")
    count = raw.one("SELECT count(*) FROM wrong")
    if count:
        limit = SHOWN if reading.skip_bad else 1
        found = raw.ask(f"SELECT place, kind, text FROM wrong ORDER BY place LIMIT {limit}")
        first = raw.one(f"SELECT min(rowid) {here}")
        numbers = _lines_of([place - first for place, _, _ in found], rows)
        told = [
            (line, _reason(kind, roles, time))
            for line, (_, kind, time) in zip(numbers, found, strict=True)
        ]
        if not reading.skip_bad:
            about_ids = found[0][1] in ("user", "item")
            reading.bad(path, *told[0], None if about_ids else _TIME_HELP)
        reading.count(path, told, count)
        raw.con.execute("DELETE FROM staged WHERE rowid IN (SELECT place FROM wrong)")
    raw.con.execute("DROP TABLE wrong")
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


def _lines_of(places: list[int], rows: Callable[[], Iterator[tuple[int, Any]]] | None) -> list[int]:
    """File lines of the rows at ascending places, counted from 0."""
    if rows is None:
        return [place + 1 for place in places]
    found, wanted = [], set(places)
    with suppress(StreamctlError):  # of a line that this slow reader cannot take
        for place, (line, _) in enumerate(rows()):
            if place in wanted:
                found.append(line)
                if len(found) == len(places):
                    return found
    return [*found, *(place + 1 for place in places[len(found) :])]


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
    roles: dict[str, str] = {}
    waiting: dict[str, list[str | None]] = {}
    for line, row in json_rows(path, reading):
        if not roles:
            roles = _wanted(raw, find_roles(list(row), reading.columns, path), reading, path)
            waiting = {role: [] for role in roles}
        missing = next((roles[r] for r in NEEDED if row.get(roles[r]) is None), None)
        if missing is not None and not reading.skip_bad:
            reading.bad(path, line, f"no {missing!r} here")
        for role, name in roles.items():
            waiting[role].append(id_text(row.get(name)))
        if len(waiting["user"]) >= 1 << 18:
            raw.add(waiting, part)
            waiting = {role: [] for role in roles}
    if roles:
        raw.add(waiting, part)
    return roles


def _find(path: Path) -> Files | None:
    names = [f"interactions.{kind}" for kind in _KINDS]
    if path.is_file():
        names += [f"*.{kind}" for kind in _KINDS]
    found = pick(path, *names)
    parts = () if found else parts_of(path, *_KINDS)
    items = beside(path, *(f"items.{kind}" for kind in _KINDS))
    return Files(found or parts[0], items, parts) if found or parts else None


def _read(files: Files, reading: Reading) -> RawLog:
    return read_table(files, reading, format_name="table")


SOURCE = Source(
    "table",
    "interactions.csv|tsv|parquet|jsonl (user_id, item_id, timestamp or position), or "
    "train.csv, valid.csv and test.csv of such, "
    "+ items.jsonl|csv|tsv|parquet",
    _find,
    _read,
)
