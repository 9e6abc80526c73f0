"""Amazon Reviews: 2023 (5-core csv, raw jsonl) and 2014 / 2018 (json.gz), with their meta files."""

from __future__ import annotations

from functools import partial
from glob import escape
from pathlib import Path

from streamctl.data.sources.items import read_items
from streamctl.data.sources.source import (
    Files,
    Source,
    begins_with,
    beside,
    matches,
    only,
    parts_of,
)
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name

# What describes an item, in the order in which the text encoder reads it.
TEXT = ("title", "brand", "store", "categories", "category", "features", "feature",
        "description")  # fmt: skip
_PARTS = (".train.csv", ".valid.csv", ".test.csv")  # ready-made splits of the 2023 release


def _find(path: Path, *, patterns: tuple[str, ...], words: tuple[str, ...]) -> Files | None:
    logs = [
        file
        for file in matches(path, *patterns)
        if not plain_name(file).startswith("meta_")
        and (path.is_file() or not plain_name(file).endswith(_PARTS))
        and begins_with(file, *words)
    ]
    found = only(logs, path)
    parts = () if found else parts_of(path, *(pattern.removeprefix("*.") for pattern in patterns))
    if parts and begins_with(parts[0], *words):
        found = parts[0]
    if found is None:
        return None
    category = plain_name(found).rpartition(".")[0].removeprefix("reviews_").removesuffix("_5")
    category = category.removesuffix(".train") if parts else category
    kinds = ("jsonl", "json")
    return Files(
        found,
        beside(path, *(f"meta_{escape(category)}.{kind}" for kind in kinds))
        or only(matches(found.parent, *(f"meta_*.{kind}" for kind in kinds)), found.parent),
        parts,
    )


_items = partial(read_items, text=TEXT, repeated="first")
AMAZON_2023 = Source(
    "amazon2023",
    "CATEGORY.csv (user_id, parent_asin, rating, timestamp), CATEGORY.jsonl, or "
    "CATEGORY.train.csv, .valid.csv and .test.csv "
    "+ meta_CATEGORY.jsonl.gz",
    partial(_find, patterns=("*.csv", "*.jsonl"), words=("user_id", "parent_asin")),
    partial(read_table, format_name="amazon2023"),
    _items,
)
AMAZON = Source(
    "amazon",
    "reviews_CATEGORY_5.json.gz (2014) or CATEGORY_5.json.gz (2018) + meta_CATEGORY.json.gz",
    partial(_find, patterns=("*.json", "*.jsonl"), words=("reviewerID", "asin")),
    partial(read_table, format_name="amazon"),
    _items,
)
