"""Writers of prepared data, one a format; each writes what its reader in `sources` reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.data.sources import find_source
from streamctl.data.sources.amazon import TEXT
from streamctl.data.sources.items import ID_NAMES
from streamctl.data.sources.text import COMPRESSED
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.files import atomic_file
from streamctl.progress import warn
from streamctl.runs import RunDir

RATING = 5  # the log holds no ratings; tools that drop low ones must keep what was taken
BATCH = 1 << 17  # rows of a parquet file that are held at once

Rows = Iterable[Sequence[Any]]
Write = Callable[[Path, list[str], Rows], None]  # a file with these columns


@contextmanager
def _text_file(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file to write, compressed as its name says, there when the block ends.

    The same texts give the same bytes.
    """
    with atomic_file(path) as temporary, ExitStack() as stack:
        raw = stack.enter_context(open(temporary, "wb"))
        if path.suffix == ".gz":
            raw = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        elif path.suffix == ".zst":
            import zstandard

            raw = stack.enter_context(zstandard.ZstdCompressor().stream_writer(raw))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding, newline=""))


def _csv(path: Path, columns: list[str], rows: Rows, delimiter: str = ",") -> None:
    """A header and lines; what holds the delimiter or a quote is quoted."""
    with _text_file(path) as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _joined(
    path: Path, columns: list[str], rows: Rows, *, by: str, header: bool = True, encoding="utf-8"
) -> None:
    """Lines of values parted by a text that none of them holds; nothing is quoted."""
    with _text_file(path, encoding) as handle:
        handle.writelines(f"{by.join(columns)}\n" for _ in range(header))
        handle.writelines(f"{by.join(map(str, row))}\n" for row in rows)


def _json_lines(path: Path, columns: list[str], rows: Rows) -> None:
    with _text_file(path) as handle:
        for row in rows:
            value = dict(zip(columns, row, strict=True))
            handle.write(json.dumps(value, ensure_ascii=False) + "\n")


def _parquet(path: Path, columns: list[str], rows: Rows, *, numbers: tuple[str, ...] = ()) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [pa.int64() if name in numbers else pa.string() for name in columns]
    schema, rows = pa.schema(list(zip(columns, kinds, strict=True))), iter(rows)
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while batch := list(islice(rows, BATCH)):
            arrays = map(pa.array, zip(*batch, strict=True), kinds)
            writer.write_table(pa.table(list(arrays), schema))


def _json_object(path: Path, columns: list[str], rows: Rows) -> None:
    """A JSON object of the first column: to the one other value, or to an object of the others."""
    with _text_file(path) as handle:
        for number, (name, *values) in enumerate(rows):
            value = dict(zip(columns[1:], values, strict=True)) if columns else values[0]
            handle.write(",\n" if number else "{\n")
            handle.write(f"{json.dumps(name, ensure_ascii=False)}: ")
            handle.write(json.dumps(value, ensure_ascii=False))
        handle.write("\n}\n")


def _lines(path: Path, columns: list[str], rows: Rows) -> None:
    """A user and the items, blank-separated."""
    with _text_file(path) as handle:
        handle.writelines(f"{' '.join([user, *taken])}\n" for user, taken in rows)


@dataclass(frozen=True)
class Sink:
    """A format to write.

    Attributes:
        source: the reader that reads it.
        files: of interactions and of items; NAME is the folder's name.
        write, write_items: what writes each.
        log: column -> "user", "item", "time", or a value that is the same in every row; empty: a
            row (user, items) each user, without times.
        item: the items file's column of ids.
        columns: the item columns that are written and read back; None: all.
        rename: how these are called, {} being their name.
        forbidden: texts that no id can hold, beside line ends.
        compressible: whether .gz and .zst make sense.
    """

    source: str
    files: tuple[str, str]
    write: Write
    write_items: Write
    log: Mapping[str, Any] = field(default_factory=dict)
    item: str = "item_id"
    columns: tuple[str, ...] | None = None
    rename: str = "{}"
    forbidden: tuple[str, ...] = ()
    compressible: bool = True

    @property
    def times(self) -> bool:
        """Whether it holds times, or the order only."""
        return bool(self.log)


