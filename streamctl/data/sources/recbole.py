"""RecBole atomic files: NAME.inter and NAME.item, tab-separated, with typed headers."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path

from streamctl.data.sources.items import read_items
from streamctl.data.sources.raw import RawLog
from streamctl.data.sources.source import Files, Source, beside, matches, only
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name


def _find(path: Path) -> Files | None:
    found = only(matches(path, "*.inter"), path)
    if found is None:
        return None
    name = escape(plain_name(found).removesuffix(".inter"))
    return Files(found, beside(path, f"{name}.item"))


def _read(files: Files, columns: Mapping[str, str] | None) -> RawLog:
    return read_table(
        files.interactions,
        format_name="recbole",
        columns=columns,
        quoted=False,
        catalogue=read_items(files.items) if files.items else None,
    )


SOURCE = Source(
    "recbole",
    "NAME.inter (user_id:token, item_id:token, timestamp:float) + NAME.item",
    _find,
    _read,
)
