"""Published statistics of public data sets, to compare a prepared log with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """A public set after the benchmarks' 5-core filter.

    `pattern` is looked for in "FORMAT FOLDER/FILE" of the interactions, ignoring case.
    """

    pattern: str
    name: str
    users: int
    items: int
    interactions: int
    source: str


KNOWN = (
    Known(r"2014\W.*beauty|reviews_Beauty_5",
          "Amazon 2014 Beauty, 5-core", 22_363, 12_101, 198_502, "S3-Rec and TIGER"),
    Known(r"2014\W.*sports|reviews_Sports_and_Outdoors_5",
          "Amazon 2014 Sports and Outdoors, 5-core", 35_598, 18_357, 296_337, "S3-Rec and TIGER"),
    Known(r"2014\W.*toys|reviews_Toys_and_Games_5",
          "Amazon 2014 Toys and Games, 5-core", 19_412, 11_924, 167_597, "S3-Rec and TIGER"),
    Known(r"amazon-2018-scientific/",
          "Amazon 2018 Industrial and Scientific, users active in the last fifth",
          3_285, 3_541, 22_743, "the copy's own README"),
    Known(r"^amazon2023 .*Musical_Instruments",
          "Amazon 2023 Musical Instruments, 5-core", 57_439, 24_587, 511_836,
          "STREAM-Rec, table 1 (which prints 57,349 users)"),
    Known(r"^amazon2023 .*Industrial_and_Scientific",
          "Amazon 2023 Industrial and Scientific, 5-core", 50_985, 25_848, 412_947,
          "STREAM-Rec, table 1"),
    Known(r"ml-1m/", "MovieLens 1M, 5-core", 6_040, 3_416, 999_611, "SASRec and BERT4Rec"),
    Known(r"ml-100k/", "MovieLens 100K, 5-core", 943, 1_349, 99_287, "RecBole"),
    Known(r"ml-20m/", "MovieLens 20M, 5-core", 138_493, 18_345, 19_984_024, "BERT4Rec reruns"),
)  # fmt: skip


def published(format_name: str, files: Sequence[Path]) -> dict[str, Any] | None:
    """The published statistics of the set whose interactions were read, if it is a known one."""
    if not files:
        return None
    path = files[0].resolve()
    text = f"{format_name} {path.parent.name}/{path.name}"
    for known in KNOWN:
        if re.search(known.pattern, text, re.IGNORECASE):
            facts = asdict(known)
            del facts["pattern"]
            return facts
    return None
