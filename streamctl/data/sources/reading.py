"""How a source is to be read, and the bad lines that were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamctl.errors import StreamctlError

SHOWN = 20  # bad lines that are kept of a file; the others are counted


@dataclass
class Damage:
    """Bad lines of one file: the first ones as (line, what is wrong), and how many in all."""

    path: Path
    lines: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0


@dataclass
class Reading:
    """How a source is to be read.

    Attributes:
        columns: the user's names of the columns for `user`, `item`, `time`, `rating`, `event`.
        rating, event: whether these columns are wanted.
        numbers: ids that are the same number are the same id.
        skip_bad: bad lines are left out and listed in `damages`; otherwise the first is an error.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    rating: bool = False
    event: bool = False
    numbers: bool = False
    skip_bad: bool = False
    damages: list[Damage] = field(default_factory=list)

    def bad(self, path: Path, line: int, reason: str, run: str | None = None) -> None:
        """Report a bad line.

        Raises:
            StreamctlError: bad lines are not to be left out.
        """
        if not self.skip_bad:
            run = run or "`data doctor` lists the bad lines, --skip-bad 0.01 leaves out up to 1%"
            raise StreamctlError(reason, where=path, line=line, run=run)
        self.count(path, [(line, reason)], 1)

    def count(self, path: Path, lines: list[tuple[int, str]], count: int) -> None:
        """Report `count` bad lines, the first of which are `lines`."""
        damage = next((d for d in self.damages if d.path == path), None)
        if damage is None:
            self.damages.append(damage := Damage(path))
        damage.count += count
        damage.lines += lines[: SHOWN - len(damage.lines)]
