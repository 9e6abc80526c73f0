"""A format: its name, how its files are found, how they are read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamctl.data.sources.items import read_items
from streamctl.data.sources.raw import ItemTable, RawLog
from streamctl.data.sources.reading import Reading
from streamctl.data.sources.text import first_line, plain_name
from streamctl.errors import StreamctlError


@dataclass(frozen=True)
class Files:
    """What a reader reads: the interactions, and the items where there is such a file.

    `parts` are the files of a log that is split already: train, valid and test.
    """

    interactions: Path
    items: Path | None = None
    parts: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """A format.

    Attributes:
        name: as `--format` takes it.
        layout: the files, for people.
        find: the files at a path (a folder or the interactions file), or None if it is not this.
        read: the files, and how -> RawLog.
        items: an items file, and how -> its table.
    """

    name: str
    layout: str
    find: Callable[[Path], Files | None]
    read: Callable[[Files, Reading], RawLog]
    items: Callable[[Path, Reading], ItemTable] = read_items


def matches(path: Path, *patterns: str) -> list[Path]:
    """Path itself, or the files in folder `path`, that match: pattern by pattern, then by name.

    Patterns are in lower case and see names without .gz or .zst.
    """
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return [f for pattern in patterns for f in files if fnmatch.fnmatchcase(plain_name(f), pattern)]


def pick(path: Path, *patterns: str) -> Path | None:
    """The first of `matches`, or None."""
    return next(iter(matches(path, *patterns)), None)


def beside(path: Path, *patterns: str) -> Path | None:
    """The first file that matches in folder `path`, or in the folder of file `path`."""
    return pick(path if path.is_dir() else path.parent, *patterns)


def only(found: list[Path], path: Path) -> Path | None:
    """The one log among those found in a folder, or None if there is none.

    Raises:
        StreamctlError: there are several; names them.
    """
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8])
        raise StreamctlError(
            f"{len(found)} logs here: {names}",
            where=path,
            run="give the file instead of the folder",
        )
    return found[0] if found else None


def begins_with(path: Path, *words: str) -> bool:
    """Whether the first line of a text file holds all of the words."""
    try:
        _, line = first_line(path)
    except StreamctlError:
        return False  # the reader that takes it will say what is wrong
    return all(word in line for word in words)
