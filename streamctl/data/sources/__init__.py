"""Readers of interaction logs, one a format, and the detection of which one fits."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamctl.data.sources.items import read_items
from streamctl.data.sources.raw import RawLog
from streamctl.data.sources.sequences import read_sequences
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name
from streamctl.errors import StreamctlError, UsageError, close_matches

_TABLES = ("csv", "tsv", "parquet", "jsonl")


@dataclass(frozen=True)
class Files:
    """What a reader reads: the interactions, and the items where there is such a file."""

    interactions: Path
    items: Path | None = None


@dataclass(frozen=True)
class Source:
    """A format.

    Attributes:
        name: as `--format` takes it.
        layout: the files, for people.
        find: the files at a path (a folder or the interactions file), or None if it is not this.
        read: the files (and the user's names of columns) -> RawLog.
    """

    name: str
    layout: str
    find: Callable[[Path], Files | None]
    read: Callable[[Files, Mapping[str, str] | None], RawLog]


def pick(path: Path, *patterns: str) -> Path | None:
    """The file `path`, or the first file in folder `path`, that matches a pattern.

    Patterns are tried in order, in lower case, on names without .gz or .zst.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    for pattern in patterns:
        for file in files:
            if fnmatch.fnmatchcase(plain_name(file), pattern):
                return file
    return None


def beside(path: Path, *patterns: str) -> Path | None:
    """The first file that matches in folder `path`, or in the folder of file `path`."""
    return pick(path if path.is_dir() else path.parent, *patterns)


def _find_table(path: Path) -> Files | None:
    names = [f"interactions.{kind}" for kind in _TABLES]
    if path.is_file():
        names += [f"*.{kind}" for kind in _TABLES]
    found = pick(path, *names)
    items = beside(path, *(f"items.{kind}" for kind in _TABLES))
    return Files(found, items) if found else None


def _read_table(files: Files, columns: Mapping[str, str] | None) -> RawLog:
    catalogue = read_items(files.items) if files.items else None
    return read_table(files.interactions, format_name="table", columns=columns, catalogue=catalogue)


def _find_sequences(path: Path) -> Files | None:
    found = pick(path, "user_sequence.txt", "user_sequences.txt", "sequential_data.txt")
    if found is None and path.is_file():
        found = pick(path, "*.txt")
    return Files(found, beside(path, "items.jsonl", "items.csv")) if found else None


def _read_sequences(files: Files, columns: Mapping[str, str] | None) -> RawLog:
    return read_sequences(
        files.interactions, catalogue=read_items(files.items) if files.items else None
    )


SOURCES = (
    Source(
        "sequences",
        "user_sequence.txt (user item item ... a line) + items.jsonl|csv",
        _find_sequences,
        _read_sequences,
    ),
    Source(
        "table",
        "interactions.csv|tsv|parquet|jsonl (user_id, item_id, timestamp or position) "
        "+ items.jsonl|csv|tsv|parquet",
        _find_table,
        _read_table,
    ),
)


def read_source(
    path: Path, format_name: str = "auto", columns: Mapping[str, str] | None = None
) -> RawLog:
    """A log of any format.

    Args:
        path: a folder or the interactions file.
        format_name: a reader's name, or "auto": the first whose files are there.
        columns: `user`, `item`, `time` -> column, for tables.

    Raises:
        UsageError: an unknown format; names the known ones.
        StreamctlError: no such path, nothing readable there, or what the reader raises.
    """
    return find_source(path, format_name)[0](columns)


def find_source(
    path: Path, format_name: str = "auto"
) -> tuple[Callable[[Mapping[str, str] | None], RawLog], Source, Files]:
    """(a function that reads it, the format, its files) of a path; nothing is read yet."""
    names = [source.name for source in SOURCES]
    if format_name not in ("auto", *names):
        raise UsageError(
            f"unknown format {format_name!r}; {close_matches(format_name, names)}; "
            f"known: auto, {', '.join(names)}"
        )
    if not path.exists():
        raise StreamctlError("no such file or folder", where=path)
    for source in SOURCES:
        if format_name in ("auto", source.name):
            files = source.find(path)
            if files is not None:
                return (lambda columns, s=source, f=files: s.read(f, columns)), source, files
    wanted = [source for source in SOURCES if format_name in ("auto", source.name)]
    layouts = "; ".join(f"{source.name}: {source.layout}" for source in wanted)
    found = "" if path.is_file() else ", ".join(sorted(f.name for f in path.iterdir())[:8])
    raise StreamctlError(
        f"nothing here that a reader knows{f' (found {found})' if found else ''}. "
        f"Looked for {layouts}",
        where=path,
    )


def parse_columns(text: str) -> dict[str, str]:
    """`user=uid,item=product` -> {"user": "uid", "item": "product"}.

    Raises:
        UsageError: another form, or a role that is not user, item or time.
    """
    roles = ("user", "item", "time")
    columns = {}
    for part in filter(None, text.split(",")):
        role, equals, name = (word.strip() for word in part.partition("="))
        if not equals or not name or role not in roles:
            raise UsageError(f"--columns takes user=NAME,item=NAME,time=NAME, not {text!r}")
        columns[role] = name
    return columns
