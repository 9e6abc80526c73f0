"""LC-Rec and LETTER: NAME.inter.json, NAME.item.json and, of a tokenized run, NAME.index.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamctl.data.sinks.sink import Export, Sink, text_file


def _write(export: Export) -> list[Path]:
    inter, item = (export.path(f"{export.name}.{kind}.json") for kind in ("inter", "item"))
    _write_object(inter, ((user, taken) for user, taken, _ in export.sequences()))
    _write_object(item, export.items())
    if export.index is None:
        return [inter, item]
    index = export.path(f"{export.name}.index.json")
    with text_file(index) as handle:
        handle.write(export.index.read_text(encoding="utf-8"))
    return [inter, item, index]


def _write_object(path: Path, entries: Iterator[tuple[str, Any]]) -> None:
    """A JSON object an entry at a time: a log of any length goes through."""
    with text_file(path) as handle:
        for number, (name, value) in enumerate(entries):
            handle.write(",\n" if number else "{\n")
            handle.write(f"{json.dumps(name, ensure_ascii=False)}: ")
            handle.write(json.dumps(value, ensure_ascii=False))
        handle.write("\n}\n")


SINK = Sink(
    "lcrec",
    "lcrec",
    "NAME.inter.json + NAME.item.json + NAME.index.json (after `tokenize`)",
    _write,
    times=False,
)
