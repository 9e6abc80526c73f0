"""The one exception that users meet: what happened, where, and what to run next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class StreamctlError(Exception):
    """An expected failure. The command line prints it as one line and exits with code 1.

    Args:
        what: what happened, as a sentence without a full stop.
        where: the file (and line) or the setting at fault, if there is one.
        run: the command or the change that puts it right, if there is one.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        line: int | None = None,
        run: str | None = None,
    ):
        self.what = what
        self.where = None if where is None else f"{where}:{line}" if line else str(where)
        self.run = run
        parts = [f"{self.where}: {what}" if self.where else what]
        if run:
            parts.append(f"Next: {run}")
        # What a file says may hold line breaks; an error is one line.
        super().__init__(" ".join(". ".join(parts).splitlines()))


class UsageError(StreamctlError):
    """A wrong option or configuration key: exit code 2."""

    exit_code = 2


def close_matches(word: str, known: Iterable[str]) -> str:
    """A phrase naming the known words nearest to `word`, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "known: " + ", ".join(known)
