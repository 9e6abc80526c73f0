"""Item files of any format -> ItemTable."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

from streamctl.data.sources.raw import ItemTable, Reading
from streamctl.data.sources.text import (
    clean,
    delimiter_of,
    first_sentence,
    header_of,
    lines,
    numbered,
    plain_name,
    records,
    writable,
)
from streamctl.errors import StreamctlError, close_matches

USER_NAMES = ("user_id", "user", "userid", "uid", "reviewerid", "customer_id", "visitorid",
              "session_id")  # fmt: skip
ID_NAMES = ("item_id", "item", "itemid", "parent_asin", "asin", "movieid", "product_id", "id")
TITLE_NAMES = ("title", "item_name", "movie_title", "product_name", "name")
# Columns that name or count something but describe nothing.
_NOT_TEXT = ("url", "image", "img", "price", "rating", "rank", "date", "_id", "count", "video")
ITEMS_FILE = "--items FILE with a line for each item: item_id, title, ...; or leave --items out"
LARGEST_ID = 10**32  # that is compared as a number
_SPACES = (0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)
BLANKS = "".join(map(chr, _SPACES))  # that DuckDB trims
VALUE_LENGTH = 1000  # characters that are kept of a value: encoders read no more


def find_column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` among the columns, ignoring case and RecBole's `:type`."""
    plain = {name.partition(":")[0].strip().lower(): name for name in reversed(list(names))}
    return next((plain[name] for name in wanted if name in plain), None)


def make_table(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    path: Path,
    reading: Reading,
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
            raise StreamctlError(
                f"no item id column; columns: {', '.join(row)}; {near}",
                where=path,
                line=line,
                run="call the column of ids item_id",
            )
        item = id_text(row[id_column])
        if reading.numbers:
            item = as_number(item)
        if not item.strip():
            reading.bad(path, line, "the item id is empty")
            continue
        if item in ids:
            if repeated != "first":
                if user := find_column(row, USER_NAMES):
                    raise StreamctlError(
                        f"this looks like a log of interactions, not a list of items: it has a "
                        f"column {user!r}, and item {item!r} occurs twice",
                        where=path,
                        line=line,
                        run=ITEMS_FILE,
                    )
                told = f"item id {item!r} occurs twice, first in line {ids[item]}"
                reading.bad(path, line, told, "--skip-bad 0.1 keeps the first of each")
            continue
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
        raise StreamctlError("the file holds no items", where=path, run=ITEMS_FILE)
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


def read_items(path: Path, reading: Reading, **options: Any) -> ItemTable:
    """An items file by its suffix: jsonl or json (an object a line), csv, tsv, parquet.

    Raises:
        StreamctlError: as `make_table`; a line that is not an object; an unknown suffix.
    """
    name = plain_name(path)
    if name.endswith((".jsonl", ".json")):
        rows = json_rows(path, reading)
    elif name.endswith((".csv", ".tsv", ".item")):
        delimiter = delimiter_of(path) if name.endswith(".csv") else "\t"
        rows = delimited_rows(path, reading, delimiter, quoted=not name.endswith(".item"))
    elif name.endswith(".parquet"):
        rows = parquet_rows(path)
    else:
        raise StreamctlError(
            "items are read from .jsonl, .csv, .tsv or .parquet",
            where=path,
            run="save the items as one of these",
        )
    return make_table(rows, path, reading, **options)


def json_rows(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a file with a JSON object a line.

    Amazon's files of 2014 hold Python literals (single quotes) instead; both are read.
    """
    for line, text in lines(path, "replace" if reading.skip_bad else "utf-8"):
        value = parse_object(text)
        if value is None:
            reading.bad(path, line, "not a JSON object")
        else:
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
    reading: Reading,
    delimiter: str,
    *,
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    quoted: bool = True,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> text) of a delimited file.

    Args:
        names: the columns; by default the first line holds them.
        quoted: whether texts may be in double quotes.
    """
    if reading.skip_bad and encoding == "utf-8":
        encoding = "replace"
    first, names = header_of(path, delimiter, names, quoted=quoted, encoding=encoding)
    rows = good_rows(path, reading, encoding, first, delimiter, len(names), quoted=quoted)
    return ((line, dict(zip(names, row, strict=True))) for line, row in rows)


def good_rows(
    path: Path, reading: Reading, encoding: str, first: int, *form: Any, **options: Any
) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of a delimited file's rows behind line `first`; bad ones are reported.

    Args:
        form, options: of `text.records`.
    """
    line = first
    try:
        source = (each for each in numbered(path, encoding) if each[0] > first)
        for line, row, fault in records(source, *form, **options):
            whole = "".join(row)
            if not fault and writable(whole) != whole:
                fault = "not UTF-8 text"
            if fault:
                reading.bad(path, line, fault)
            else:
                yield line, row
    except StreamctlError as error:
        if not reading.skip_bad:
            raise
        reading.bad(path, line + 1, f"{error.what} from here on")


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
        raise StreamctlError(
            f"not a parquet file: {first_sentence(error)}",
            where=path,
            run="write it anew, or save the items as .csv or .jsonl",
        ) from error


def id_text(value: object) -> str:
    """An id, time or number as text, "" if it is none: in every file and question the same.

    Texts stay as they are. A float or a decimal that is whole, as pandas makes of whole numbers
    with gaps, is written as a whole number.
    """
    if value is None or isinstance(value, dict | list) or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Decimal) and "." in (text := f"{value:f}"):
        return text.rstrip("0").rstrip(".")
    return writable(str(value))


def as_number(text: str) -> str:
    """A whole number, however it is written, as people write it; any other text without blanks
    around it: what `raw` makes of ids in SQL."""
    plain = text.strip(BLANKS)
    foreign = any(letter.isdecimal() and not letter.isascii() for letter in plain)
    try:
        with localcontext(prec=60):
            value = Decimal(text.strip()).quantize(Decimal("0.000001"))
            whole = not foreign and abs(value) < LARGEST_ID and value % 1 == 0
    except ArithmeticError:
        return plain
    return str(int(value)) if whole else plain


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True