def export(
    run: RunDir, folder: Path, format_name: str = "recbole", compression: str = "none"
) -> list[Path]:
    """Write the run's log and catalogue as files that `data prepare` and other tools read.

    The log is the filtered one, users by id and each user's items in order of time. A log without
    times gets positions where a format has a column of times. The text that an encoder reads is
    not written: reading makes it of the title and the columns again. Files that are there are
    replaced.

    Args:
        run: a run with a data stage; with a tokenizer, "lcrec" gets the items' codes too.
        folder: where the files go; made if missing. Its name names them.
        format_name: one of `SINKS`.
        compression: "none", "gz" or "zst".

    Returns:
        the files written, interactions first.

    Raises:
        UsageError: an unknown format or compression, or one that the format does not take.
        StreamctlError: no data stage, an id or a title that the format cannot hold, or a disk
            that is full or cannot be written.
    """
    if format_name not in SINKS:
        raise UsageError(f"unknown format {format_name!r}; {close_matches(format_name, SINKS)}")
    sink = SINKS[format_name]
    kinds = ["none", *(suffix.removeprefix(".") for suffix in COMPRESSED)]
    if compression not in kinds:
        raise UsageError(f"--compress is {compression!r}; it takes one of {', '.join(kinds)}")
    if compression != "none" and not sink.compressible:
        raise UsageError(f"{format_name} is compressed already; leave --compress out")
    stage = run.require("data")
    catalog, log = Catalog.load(stage), InteractionLog.load(stage)
    name, suffix = folder.resolve().name, "" if compression == "none" else f".{compression}"
    inter, meta = (folder / (file.replace("NAME", name) + suffix) for file in sink.files)
    columns, items = _items(sink, catalog)
    _check(sink, inter, meta, log, items)

    header = [*sink.log]
    if sink.log == TABLE and log.timestamps is None:
        header[-1] = "position"
    sink.write(inter, header, _interactions(sink, catalog.ids, log))
    sink.write_items(meta, columns, items)
    files, tokenizer = [inter, meta], run.stage("tokenizer")
    if format_name == "lcrec" and tokenizer.complete:
        files.append(folder / f"{name}.index.json{suffix}")
        with _text_file(files[-1]) as handle:
            handle.write(tokenizer.file("index.json").read_text(encoding="utf-8"))
    try:
        _, read = find_source(folder)
        taken = read.interactions in files
        other = f"{folder} also holds {read.interactions.name}, which `data prepare` takes first"
    except StreamctlError as error:  # what was written is whole; what lay there is in its way
        taken, other = False, f"`data prepare` cannot read {folder} as it is now: {error}"
    if not taken:
        warn(other)
    return files


def _interactions(sink: Sink, ids: list[str], log: InteractionLog) -> Iterator[Sequence[Any]]:
    """The rows of the interactions file."""
    for number, user in enumerate(log.user_ids):
        part = slice(log.offsets[number], log.offsets[number + 1])
        taken = [ids[item] for item in log.items[part].tolist()]
        if not sink.log:
            yield user, taken
            continue
        times = range(len(taken)) if log.timestamps is None else log.timestamps[part].tolist()
        for item, time in zip(taken, times, strict=True):
            row = {"user": user, "item": item, "time": time}
            yield [row.get(value, value) for value in sink.log.values()]


def _items(sink: Sink, catalog: Catalog) -> tuple[list[str], list[tuple[str, ...]]]:
    """(columns, rows) of the items file."""
    fields = {"title": catalog.titles, **catalog.fields}
    if sink.columns == GENRES:  # MovieLens parts them so, and has no other columns
        genres = fields.get("genres", [""] * len(catalog))
        fields = {"title": catalog.titles, "genres": [text.replace(", ", "|") for text in genres]}
    elif sink.columns is not None:  # Amazon's: all but what would be taken for an id
        fields = {name: fields[name] for name in fields if name.lower() not in ID_NAMES}
    columns = [sink.item, *map(sink.rename.format, fields)]
    return columns, list(zip(catalog.ids, *fields.values(), strict=True))


