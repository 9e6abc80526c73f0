"""Amazon Reviews as they were released in 2014, 2018 and 2023: reviews and their meta file.

Every rating is `RATING`. The meta file holds every column; those that Amazon has are read back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from streamctl.data.sinks.sink import RATING, Export, Sink, write_lines
from streamctl.data.sinks.table import write_csv
from streamctl.data.sources.amazon import TEXT
from streamctl.data.sources.items import ID_NAMES


def _meta(export: Export, path: Path, key: str) -> Path:
    """The items; a column with the name of an id is left out, for it would be taken for one."""
    write_lines(
        path,
        (
            {key: name, **{k: v for k, v in fields.items() if k.lower() not in ID_NAMES}}
            for name, fields in export.items()
        ),
    )
    return path


def _reviews(export: Export, *, file: str) -> list[Path]:
    inter = export.path(file.format(export.name))
    write_lines(
        inter,
        (
            {"reviewerID": user, "asin": item, "overall": float(RATING), "unixReviewTime": time}
            for user, item, time in export.interactions()
        ),
    )
    return [inter, _meta(export, export.path(f"meta_{export.name}.json"), "asin")]


def _lines_2023(export: Export) -> list[Path]:
    inter = export.path(f"{export.name}.jsonl")
    write_lines(
        inter,
        (
            {"rating": float(RATING), "asin": i, "parent_asin": i, "user_id": user, "timestamp": t}
            for user, i, t in export.interactions()
        ),
    )
    return [inter, _meta(export, export.path(f"meta_{export.name}.jsonl"), "parent_asin")]


def _csv_2023(export: Export) -> list[Path]:
    inter = export.path(f"{export.name}.csv")
    export.check_ids(inter)
    rows = ((user, item, float(RATING), time) for user, item, time in export.interactions())
    write_csv(inter, ["user_id", "parent_asin", "rating", "timestamp"], rows)
    return [inter, _meta(export, export.path(f"meta_{export.name}.jsonl"), "parent_asin")]


def _sink(name: str, layout: str, write: Callable[[Export], list[Path]]) -> Sink:
    source = "amazon2023" if name.startswith("amazon2023") else "amazon"
    return Sink(name, source, layout, write, columns=TEXT)


SINKS = (
    _sink(
        "amazon2014",
        "reviews_NAME_5.json + meta_NAME.json",
        partial(_reviews, file="reviews_{}_5.json"),
    ),
    _sink("amazon2018", "NAME_5.json + meta_NAME.json", partial(_reviews, file="{}_5.json")),
    _sink("amazon2023", "NAME.jsonl + meta_NAME.jsonl", _lines_2023),
    _sink("amazon2023-csv", "NAME.csv + meta_NAME.jsonl", _csv_2023),
)
