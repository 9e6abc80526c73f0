"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 15.0
NAME_WIDTH = 24  # of the longest name in a table that is kept on one line


def plain_console(**options: Any) -> Console:
    """A rich console that prints texts as they are: no markup, no emoji codes, no highlighting.

    Titles, ids and paths may hold anything, `[/b]` and `:smile:` too; styles go by `style=`.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


console = plain_console(stderr=True)


class Bar:
    """One running bar; `advance` moves it, `note` shows a short text such as the loss."""

    def __init__(self, title: str, total: int, unit: str, progress: Progress | None):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.text = 0, ""
        self.started = self.last_line = time.monotonic()
        self._begin = 0
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="") if progress else None

    def start_at(self, done: int) -> None:
        """Begin at `done`, the work of an earlier run."""
        self.done = self._begin = done
        self.advance(0)

    def note(self, text: str) -> None:
        self.text = text

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        rate = (self.done - self._begin) / max(now - self.started, 1e-9)
        note = f"{_pace(rate, self.unit)} {self.text}"
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, note=note)
        elif not console.quiet and now - self.last_line > LINE_EVERY_S:
            self.last_line = now
            left = (self.total - self.done) / max(rate, 1e-9)
            line = f"{self.title}: {self.done:,}/{self.total:,} {note} {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)


def _pace(rate: float, unit: str) -> str:
    """`1,200 steps/s`, `2.5 steps/s`; what takes longer than a second, `4.2 s/step`."""
    if rate >= 1:
        return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}/s"
    return f"{1 / rate:,.1f} s/{unit.removesuffix('s')}" if rate else "starting"


@contextmanager
def progress_bar(title: str, total: int, unit: str = "steps") -> Iterator[Bar]:
    """A bar on stderr: live on a terminal, a line every 15 seconds elsewhere."""
    if not console.is_terminal:
        yield Bar(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(title, total, unit, progress)


def say(text: str) -> None:
    """A line of information on stderr."""
    console.print(text)


def warn(text: str) -> None:
    """A warning on stderr, in yellow."""
    console.print(f"warning: {text}", style="yellow")