def _check(sink: Sink, inter: Path, meta: Path, log: InteractionLog, items: Rows) -> None:
    """Refuse ids and titles that the format has no way to write, before anything is written."""

    def refuse(what: str, path: Path) -> None:
        raise StreamctlError(
            f"the format cannot hold {what}", where=path, run="the same with --format table-jsonl"
        )

    for kind, names in (("user", log.user_ids), ("item", (row[0] for row in items))):
        for name in names:
            held = next((text for text in sink.forbidden if text in name), None)
            if sink.write is _lines and name.split() != [name]:
                refuse(f"id {name!r} (blanks part ids)", inter)
            if held is not None:
                refuse(f"{kind} id {name!r} ({held!r} ends it)", inter)
            if sink.write is MOVIES and not name.isascii():
                refuse(f"{kind} id {name!r} (it is not ASCII)", inter)
    for row in items if sink.write is MOVIES else ():
        line = "::".join(row)
        if line.split("::") != list(row):
            refuse(f"{line!r} ('::' parts its columns)", meta)
        if any(ord(character) > 255 for character in line):
            refuse(f"{line!r} (it is in Latin-1)", meta)


GENRES = ("genres",)
LINE = ("\n", "\r")
TABLE = {"user_id": "user", "item_id": "item", "timestamp": "time"}  # or position
MOVIES = partial(_joined, by="::", header=False)  # as in 1M and 10M
_TABS, _TSV = partial(_joined, by="\t"), partial(_csv, delimiter="\t")
_CSV = Sink("table", ("interactions.csv", "items.csv"), _csv, _csv, TABLE, forbidden=LINE)
_STARS = float(RATING)
_OLD = {"reviewerID": "user", "asin": "item", "overall": _STARS, "unixReviewTime": "time"}
_REVIEW = {"rating": _STARS, "asin": "item", "parent_asin": "item", "user_id": "user",
           "timestamp": "time"}  # fmt: skip
_RATED = {"user_id": "user", "parent_asin": "item", "rating": _STARS, "timestamp": "time"}
_2018 = {"log": _OLD, "item": "asin", "columns": TEXT}
_2023 = {"item": "parent_asin", "columns": TEXT}
_SEEN = {"userId": "user", "movieId": "item", "rating": RATING, "timestamp": "time"}
_MOVIE = {"log": _SEEN, "item": "movieId", "columns": GENRES}
_JSON = (_json_lines, _json_lines)
SINKS: dict[str, Sink] = {
    # RecBole's atomic files have typed headers.
    "recbole": Sink(
        "recbole", ("NAME.inter", "NAME.item"), _TABS, _TABS,
        {"user_id:token": "user", "item_id:token": "item", "timestamp:float": "time"},
        item="item_id:token", rename="{}:token_seq", forbidden=(*LINE, "\t"),
    ),
    "lcrec": Sink("lcrec", ("NAME.inter.json", "NAME.item.json"), _json_object, _json_object),
    "sequences": Sink("sequences", ("user_sequence.txt", "items.jsonl"), _lines, _json_lines),
    "table": _CSV,
    "table-tsv": Sink(
        "table", ("interactions.tsv", "items.tsv"), _TSV, _TSV, TABLE, forbidden=LINE
    ),
    "table-jsonl": Sink("table", ("interactions.jsonl", "items.jsonl"), *_JSON, TABLE),
    "table-parquet": Sink(
        "table", ("interactions.parquet", "items.parquet"),
        partial(_parquet, numbers=("timestamp", "position")), _parquet, TABLE, compressible=False,
    ),
    "movielens": Sink(
        "movielens", ("ratings.dat", "movies.dat"), MOVIES, partial(MOVIES, encoding="latin-1"),
        **_MOVIE, forbidden=(*LINE, ":"),
    ),
    "movielens-csv": Sink(
        "movielens", ("ratings.csv", "movies.csv"), _csv, _csv, **_MOVIE, forbidden=LINE
    ),
    "amazon2014": Sink("amazon", ("reviews_NAME_5.json", "meta_NAME.json"), *_JSON, **_2018),
    "amazon2018": Sink("amazon", ("NAME_5.json", "meta_NAME.json"), *_JSON, **_2018),
    "amazon2023": Sink("amazon2023", ("NAME.jsonl", "meta_NAME.jsonl"), *_JSON, _REVIEW, **_2023),
    "amazon2023-csv": Sink(
        "amazon2023", ("NAME.csv", "meta_NAME.jsonl"), _csv, _json_lines, _RATED, **_2023,
        forbidden=LINE,
    ),
}  # fmt: skip
