"""The one exception that users meet: what happened, where, and what to run next."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path

# The words of the command line that this process works for; () where Python is the caller.
TYPED: ContextVar[tuple[str, ...]] = ContextVar("TYPED", default=())


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
            parts[0] = parts[0].removesuffix(".")
            parts.append(f"Next: {run}")
        # What a file says may hold line breaks; an error is one line.
        super().__init__(" ".join(". ".join(parts).replace("?. Next:", "? Next:").splitlines()))


class UsageError(StreamctlError):
    """A wrong option or configuration key: exit code 2."""

    exit_code = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean NAME?` with the known words nearest to `word`; "" if none is near.

    One that differs in case or leading zeros alone is the nearest.
    """
    known = sorted(known)
    near = same_spelling(word, known) or difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return "did you mean " + " or ".join(near) + "?" if near else ""


def same_spelling(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known words that differ in case or, of numbers, in leading zeros alone."""
    plain = (lambda text: text.lstrip("0")) if word.isdigit() else str.casefold
    bare = plain(word)
    return [name for name in known if plain(name) == bare][:3]


def close_matches(word: str, known: Iterable[str]) -> str:
    """A phrase naming the known words nearest to `word`, or all of them if none is near."""
    known = sorted(known)
    return did_you_mean(word, known) or "known: " + ", ".join(known)


def count_of(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def typed_with(command: str, *words: str) -> str | None:
    """The user's own command line with more words, where it is of this command."""
    own = [word for word in TYPED.get() if word not in words]
    plain = [word for word in own if not word.startswith("-")]
    return shlex.join(["streamctl", *own, *words]) if plain[:1] == command.split()[:1] else None
