"""Interaction tables with named columns: csv, tsv, parquet, jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streamctl.data.columns import LARGEST_TIME, Times
from streamctl.data.sources.items import delimited_rows, find_column, json_rows, read_items
from streamctl.data.sources.raw import Coder, ItemTable, RawLog
from streamctl.data.sources.source import Files, Source, beside, pick
from streamctl.data.sources.text import (
    damaged,
    delimiter_of,
    first_line,
    lines,
    one_line,
    plain_name,
    writable,
)
from streamctl.errors import StreamctlError, close_matches

USER_NAMES = ("user_id", "user", "userid", "uid", "reviewerid", "customer_id", "visitorid",
              "session_id")  # fmt: skip
ITEM_NAMES = ("item_id", "item", "itemid", "iid", "parent_asin", "asin", "movieid", "product_id",
              "article_id", "sid")  # fmt: skip
TIME_NAMES = ("timestamp", "time", "ts", "unixreviewtime", "unix_time", "event_time", "datetime",
              "date", "t_dat")  # fmt: skip
POSITION_NAMES = ("position", "pos", "sequence_number")
_BLOCK = 16 << 20
ROLES = ("user", "item", "time")
# What a time may be, as steps of casts: a whole number, a number, a date without and with a zone.
_TIME_KINDS = (
    (pa.int64(),),
    (pa.float64(),),
    (pa.timestamp("us"), pa.int64()),
    (pa.timestamp("us", "UTC"), pa.int64()),
)


def read_table(
    path: Path,
    *,
    format_name: str,
    columns: Mapping[str, str] | None = None,
    catalogue: ItemTable | None = None,
    delimiter: str | None = None,
    names: Sequence[str] = (),
    quoted: bool = True,
) -> RawLog:
    """A table of interactions, a row each.

    Args:
        path: .csv, .tsv, .parquet, .jsonl or .json, and all but parquet with .gz or .zst.
        columns: `user`, `item` and `time` -> column name, where they are not the usual ones.
        catalogue: the items that go with it.
        delimiter: for text; by default a tab in .tsv and .inter, else what parts the header.
        names: the columns, where the file has no header.
        quoted: whether texts may be in double quotes.

    Raises:
        StreamctlError: a missing column (naming those found), a malformed line (file and line),
            a time that is no number or date, an empty file.
    """
    name = plain_name(path)
    try:
        if name.endswith(".parquet"):
            batches, roles = _parquet(path, columns)
        elif name.endswith((".jsonl", ".json")):
            batches, roles = _json(path, columns)
        else:
            if delimiter is None:
                delimiter = "\t" if name.endswith((".tsv", ".inter")) else delimiter_of(path)
            batches, roles = _delimited(path, delimiter, names, quoted, columns)
        return _collect(batches, roles, path, format_name, catalogue)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if name.endswith(".parquet"):
            raise StreamctlError(f"not a parquet file: {one_line(error)}", where=path) from error
        # Arrow names no line: a slow pass over the text finds it.
        if name.endswith((".jsonl", ".json")):
            _diagnose(json_rows(path))
        else:
            rows = delimited_rows(path, delimiter or ",", names=names, quoted=quoted)
            _diagnose(rows)
        raise damaged(path, error) from error


def _diagnose(rows: Iterable[object]) -> None:
    """Read everything slowly: a malformed line raises the error that names it."""
    for _ in rows:
        pass


def find_roles(found: Sequence[str], columns: Mapping[str, str] | None, path: Path) -> list[str]:
    """The user, item and time columns.

    Raises:
        StreamctlError: one is missing.
    """
    if len(set(found)) < len(found):
        twice = next(name for name in found if list(found).count(name) > 1)
        raise StreamctlError(f"column {twice!r} occurs twice in the header", where=path, line=1)
    usual = {"user": USER_NAMES, "item": ITEM_NAMES, "time": TIME_NAMES + POSITION_NAMES}
    roles, missing, hints = [], {}, []
    for role in ROLES:
        wanted = (columns or {}).get(role)
        name = wanted if wanted in found else None
        if name is None:
            name = find_column(found, [wanted.lower()] if wanted else usual[role])
        if name is None:
            missing[role] = wanted or {"time": "timestamp or position"}.get(role, f"{role}_id")
            near = close_matches(wanted or usual[role][0], [name[:80] for name in found[:100]])
            hints += [near] if near.startswith("did") else []
        roles.append(name)
    if missing:
        named = ",".join(f"{role}=NAME" for role in missing)
        other = ""
        if len(missing) == len(ROLES):
            other = ", or a first line that names the columns"
        elif list(missing) == ["time"]:
            other = ", or a column position that counts each user's items from the oldest"
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


def _delimited(
    path: Path,
    delimiter: str,
    names: Sequence[str],
    quoted: bool,
    columns: Mapping[str, str] | None,
) -> tuple[Iterator[pa.RecordBatch], list[str]]:
    import csv as text_csv

    from pyarrow import csv

    header = list(names)
    number, text = first_line(path)
    if not header:
        try:
            header = next(text_csv.reader([text], delimiter=delimiter))
        except text_csv.Error as error:
            raise StreamctlError(f"not CSV: {error}", where=path, line=1) from error
        header = [name.strip() for name in header]
    roles = find_roles(header, columns, path)
    reader = csv.open_csv(
        pa.input_stream(str(path), compression="detect"),
        read_options=csv.ReadOptions(
            use_threads=path.stat().st_size > _BLOCK,
            block_size=_BLOCK,
            column_names=header,
            skip_rows=0 if names else number,
        ),
        parse_options=csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False),
        convert_options=csv.ConvertOptions(
            include_columns=roles,
            column_types={name: pa.string() for name in roles},
            strings_can_be_null=False,
        ),
    )
    return iter(reader), roles


def _parquet(
    path: Path, columns: Mapping[str, str] | None
) -> tuple[Iterator[pa.RecordBatch], list[str]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    roles = find_roles(file.schema_arrow.names, columns, path)
    return file.iter_batches(batch_size=1 << 20, columns=roles), roles


def _json(
    path: Path, columns: Mapping[str, str] | None
) -> tuple[Iterator[pa.RecordBatch], list[str]]:
    first_line(path)  # an empty file is an error
    found = list(next(iter(json_rows(path)))[1])
    roles = find_roles(found, columns, path)

    def batches() -> Iterator[pa.RecordBatch]:
        waiting: list[list[str]] = [[], [], []]
        for line, row in json_rows(path):
            for values, name in zip(waiting, roles, strict=True):
                if row.get(name) is None:
                    raise StreamctlError(f"no {name!r} here", where=path, line=line)
                values.append(writable(str(row[name])))
            if len(waiting[0]) >= 1 << 18:
                yield pa.record_batch([pa.array(v, pa.string()) for v in waiting], roles)
                waiting = [[], [], []]
        yield pa.record_batch([pa.array(v, pa.string()) for v in waiting], roles)

    return batches(), roles


def _collect(
    batches: Iterator[pa.RecordBatch],
    roles: list[str],
    path: Path,
    format_name: str,
    catalogue: ItemTable | None,
) -> RawLog:
    users, items = Coder(), Coder()
    times = Times()
    were_dates = False
    row = 0
    for batch in batches:
        user, item, time = (batch.column(name) for name in roles)
        for name, values in zip(roles[:2], (user, item), strict=True):
            _check_filled(name, values, row, path)
        users.add(_texts(user))
        items.add(_texts(item))
        parsed, dates = _times(time, roles[2], row, path)
        if row and dates != were_dates:
            raise StreamctlError(
                f"{roles[2]} is a number in some lines and a date in others",
                where=path,
                line=line_of_row(path, row),
            )
        try:
            times.append(parsed)
        except StreamctlError as error:
            at = row + int(np.abs(parsed.astype(np.float64)).argmax())
            raise StreamctlError(error.what, where=path, line=line_of_row(path, at)) from None
        were_dates = dates
        row += len(batch)
    if not row:
        raise StreamctlError("the file holds no interactions", where=path)
    user_codes, user_ids = users.finish()
    item_codes, item_ids = items.finish()
    position = find_column([roles[2]], POSITION_NAMES) is not None
    return RawLog(
        user_codes,
        item_codes,
        user_ids,
        item_ids,
        times.finish(),
        timed=not position,
        catalogue=catalogue,
        format=format_name,
    )


def _texts(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):  # pandas turns integers with gaps into floats
        values = values.cast(pa.int64())
    return values.cast(pa.string())


def _check_filled(name: str, values: pa.Array, row: int, path: Path) -> None:
    empty = pc.is_null(values)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        empty = pc.or_(empty, pc.equal(pc.fill_null(values, ""), ""))
    if pc.any(empty).as_py():
        at = row + int(np.argmax(empty.to_numpy(zero_copy_only=False)))
        raise StreamctlError(f"{name} is empty", where=path, line=line_of_row(path, at))


def _times(values: pa.Array, name: str, row: int, path: Path) -> tuple[np.ndarray, bool]:
    """(int64, or float64 where numbers are fractions; whether they were dates)."""
    parsed = parse_times(values)
    if parsed is not None:
        return parsed
    texts = [str(value) for value in values.to_pylist()]
    at = next((index for index, text in enumerate(texts) if not is_time(text)), None)
    problem = "no number and no ISO date" if at is not None else "of another kind than others"
    at = at or 0
    raise StreamctlError(
        f"{name} is {texts[at]!r}, which is {problem}",
        where=path,
        line=line_of_row(path, row + at),
        run="write 2024-01-31, 2024-01-31 18:30:00 or a number, or name another column with "
        "--columns time=NAME",
    )


def parse_times(values: pa.Array) -> tuple[np.ndarray, bool] | None:
    """(numbers as int64 or float64, or dates as int64 microseconds since 1970; whether dates).

    None unless all values are such and of one kind.
    """
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        kinds: tuple[tuple[pa.DataType, ...], ...] = ((pa.timestamp("us"), pa.int64()),)
    else:
        kinds = _TIME_KINDS
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = pc.utf8_trim_whitespace(values)
    for kind in kinds:
        parsed = values
        try:
            for step in kind:
                parsed = parsed.cast(step)
        except pa.ArrowException:
            continue
        if parsed.null_count:
            return None
        array = parsed.to_numpy(zero_copy_only=False)
        return (array, len(kind) > 1) if np.isfinite(array).all() else None
    return None


def is_time(text: str) -> bool:
    """Whether a text is a finite number or an ISO date."""
    parsed = parse_times(pa.array([text]))
    return parsed is not None and abs(float(parsed[0][0])) <= LARGEST_TIME


def line_of_row(path: Path, row: int) -> int:
    """File line of a data row (from 0); in parquet the row's number."""
    if plain_name(path).endswith(".parquet"):
        return row + 1
    header = 0 if plain_name(path).endswith((".json", ".jsonl", ".dat", ".data")) else 1
    for index, (number, _) in enumerate(lines(path)):
        if index == row + header:
            return number
    return row + 1 + header


_KINDS = ("csv", "tsv", "parquet", "jsonl")


def _find(path: Path) -> Files | None:
    names = [f"interactions.{kind}" for kind in _KINDS]
    if path.is_file():
        names += [f"*.{kind}" for kind in _KINDS]
    found = pick(path, *names)
    items = beside(path, *(f"items.{kind}" for kind in _KINDS))
    return Files(found, items) if found else None


def _read(files: Files, columns: Mapping[str, str] | None) -> RawLog:
    catalogue = read_items(files.items) if files.items else None
    return read_table(files.interactions, format_name="table", columns=columns, catalogue=catalogue)


SOURCE = Source(
    "table",
    "interactions.csv|tsv|parquet|jsonl (user_id, item_id, timestamp or position) "
    "+ items.jsonl|csv|tsv|parquet",
    _find,
    _read,
)
