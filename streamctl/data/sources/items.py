"""Item files of any format -> ItemTable."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamctl.data.sources.raw import ItemTable
from streamctl.data.sources.text import (
    clean,
    delimiter_of,
    lines,
    one_line,
    plain_name,
    writable,
)
from streamctl.errors import StreamctlError, close_matches

ID_NAMES = ("item_id", "item", "itemid", "parent_asin", "asin", "movieid", "product_id", "id")
TITLE_NAMES = ("title", "item_name", "movie_title", "product_name", "name")
# Columns that name or count something but describe nothing.
_NOT_TEXT = ("url", "image", "img", "price", "rating", "rank", "date", "_id", "count", "video")
VALUE_LENGTH = 1000  # characters that are kept of a value: encoders read no more


def find_column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` among the columns, ignoring case and RecBole's `:type`."""
    plain = {name.partition(":")[0].strip().lower(): name for name in reversed(list(names))}
    return next((plain[name] for name in wanted if name in plain), None)


def make_table(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    path: Path,
    *,
    id_column: str | None = None,
    text: Sequence[str] | None = None,
    repeated: str = "error",
) -> ItemTable:
    """Rows of (line, column -> value) as a table.

    Args:
        id_column: column of the ids; by default the first of ID_NAMES.
        text: the columns that describe an item, in order; by default the title and every column
            that holds words.
        repeated: "error", or "first": the first row of an id counts (Amazon's own files repeat).

    Raises:
        StreamctlError: no id column, an empty or repeated id (file and line), no item at all.
    """
    ids: dict[str, int] = {}
    columns: dict[str, list[str]] = {}
    words: set[str] = set()
    for line, row in rows:
        if id_column is None:
            id_column = find_column(row, ID_NAMES)
        if id_column is None or id_column not in row:
            near = close_matches(id_column or "item_id", row)
            raise StreamctlError(f"no item id column; columns: {', '.join(row)}; {near}",
                                 where=path, line=line)  # fmt: skip
        item = _id(row[id_column])
        if not item.strip():
            raise StreamctlError("the item id is empty", where=path, line=line)
        if item in ids:
            if repeated == "first":
                continue
            raise StreamctlError(f"item id {item!r} occurs twice, first in line {ids[item]}",
                                 where=path, line=line, run="keep one line an item")  # fmt: skip
        for name, value in row.items():
            if name == id_column or (text is not None and name not in text):
                continue
            name = clean(name)
            if name not in columns:
                columns[name] = [""] * len(ids)
            value = clean(value)[:VALUE_LENGTH]
            columns[name].append(value)
            if name not in words and not _is_number(value):
                words.add(name)
        ids[item] = line
        for values in columns.values():
            if len(values) < len(ids):
                values.append("")
    if not ids:
        raise StreamctlError("the file holds no items", where=path)
    columns = {name.partition(":")[0]: values for name, values in columns.items() if any(values)}
    title = find_column(columns, TITLE_NAMES)
    if text is None:
        described = [
            name
            for name in columns
            if name in {word.partition(":")[0] for word in words}
            and not any(part in name.lower() for part in _NOT_TEXT)
        ]
    else:
        described = [name for name in text if name in columns]
    if title in described:
        described.remove(title)
        described.insert(0, title)
    return ItemTable(list(ids), columns, title, tuple(described))


def read_items(path: Path, **options: Any) -> ItemTable:
    """An items file by its suffix: jsonl or json (an object a line), csv, tsv, parquet.

    Raises:
        StreamctlError: as `make_table`; a line that is not an object; an unknown suffix.
    """
    name = plain_name(path)
    if name.endswith((".jsonl", ".json")):
        return make_table(json_rows(path), path, **options)
    if name.endswith(".csv"):
        return make_table(delimited_rows(path, delimiter_of(path)), path, **options)
    if name.endswith((".tsv", ".item")):
        rows = delimited_rows(path, "\t", quoted=name.endswith(".tsv"))
        return make_table(rows, path, **options)
    if name.endswith(".parquet"):
        return make_table(parquet_rows(path), path, **options)
    raise StreamctlError("items are read from .jsonl, .csv, .tsv or .parquet", where=path)


def json_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line, object) of a file with a JSON object a line.

    Amazon's files of 2014 hold Python literals (single quotes) instead; both are read.
    """
    for line, text in lines(path):
        value = parse_object(text)
        if value is None:
            raise StreamctlError("not a JSON object", where=path, line=line)
        yield line, value


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object, or the Python literal of one, that a line holds; None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a ValueError alone: a number of 5000 digits
        try:
            value = ast.literal_eval(text) if text.lstrip().startswith("{") else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    return value if isinstance(value, dict) else None


def delimited_rows(
    path: Path,
    delimiter: str,
    *,
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    quoted: bool = True,
) -> Iterable[tuple[int, dict[str, str]]]:
    """(line, column -> text) of a delimited file.

    Args:
        names: the columns; by default the first line holds them.
        quoted: whether texts may be in double quotes.

    Raises:
        StreamctlError: a line with more or fewer columns than the header.
    """
    import csv

    numbers: list[int] = []

    def texts() -> Iterable[str]:
        for number, text in lines(path, encoding):
            numbers[:] = [number]
            yield text + "\n"

    if not quoted:
        rows: Iterable[list[str]] = (text.rstrip("\n").split(delimiter) for text in texts())
    else:
        rows = csv.reader(texts(), delimiter=delimiter)
    header = list(names)
    try:
        for row in rows:
            if not header:
                header = [name.strip() for name in row]
                continue
            if len(row) != len(header):
                raise StreamctlError(
                    f"{len(row)} columns where the header has {len(header)}",
                    where=path,
                    line=numbers[0],
                )
            yield numbers[0], dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise StreamctlError(f"not CSV: {error}", where=path, line=numbers[0]) from error


def parquet_rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(row number from 1, column -> value) of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StreamctlError(f"not a parquet file: {one_line(error)}", where=path) from error


def _id(value: object) -> str:
    """An id as it stands, for it must be the one in the interactions; "" if the value is none."""
    if value is None or isinstance(value, dict | list):
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas turns integers with gaps into them
        value = int(value)
    return writable(str(value))


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True
