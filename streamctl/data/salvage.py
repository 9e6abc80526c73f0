"""The good lines of a damaged file, and what is wrong with the others."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamctl.data.sources.items import ID_NAMES, find_column, parse_object
from streamctl.data.sources.movielens import MOVIE_COLUMNS
from streamctl.data.sources.source import Files
from streamctl.data.sources.table import find_roles, is_time
from streamctl.data.sources.text import delimiter_of, open_binary, plain_name

SHOWN = 20  # bad lines that are kept; the others are counted

Check = Callable[[str], str | None]


@dataclass
class Damage:
    """Bad lines of one file: the first ones as (line, what is wrong), and how many in all."""

    path: Path
    lines: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append((line, reason))


def salvage(
    files: Files, folder: Path, columns: Mapping[str, str] | None
) -> tuple[Files, list[Damage]]:
    """Copies of text files with their good lines alone; parquet and whole-file JSON stay.

    Args:
        files: what a reader could not read.
        folder: where the copies go.
        columns: the user's names of columns.

    Returns:
        (the files to read instead, the damage of each file that has some).

    Raises:
        StreamctlError: a header without the needed columns, or a file that cannot be opened.
    """
    damages = []
    interactions = files.interactions
    check = _interaction_check(interactions, columns)
    if check is not None:
        interactions = _copy(interactions, folder, check, damages)
    items = files.items
    check = _item_check(items) if items is not None else None
    if check is not None:
        items = _copy(items, folder, check, damages)
    return Files(interactions, items), damages


def _copy(path: Path, folder: Path, check: Check, damages: list[Damage]) -> Path:
    import zstandard

    encoding = "latin-1" if plain_name(path) in MOVIE_COLUMNS else "utf-8"
    damage = Damage(path)
    copy = folder / plain_name(path)
    number = 0
    with open_binary(path) as source, open(copy, "w", encoding=encoding, newline="\n") as target:
        stream = iter(source)
        while True:
            number += 1
            try:
                raw = next(stream, None)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError):
                damage.add(number, "the compressed file is damaged or cut short from here on")
                break
            if raw is None:
                break
            try:
                text = raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError:
                damage.add(number, "not UTF-8 text")
                continue
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            reason = check(text)
            if reason is None:
                target.write(text + "\n")
            else:
                damage.add(number, reason)
    if not damage.count:
        return path
    damages.append(damage)
    return copy


def _interaction_check(path: Path, columns: Mapping[str, str] | None) -> Check | None:
    name = plain_name(path)
    if name.endswith(".inter.json") or name.endswith(".parquet"):
        return None
    if name.endswith(".txt"):
        return _sequence_check()
    if name.endswith((".json", ".jsonl")):
        return _object_check(path, columns)
    if name in ("ratings.dat", "u.data"):  # MovieLens without a header
        mark = "::" if name == "ratings.dat" else "\t"
        names = ["user_id", "item_id", "rating", "timestamp"]
        return _row_check(path, lambda text: text.split(mark), names)
    return _row_check(path, _splitter(path), None, columns)


def _splitter(path: Path) -> Callable[[str], list[str]]:
    name = plain_name(path)
    mark = {"u.item": "|", "movies.dat": "::"}.get(name, "\t")
    if name.endswith((".inter", ".item", ".dat")):
        return lambda text: text.split(mark)
    delimiter = "\t" if name.endswith(".tsv") else delimiter_of(path)
    return lambda text: next(csv.reader([text], delimiter=delimiter))


def _row_check(
    path: Path,
    split: Callable[[str], list[str]],
    header: list[str] | None,
    columns: Mapping[str, str] | None = None,
) -> Check:
    """Rows with the header's number of columns, both ids, and a time."""
    state: dict[str, list] = {}

    def learn(names: list[str]) -> None:
        state["header"] = names
        state["places"] = [names.index(role) for role in find_roles(names, columns, path)]

    if header is not None:
        learn(header)

    def check(text: str) -> str | None:
        try:
            row = split(text)
        except csv.Error as error:
            return f"not CSV: {error}"
        if "header" not in state:
            learn([name.strip() for name in row])
            return None
        if len(row) != len(state["header"]):
            return f"{len(row)} columns where the header has {len(state['header'])}"
        user, item, time = (row[place] for place in state["places"])
        return _values_check(user, item, time)

    return check


def _object_check(path: Path, columns: Mapping[str, str] | None) -> Check:
    roles: list[str] = []

    def check(text: str) -> str | None:
        row = parse_object(text)
        if row is None:
            return "not a JSON object"
        if not roles:
            roles.extend(find_roles(list(row), columns, path))
        missing = [role for role in roles if row.get(role) is None]
        if missing:
            return f"no {missing[0]!r} here"
        return _values_check(*(str(row[role]) for role in roles))

    return check


def _values_check(user: str, item: str, time: str) -> str | None:
    if not user or not item:
        return "the user id is empty" if not user else "the item id is empty"
    return None if is_time(time) else f"{time!r} is no number and no ISO date"


def _sequence_check() -> Check:
    users: set[str] = set()

    def check(text: str) -> str | None:
        user, *items = text.split()
        if not items:
            return f"user {user!r} has no items"
        if user in users:
            return f"user {user!r} occurs twice"
        users.add(user)
        return None

    return check


def _item_check(path: Path) -> Check | None:
    """Objects or rows with an id of their own."""
    name = plain_name(path)
    if name.endswith((".item.json", ".parquet")):
        return None
    seen: set[str] = set()
    repeated = name.startswith("meta_")  # Amazon's own files repeat items; the first one counts
    header = list(MOVIE_COLUMNS.get(name, ()))
    split = None if name.endswith((".jsonl", ".json")) else _splitter(path)

    def check(text: str) -> str | None:
        if split is None:
            row = parse_object(text)
            if row is None:
                return "not a JSON object"
        else:
            try:
                values = split(text)
            except csv.Error as error:
                return f"not CSV: {error}"
            if not header:
                header.extend(values)
                return None
            if len(values) != len(header):
                return f"{len(values)} columns where the header has {len(header)}"
            row = dict(zip(header, values, strict=True))
        column = find_column(row, ID_NAMES)
        item = str(row[column]) if column is not None and row[column] is not None else ""
        if not item:
            return "no item id"
        if item in seen and not repeated:
            return f"item id {item!r} occurs twice"
        seen.add(item)
        return None

    return check
