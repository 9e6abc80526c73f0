"""A format: its name, how its files are found, how they are read."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamctl.data.sources.items import read_items
from streamctl.data.sources.raw import ItemTable, RawLog, Reading
from streamctl.data.sources.text import first_line, plain_name
from streamctl.errors import StreamctlError

_PART = re.compile(
    r"(?:(?P<log>.*)[._-])?(?P<part>train|valid|validation|val|dev|test)\.(?P<kind>[a-z]+)"
)


@dataclass(frozen=True)
class Files:
    """What a reader reads: the interactions, and the items where there is such a file.

    `parts` are the files of a log that is split already: train, valid (if there is one), test.
    """

    interactions: Path
    items: Path | None = None
    parts: tuple[Path | None, ...] = ()


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


def parts_of(path: Path, *kinds: str) -> tuple[Path | None, ...]:
    """(train, valid or None, test) of a folder that holds a log in such parts, or ().

    Their names are [NAME.]train.KIND and so on; valid may be val, validation or dev.

    Raises:
        StreamctlError: there are several such logs; names them.
    """
    if path.is_file():
        return ()
    logs: dict[tuple[str, str], dict[str, Path]] = {}
    for file in sorted(path.iterdir()):
        name = _PART.fullmatch(plain_name(file))
        if name and file.is_file() and name["kind"] in kinds:
            part = {"train": "train", "test": "test"}.get(name["part"], "valid")
            logs.setdefault((name["log"], name["kind"]), {})[part] = file
    logs = {key: parts for key, parts in logs.items() if {"train", "test"} <= set(parts)}
    only([parts["train"] for parts in logs.values()], path)
    for parts in logs.values():
        return parts["train"], parts.get("valid"), parts["test"]
    return ()


def begins_with(path: Path, *words: str) -> bool:
    """Whether the first line of a text file holds all of the words."""
    try:
        _, line = first_line(path)
    except StreamctlError:
        return False  # the reader that takes it will say what is wrong
    return all(word in line for word in words)
