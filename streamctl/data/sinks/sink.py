"""What a writer gets, and what it says of itself."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.errors import StreamctlError
from streamctl.files import atomic_file

RATING = 5  # the log holds no ratings; tools that drop low ones must keep what was taken


@dataclass(frozen=True)
class Export:
    """One export.

    Attributes:
        folder: where the files go.
        suffix: "", ".gz" or ".zst".
        index: the tokenizer's index.json, or None.
    """

    folder: Path
    catalog: Catalog
    log: InteractionLog
    suffix: str = ""
    index: Path | None = None

    @property
    def name(self) -> str:
        """The folder's name, which names the files."""
        return self.folder.resolve().name

    @property
    def columns(self) -> dict[str, list[str]]:
        """The title and the other columns of the catalogue."""
        return {"title": self.catalog.titles, **self.catalog.fields}

    def path(self, name: str) -> Path:
        return self.folder / (name + self.suffix)

    def sequences(self) -> Iterator[tuple[str, list[str], Sequence[int]]]:
        """(user id, item ids, times or positions) of every user."""
        log, ids = self.log, self.catalog.ids
        for user, name in enumerate(log.user_ids):
            part = slice(log.offsets[user], log.offsets[user + 1])
            taken = [ids[item] for item in log.items[part].tolist()]
            timed = log.timestamps is not None
            yield name, taken, log.timestamps[part].tolist() if timed else range(len(taken))

    def interactions(self) -> Iterator[tuple[str, str, int]]:
        """(user id, item id, time or position) of every interaction."""
        for user, taken, times in self.sequences():
            yield from ((user, item, time) for item, time in zip(taken, times, strict=True))

    def items(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(item id, title and other columns) of every item."""
        columns = self.columns
        for name, *values in zip(self.catalog.ids, *columns.values(), strict=True):
            yield name, dict(zip(columns, values, strict=True))

    def check_ids(self, path: Path, *forbidden: str, ascii_only: bool = False) -> None:
        """Raise StreamctlError if an id holds one of the texts that part columns and lines."""
        for kind, names in (("user", self.log.user_ids), ("item", self.catalog.ids)):
            for name in names:
                held = next((text for text in ("\n", "\r", *forbidden) if text in name), None)
                if held is not None:
                    raise cannot_hold(f"{kind} id {name!r} ({held!r} ends it)", path)
                if ascii_only and not name.isascii():
                    raise cannot_hold(f"{kind} id {name!r} (it is not ASCII)", path)


@dataclass(frozen=True)
class Sink:
    """A format to write.

    Attributes:
        name: as `--format` takes it.
        source: the reader that reads it.
        layout: the files, for people.
        write: writes them; interactions first.
        times: whether it holds times, or the order only.
        columns: the item columns that are read back; None: all.
        compressible: whether .gz and .zst make sense.
    """

    name: str
    source: str
    layout: str
    write: Callable[[Export], list[Path]]
    times: bool = True
    columns: tuple[str, ...] | None = None
    compressible: bool = True


def cannot_hold(what: str, path: Path) -> StreamctlError:
    """The error of something that a format has no way to write."""
    return StreamctlError(
        f"the format cannot hold {what}", where=path, run="the same with --format table-jsonl"
    )


@contextmanager
def text_file(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file to write, compressed as its name says, there when the block ends.

    The same texts give the same bytes.
    """
    with atomic_file(path) as temporary, ExitStack() as stack:
        raw = stack.enter_context(open(temporary, "wb"))
        if path.suffix == ".gz":
            raw = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        elif path.suffix == ".zst":
            import zstandard

            raw = stack.enter_context(zstandard.ZstdCompressor().stream_writer(raw))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding, newline=""))


def write_lines(path: Path, rows: Iterator[dict[str, object]]) -> None:
    """A JSON object a line."""
    with text_file(path) as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
