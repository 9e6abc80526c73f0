"""RecBole atomic files: NAME.inter and NAME.item, tab-separated, with typed headers."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from streamctl.data.sources.raw import RawLog
from streamctl.data.sources.reading import Reading
from streamctl.data.sources.source import Files, Source, beside, matches, only
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name


def _find(path: Path) -> Files | None:
    found = only(matches(path, "*.inter"), path)
    if found is None:
        return None
    name = escape(plain_name(found).removesuffix(".inter"))
    return Files(found, beside(path, f"{name}.item"))


def _read(files: Files, reading: Reading) -> RawLog:
    return read_table(files, reading, format_name="recbole", quoted=False)


SOURCE = Source(
    "recbole",
    "NAME.inter (user_id:token, item_id:token, timestamp:float) + NAME.item",
    _find,
    _read,
)
