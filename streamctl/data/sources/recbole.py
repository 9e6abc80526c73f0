"""RecBole atomic files: NAME.inter and NAME.item, tab-separated, with typed headers."""

from __future__ import annotations

from functools import partial
from glob import escape
from pathlib import Path

from streamctl.data.sources.source import Files, Source, beside, matches, only, parts_of
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name


def _find(path: Path) -> Files | None:
    parts = parts_of(path, "inter")
    whole = [file for file in matches(path, "*.inter") if file not in parts]
    found = only(whole or list(parts[:1]), path)
    if found is None:
        return None
    name = plain_name(found).removesuffix(".inter")
    if not whole:
        name = name.removesuffix(".train")
    items = beside(path, f"{escape(name)}.item") or only(matches(found.parent, "*.item"), path)
    return Files(found, items, () if whole else parts)


SOURCE = Source(
    "recbole",
    "NAME.inter (user_id:token, item_id:token, timestamp:float), or NAME.train.inter, "
    "NAME.valid.inter and NAME.test.inter, + NAME.item",
    _find,
    partial(read_table, format_name="recbole", quoted=False),
)
