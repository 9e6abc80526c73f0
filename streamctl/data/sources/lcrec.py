"""LC-Rec and LETTER: NAME.inter.json (user -> items in order) and NAME.item.json (item -> text)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

from streamctl.data.sources.items import make_table
from streamctl.data.sources.raw import ItemTable, RawLog, Reading
from streamctl.data.sources.source import Files, Source, beside, matches, only
from streamctl.data.sources.text import numbered, plain_name, writable
from streamctl.errors import StreamctlError

FORM = "NAME.inter.json and NAME.item.json as LC-Rec and LETTER write them: an object each"


def _find(path: Path) -> Files | None:
    found = only(matches(path, "*.inter.json"), path)
    if found is None:
        return None
    name = escape(plain_name(found).removesuffix(".inter.json"))
    return Files(found, beside(path, f"{name}.item.json"))


def _load(path: Path) -> dict[str, Any]:
    text = "\n".join(line for _, line in numbered(path))
    if not text.strip():
        raise StreamctlError("the file is empty", where=path, run=FORM)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise StreamctlError(
            f"not JSON: {error.msg}", where=path, line=error.lineno, run=FORM
        ) from error
    except (RecursionError, ValueError) as error:
        told = "not such a file: JSON nested too deep, or with a huge number"
        raise StreamctlError(told, where=path, run=FORM) from error
    if not isinstance(value, dict) or not value:
        raise StreamctlError("holds no object of users or items", where=path, run=FORM)
    return value


def _read(files: Files, reading: Reading) -> RawLog:
    path = files.interactions

    def sequences() -> Iterator[tuple[str, list[str]]]:
        for user, taken in _load(path).items():
            if not isinstance(taken, list) or not all(isinstance(i, int | str) for i in taken):
                raise StreamctlError(f"user {user!r} has no list of item ids", where=path, run=FORM)
            yield writable(user), [writable(str(item)) for item in taken]

    return RawLog.in_order(sequences(), "lcrec", path.stat().st_size, reading)


def _items(path: Path, reading: Reading) -> ItemTable:
    entries = _load(path)
    for item, entry in entries.items():
        if not isinstance(entry, dict):
            raise StreamctlError(f"item {item!r} is no object", where=path, run=FORM)
    rows = (
        (number, {**entry, "item_id": item})
        for number, (item, entry) in enumerate(entries.items(), 1)
    )
    return make_table(rows, path, reading, id_column="item_id")


SOURCE = Source(
    "lcrec",
    "NAME.inter.json (user -> item ids in order) + NAME.item.json (item -> title, description)",
    _find,
    _read,
    _items,
)
