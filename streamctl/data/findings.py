"""What an examination of a source finds: one thing looked at, how bad it is, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Level = Literal["good", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing examined: how bad it is, what was seen, and what to do about it."""

    topic: str
    level: Level
    what: str
    remedy: str = ""
    lines: list[str] = field(default_factory=list)


def count_of(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
