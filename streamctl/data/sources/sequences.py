"""`user_sequence.txt`: a user and then the items in time order, blank-separated, a line a user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from streamctl.data.sources.items import read_items
from streamctl.data.sources.raw import Coder, RawLog
from streamctl.data.sources.source import Files, Source, beside, pick
from streamctl.data.sources.text import lines
from streamctl.errors import StreamctlError


def _find(path: Path) -> Files | None:
    found = pick(path, "user_sequence.txt", "user_sequences.txt", "sequential_data.txt")
    if found is None and path.is_file():
        found = pick(path, "*.txt")
    return Files(found, beside(path, "items.jsonl", "items.csv")) if found else None


def _read(files: Files, columns: Mapping[str, str] | None) -> RawLog:
    """The log of a sequence file; it gives the order only.

    Raises:
        StreamctlError: a line without items, a user in two lines, an empty file.
    """
    path = files.interactions
    users: list[str] = []
    items, lengths = Coder(), []
    first_seen: dict[str, int] = {}
    for number, text in lines(path):
        user, *taken = text.split()
        if not taken:
            raise StreamctlError(f"user {user!r} has no items", where=path, line=number)
        if user in first_seen:
            raise StreamctlError(
                f"user {user!r} occurs twice, first in line {first_seen[user]}",
                where=path,
                line=number,
                run="one line a user: user item item ...; a line an interaction belongs in a .csv "
                "or .tsv with a header",
            )
        first_seen[user] = number
        users.append(user)
        lengths.append(len(taken))
        items.add(taken)
    if not users:
        raise StreamctlError("the file is empty", where=path)
    codes, item_ids = items.finish()
    return RawLog(
        users=np.repeat(np.arange(len(users), dtype=np.int32), lengths),
        items=codes,
        user_ids=pa.array(users, pa.string()),
        item_ids=item_ids,
        times=None,
        timed=False,
        catalogue=read_items(files.items) if files.items else None,
        format="sequences",
    )


SOURCE = Source(
    "sequences",
    "user_sequence.txt (user item item ... a line) + items.jsonl|csv",
    _find,
    _read,
)
