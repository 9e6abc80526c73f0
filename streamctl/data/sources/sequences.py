"""`user_sequence.txt`: a user and then the items in time order, blank-separated, a line a user."""

from __future__ import annotations

from pathlib import Path

from streamctl.data.sources.raw import RawLog, Reading
from streamctl.data.sources.source import Files, Source, beside, pick
from streamctl.data.sources.text import first_line, lines


def _find(path: Path) -> Files | None:
    found = pick(path, "user_sequence.txt", "user_sequences.txt", "sequential_data.txt")
    if found is None and path.is_file():
        found = pick(path, "*.txt")
    return Files(found, beside(path, "items.jsonl", "items.csv")) if found else None


def _read(files: Files, reading: Reading) -> RawLog:
    """The log of a sequence file; it gives the order only.

    Raises:
        StreamctlError: a line without items, a user in two lines, an empty file.
    """
    path = files.interactions
    first_line(path, "replace")  # an empty file is an error
    seen: dict[str, int] = {}

    def sequences():
        for number, text in lines(path, "replace" if reading.skip_bad else "utf-8"):
            user, *taken = text.split()
            if not taken:
                reading.bad(path, number, f"user {user!r} has no items")
            elif user in seen:
                reading.bad(
                    path,
                    number,
                    f"user {user!r} occurs twice, first in line {seen[user]}",
                    "one line a user: user item item ...; a line an interaction belongs in a .csv "
                    "or .tsv with a header",
                )
            else:
                seen[user] = number
                yield user, taken

    return RawLog.in_order(sequences(), "sequences", path.stat().st_size, reading)


SOURCE = Source(
    "sequences", "user_sequence.txt (user item item ... a line) + items.jsonl|csv", _find, _read
)
