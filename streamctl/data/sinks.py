"""Writers of prepared data, one a format; each writes what its reader in `sources` reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog, ranges
from streamctl.data.sources import find_source
from streamctl.data.sources.amazon import TEXT
from streamctl.data.sources.items import ID_NAMES
from streamctl.data.sources.text import COMPRESSED
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.files import atomic_file
from streamctl.progress import warn
from streamctl.runs import RunDir

RATING = 5  # the log holds no ratings; tools that drop low ones must keep what was taken


@dataclass(frozen=True)
class Export:
    """One export.

    Attributes:
        folder: where the files go.
        suffix: "", ".gz" or ".zst".
        index: the tokenizer's index.json, or None.
    """

    folder: Path
    catalog: Catalog
    log: InteractionLog
    suffix: str = ""
    index: Path | None = None

    @property
    def name(self) -> str:
        """The folder's name, which names the files."""
        return self.folder.resolve().name

    @property
    def columns(self) -> dict[str, list[str]]:
        """The title and the other columns of the catalogue."""
        return {"title": self.catalog.titles, **self.catalog.fields}

    @property
    def header(self) -> list[str]:
        return ["user_id", "item_id", "position" if self.log.timestamps is None else "timestamp"]

    def paths(self, *names: str) -> list[Path]:
        """Files of the folder, NAME being its name."""
        return [self.folder / (name.replace("NAME", self.name) + self.suffix) for name in names]

    def sequences(self) -> Iterator[tuple[str, list[str], Sequence[int]]]:
        """(user id, item ids, times or positions) of every user."""
        log, ids = self.log, self.catalog.ids
        for user, name in enumerate(log.user_ids):
            part = slice(log.offsets[user], log.offsets[user + 1])
            taken = [ids[item] for item in log.items[part].tolist()]
            timed = log.timestamps is not None
            yield name, taken, log.timestamps[part].tolist() if timed else range(len(taken))

    def interactions(self) -> Iterator[tuple[str, str, int]]:
        """(user id, item id, time or position) of every interaction."""
        for user, taken, times in self.sequences():
            yield from ((user, item, time) for item, time in zip(taken, times, strict=True))

    def items(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(item id, title and other columns) of every item."""
        columns = self.columns
        for name, *values in zip(self.catalog.ids, *columns.values(), strict=True):
            yield name, dict(zip(columns, values, strict=True))

    def check_ids(self, path: Path, *forbidden: str, ascii_only: bool = False) -> None:
        """Raise StreamctlError if an id holds one of the texts that part columns and lines."""
        for kind, names in (("user", self.log.user_ids), ("item", self.catalog.ids)):
            for name in names:
                held = next((text for text in ("\n", "\r", *forbidden) if text in name), None)
                if held is not None:
                    raise _cannot_hold(f"{kind} id {name!r} ({held!r} ends it)", path)
                if ascii_only and not name.isascii():
                    raise _cannot_hold(f"{kind} id {name!r} (it is not ASCII)", path)


@dataclass(frozen=True)
class Sink:
    """A format to write.

    Attributes:
        source: the reader that reads it.
        write: writes the files of an export; interactions first.
        times: whether it holds times, or the order only.
        columns: the item columns that are read back; None: all.
        compressible: whether .gz and .zst make sense.
    """

    source: str
    write: Callable[[Export], list[Path]]
    times: bool = True
    columns: tuple[str, ...] | None = None
    compressible: bool = True


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
    tokenizer = run.stage("tokenizer")
    files = sink.write(
        Export(
            folder,
            Catalog.load(stage),
            InteractionLog.load(stage),
            "" if compression == "none" else f".{compression}",
            tokenizer.file("index.json") if tokenizer.complete else None,
        )
    )
    try:
        _, read = find_source(folder)
        taken = read.interactions in files
        other = f"{folder} also holds {read.interactions.name}, which `data prepare` takes first"
    except StreamctlError as error:  # what was written is whole; what lay there is in its way
        taken, other = False, f"`data prepare` cannot read {folder} as it is now: {error}"
    if not taken:
        warn(other)
    return files


def _cannot_hold(what: str, path: Path) -> StreamctlError:
    """The error of something that a format has no way to write."""
    return StreamctlError(
        f"the format cannot hold {what}", where=path, run="the same with --format table-jsonl"
    )


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


def _lines(path: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    with _text_file(path, encoding) as handle:
        handle.writelines(f"{line}\n" for line in lines)


def _json_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    _lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def _csv(path: Path, header: list[str], rows: Iterable[Iterable], delimiter: str = ",") -> None:
    """A delimited file with a header; what holds the delimiter or a quote is quoted."""
    with _text_file(path) as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _delimited(export: Export, *, kind: str, delimiter: str) -> list[Path]:
    inter, item = export.paths(f"interactions.{kind}", f"items.{kind}")
    export.check_ids(inter)
    _csv(inter, export.header, export.interactions(), delimiter)
    rows = ([name, *fields.values()] for name, fields in export.items())
    _csv(item, ["item_id", *export.columns], rows, delimiter)
    return [inter, item]


def _jsonl(export: Export) -> list[Path]:
    inter, item = export.paths("interactions.jsonl", "items.jsonl")
    header = export.header
    _json_lines(inter, (dict(zip(header, row, strict=True)) for row in export.interactions()))
    _json_lines(item, ({"item_id": name, **fields} for name, fields in export.items()))
    return [inter, item]


def _parquet(export: Export) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    inter, item = export.paths("interactions.parquet", "items.parquet")
    log = export.log
    users, items = pa.array(log.user_ids, pa.string()), pa.array(export.catalog.ids, pa.string())
    schema = pa.schema(
        list(zip(export.header, (pa.string(), pa.string(), pa.int64()), strict=True))
    )
    with atomic_file(inter) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first, last in ranges(log.offsets):
            part = slice(log.offsets[first], log.offsets[last])
            of_user = np.repeat(np.arange(first, last), log.lengths[first:last])
            order = np.arange(part.start, part.stop) - log.offsets[of_user]
            columns = [
                users.take(pa.array(of_user)),
                items.take(pa.array(log.items[part])),
                pa.array(order if log.timestamps is None else log.timestamps[part], pa.int64()),
            ]
            writer.write_table(pa.table(columns, schema))
    columns = {"item_id": export.catalog.ids, **export.columns}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    with atomic_file(item) as path:
        pq.write_table(table, path, compression="zstd")
    return [inter, item]


def _sequences(export: Export) -> list[Path]:
    inter, item = export.paths("user_sequence.txt", "items.jsonl")
    for name in (*export.log.user_ids, *export.catalog.ids):
        if name.split() != [name]:
            raise _cannot_hold(f"id {name!r} (blanks part ids)", inter)
    _lines(inter, (" ".join([user, *taken]) for user, taken, _ in export.sequences()))
    _json_lines(item, ({"item_id": name, **fields} for name, fields in export.items()))
    return [inter, item]


def _recbole(export: Export) -> list[Path]:
    """RecBole's atomic files: tab-separated, with typed headers."""
    inter, item = export.paths("NAME.inter", "NAME.item")
    export.check_ids(inter, "\t")
    header = "user_id:token\titem_id:token\ttimestamp:float"
    rows = ("\t".join(map(str, row)) for row in export.interactions())
    _lines(inter, (line for lines in ([header], rows) for line in lines))
    header = "\t".join(["item_id:token", *(f"{column}:token_seq" for column in export.columns)])
    rows = ("\t".join([name, *fields.values()]) for name, fields in export.items())
    _lines(item, (line for lines in ([header], rows) for line in lines))
    return [inter, item]


def _lcrec(export: Export) -> list[Path]:
    inter, item, index = export.paths("NAME.inter.json", "NAME.item.json", "NAME.index.json")
    _json_object(inter, ((user, taken) for user, taken, _ in export.sequences()))
    _json_object(item, export.items())
    if export.index is None:
        return [inter, item]
    with _text_file(index) as handle:
        handle.write(export.index.read_text(encoding="utf-8"))
    return [inter, item, index]


def _json_object(path: Path, entries: Iterator[tuple[str, Any]]) -> None:
    """A JSON object an entry at a time: a log of any length goes through."""
    with _text_file(path) as handle:
        for number, (name, value) in enumerate(entries):
            handle.write(",\n" if number else "{\n")
            handle.write(f"{json.dumps(name, ensure_ascii=False)}: ")
            handle.write(json.dumps(value, ensure_ascii=False))
        handle.write("\n}\n")


def _movies(export: Export) -> Iterator[tuple[str, str, str]]:
    """(item id, title, genres as MovieLens writes them) of every item."""
    for name, fields in export.items():
        yield name, fields["title"], fields.get("genres", "").replace(", ", "|")


def _movielens_dat(export: Export) -> list[Path]:
    """`::` parts the columns, as in 1M and 10M; movies are in Latin-1, as the originals."""
    inter, item = export.paths("ratings.dat", "movies.dat")
    export.check_ids(inter, ":", ascii_only=True)
    movies = []
    for row in _movies(export):
        movies.append(line := "::".join(row))
        if line.split("::") != list(row):
            raise _cannot_hold(f"{line!r} ('::' parts its columns)", item)
        if any(ord(character) > 255 for character in line):
            raise _cannot_hold(f"{line!r} (it is in Latin-1)", item)
    _lines(inter, (f"{user}::{i}::{RATING}::{time}" for user, i, time in export.interactions()))
    _lines(item, movies, "latin-1")
    return [inter, item]


def _movielens_csv(export: Export) -> list[Path]:
    inter, item = export.paths("ratings.csv", "movies.csv")
    export.check_ids(inter)
    rows = ((user, name, RATING, time) for user, name, time in export.interactions())
    _csv(inter, ["userId", "movieId", "rating", "timestamp"], rows)
    _csv(item, ["movieId", "title", "genres"], _movies(export))
    return [inter, item]


def _review(key: str, user: str, item: str, time: int) -> dict[str, Any]:
    """An interaction as a review of the releases of 2014 and 2018 (key asin), or of 2023."""
    if key == "asin":
        rating = float(RATING)
        return {"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time}
    rating = {"rating": float(RATING), "asin": item, "parent_asin": item}
    return rating | {"user_id": user, "timestamp": time}


def _amazon(export: Export, *, inter: str, meta: str, key: str) -> list[Path]:
    """Amazon Reviews as released in 2014 and 2018 (key asin) or 2023 (parent_asin).

    The meta file holds every column but those that would be taken for an id.
    """
    inter, meta = export.paths(inter, meta)
    rows = export.interactions()
    if inter.name.removesuffix(export.suffix).endswith(".csv"):
        export.check_ids(inter)
        rows = ((user, item, float(RATING), time) for user, item, time in rows)
        _csv(inter, ["user_id", "parent_asin", "rating", "timestamp"], rows)
    else:
        _json_lines(inter, (_review(key, *row) for row in rows))
    kept = [name for name in export.columns if name.lower() not in ID_NAMES]
    described = export.items()
    _json_lines(meta, ({key: i} | {name: row[name] for name in kept} for i, row in described))
    return [inter, meta]


_2018 = {"meta": "meta_NAME.json", "key": "asin"}
_2023 = {"meta": "meta_NAME.jsonl", "key": "parent_asin"}
SINKS: dict[str, Sink] = {
    "recbole": Sink("recbole", _recbole),
    "lcrec": Sink("lcrec", _lcrec, times=False),
    "sequences": Sink("sequences", _sequences, times=False),
    "table": Sink("table", partial(_delimited, kind="csv", delimiter=",")),
    "table-tsv": Sink("table", partial(_delimited, kind="tsv", delimiter="\t")),
    "table-jsonl": Sink("table", _jsonl),
    "table-parquet": Sink("table", _parquet, compressible=False),
    "movielens": Sink("movielens", _movielens_dat, columns=("genres",)),
    "movielens-csv": Sink("movielens", _movielens_csv, columns=("genres",)),
    "amazon2014": Sink(
        "amazon", partial(_amazon, inter="reviews_NAME_5.json", **_2018), columns=TEXT
    ),
    "amazon2018": Sink("amazon", partial(_amazon, inter="NAME_5.json", **_2018), columns=TEXT),
    "amazon2023": Sink("amazon2023", partial(_amazon, inter="NAME.jsonl", **_2023), columns=TEXT),
    "amazon2023-csv": Sink("amazon2023", partial(_amazon, inter="NAME.csv", **_2023), columns=TEXT),
}
