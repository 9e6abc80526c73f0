"""How a source is read, and what its reader returns: a log in DuckDB, and the items' columns."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import duckdb
import numpy as np
import pyarrow as pa

from streamctl.data.sources.text import first_sentence
from streamctl.data.sources.times import as_integers
from streamctl.errors import StreamctlError, UsageError
from streamctl.files import disk_errors

MEMORY = "1GB"  # that DuckDB may use; what is more goes to the folder for temporary files
HELD_BYTES = 32 << 20  # of a source, up to which its log stays in memory altogether
_YOUNG = 60  # seconds
BATCH = 1 << 16  # rows that are added at once
SHOWN = 20  # bad lines that are kept of a file; the others are counted
PREFIX = "streamctl-log-"  # of the folders of temporary files
PARTS = ("train", "valid", "test")
EXTRA = ("rating", "event", "part")
# An id that is a whole number, however it is written, as people write it; any other without
# blanks around it.
_SAME = """CASE WHEN try_cast(trim({0}) AS DECIMAL(38, 6)) % 1 = 0
    THEN try_cast(trim({0}) AS DECIMAL(38, 6))::HUGEINT::VARCHAR ELSE trim({0}) END"""


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


@dataclass
class ItemTable:
    """Item columns as texts.

    Attributes:
        ids: external ids, without repetition.
        columns: column name -> one text an item ("" where there is none).
        title: name of the column to show people, or None.
        text: names of the columns a text encoder reads, in that order.
    """

    ids: list[str]
    columns: dict[str, list[str]] = field(default_factory=dict)
    title: str | None = None
    text: tuple[str, ...] = ()


class RawLog:
    """A source as read: nothing filtered, nothing sorted.

    Its tables are `users` (u, name) and `items` (i, name), numbered in the order of their names,
    and `log` (u, i, t, row and those of `EXTRA` that are there): numbers of user and item; t is a
    clock time or a position as BIGINT in the order of the source's times, or NULL where the input
    order is the order; row is the input order; part is 0, 1 or 2 (`PARTS`).

    Attributes:
        con: the connection; memory and disk are free again when this object is gone.
        timed: whether `t` are clock times; otherwise the source gives the order only.
        split: whether the source is split already.
        catalogue: the items file, or None.
        format: name of the reader.
        files: what was read, interactions first; set by `read_source`.
        dates, scale: as `times.as_integers`.
        damages: bad lines that were left out, by file.
        unread: columns of ratings or kinds of events that are there and were not asked for.
    """

    def __init__(self, size: int = 0, reading: Reading | None = None, parts: bool = False):
        """A log to be filled by `add` and `stage`.

        Args:
            size: of the source in bytes.
            reading: which columns it has, and whether ids that are the same number are one id.
            parts: whether the source is split already.
        """
        self.folder, self._lock = _scratch()
        place = ":memory:" if size < HELD_BYTES else str(Path(self.folder.name) / "log.duckdb")
        self.con = duckdb.connect(place)
        self._reading = reading or Reading()
        wanted = {"rating": self._reading.rating, "event": self._reading.event, "part": parts}
        self.extra = [name for name in EXTRA if wanted[name]]
        extra = "".join(f", {name} {'UTINYINT' if name == 'part' else 'VARCHAR'}"
                        for name in self.extra)  # fmt: skip
        # Nothing is fetched from elsewhere. What goes to disk is written once, not logged, and
        # texts that are read once are not worth the time to compress them.
        self.con.execute(f"""
            SET temp_directory = {sql_text(self.folder.name)};
            SET memory_limit = '{MEMORY}'; SET checkpoint_threshold = '1TB';
            SET autoinstall_known_extensions = false; SET timezone = 'UTC';
            SET force_compression = 'uncompressed';
            CREATE TABLE staged (user_id VARCHAR, item_id VARCHAR, time VARCHAR{extra})""")
        # Notebooks have bars of their own, and without their widgets it is an error to say no.
        if self.one("SELECT current_setting('enable_progress_bar')"):
            self.con.execute("SET enable_progress_bar = false")
        self.timed = True
        self.whole = True  # all times are whole numbers
        self.split = parts
        self.dates, self.scale = False, 1
        self.catalogue: ItemTable | None = None
        self.format = ""
        self.files: tuple[Path, ...] = ()
        self.damages: dict[str, int] = {}
        self.unread: dict[str, str] = {}

    def column(self, name: str) -> str:
        """The SQL of a column of `EXTRA`: NULL where there is none."""
        return name if name in self.extra else "NULL"

    def stage(self, columns: Mapping[str, str], source: str, part: int = 0) -> None:
        """Add the rows that an SQL source gives.

        Args:
            columns: SQL expressions of `user`, `item`, `time` and of the columns of `EXTRA`.
        """
        names = ["user", "item", "time", *self.extra]
        chosen = [str(part) if name == "part" else columns.get(name, "NULL") for name in names]
        self.con.execute(f"INSERT INTO staged SELECT {', '.join(chosen)} FROM {source}")

    def add(self, columns: Mapping[str, Iterable[str | int | None]], part: int = 0) -> None:
        """Add a batch: texts `user`, `item` and, where there are any, `time` and others, and
        numbers `line` of the lines where these stand."""
        if "line" in columns and "line" not in self.extra:
            self.con.execute("ALTER TABLE staged ADD COLUMN line BIGINT")
            self.extra.append("line")
        kinds = {name: pa.int64() if name == "line" else pa.string() for name in columns}
        arrays = {name: pa.array(values, kinds[name]) for name, values in columns.items()}
        self.con.register("batch", pa.table({f"{name}_": array for name, array in arrays.items()}))
        self.stage({name: f"{name}_" for name in arrays}, "batch", part)
        self.con.unregister("batch")

    def add_rows(self, names: Iterable[str], rows: Iterable[Sequence[Any]], part: int = 0) -> None:
        """`add` of rows, a batch at a time."""
        names, rows = list(names), iter(rows)
        while batch := list(islice(rows, BATCH)):
            self.add(dict(zip(names, zip(*batch, strict=True), strict=True)), part)

    def finish(self) -> RawLog:
        """Number users and items in the order of their names, and make whole numbers of times."""
        if self._reading.numbers:
            ids = ", ".join(f"{name} = {_SAME.format(name)}" for name in ("user_id", "item_id"))
            self.con.execute(f"UPDATE staged SET {ids}")
        moment = "time::BIGINT"
        if not self.whole:
            moment, self.dates, self.scale = as_integers(self.con)
        for plural, letter, name in (("users", "u", "user_id"), ("items", "i", "item_id")):
            self.con.execute(f"""
                CREATE TABLE {plural} AS
                SELECT (row_number() OVER (ORDER BY name) - 1)::INTEGER AS {letter}, name
                FROM (SELECT DISTINCT {name} AS name FROM staged)""")
        extra = [
            f"try_cast({name} AS DOUBLE) AS {name}" if name == "rating" else name
            for name in self.extra
            if name != "line"
        ]
        self.con.execute(f"""
            CREATE TABLE log AS
            SELECT {", ".join(["u", "i", f"{moment} AS t", *extra, "staged.rowid AS row"])}
            FROM staged JOIN users ON users.name = staged.user_id
                        JOIN items ON items.name = staged.item_id;
            DROP TABLE staged""")
        return self

    @classmethod
    def in_order(
        cls,
        sequences: Iterable[tuple[str, Sequence[str]]],
        format: str,
        size: int,
        reading: Reading,
    ) -> RawLog:
        """A log of (user, items from the oldest) that gives the order only."""
        for role in ("rating", "event"):
            if getattr(reading, role):
                raise UsageError(
                    f"the format {format} holds no {role}s",
                    run=f"leave out what asks for {role}s, or give a copy of the log as a table",
                )
        raw = cls(size, reading)
        raw.format, raw.timed = format, False
        users: list[str] = []
        items: list[str] = []
        for user, taken in sequences:
            users += [user] * len(taken)
            items += taken
            if len(items) > BATCH:
                raw.add({"user": users, "item": items})
                users, items = [], []
        raw.add({"user": users, "item": items})
        return raw.finish()

    @classmethod
    def of(
        cls,
        users: Iterable[str],
        items: Iterable[str],
        times: Iterable[int] | None = None,
        *,
        timed: bool = True,
        catalogue: ItemTable | None = None,
        format: str = "table",
    ) -> RawLog:
        """A log of columns in memory; `times` are whole numbers, or None: the rows' order."""
        raw = cls()
        columns = {"user": list(users), "item": list(items)}
        if times is not None:
            columns["time"] = [str(time) for time in times]
        raw.add(columns)
        raw.timed, raw.catalogue, raw.format = timed and times is not None, catalogue, format
        return raw.finish()

    def link(self, file: Path) -> str:
        """The SQL text of a name for a file without the * ? and [ that DuckDB would resolve."""
        link = Path(self.folder.name) / "source"
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
        return sql_text(str(link))

    def bad_share(self, damage: Damage) -> float:
        """Share of a file's lines that are bad, rounded up to a thousandth."""
        items = self.catalogue is not None and damage.path == self.files[-1]
        good = len(self.catalogue.ids) if items else len(self)
        return math.ceil(1000 * damage.count / (good + damage.count)) / 1000

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that a query gives."""
        return self.con.execute(query, list(values)).fetchall()

    def one(self, query: str, *values: Any) -> Any:
        """The first column of the only row that a query gives."""
        return self.ask(query, *values)[0][0]

    def array(self, query: str) -> np.ndarray:
        """A query's only column."""
        return next(iter(self.con.execute(query).fetchnumpy().values()))

    def names(self, plural: str) -> list[str]:
        """External ids of `users` or `items`, by number."""
        return self.array(f"SELECT name FROM {plural} ORDER BY {plural[0]}").tolist()

    def __len__(self) -> int:
        """Interactions."""
        return self.one("SELECT count(*) FROM log")

    @property
    def sizes(self) -> dict[str, int]:
        """How many users, items and interactions there are."""
        users, items = (self.one(f"SELECT count(*) FROM {name}") for name in ("users", "items"))
        return {"users": users, "items": items, "interactions": len(self)}


def _scratch() -> tuple[tempfile.TemporaryDirectory, IO[bytes]]:
    """A folder for temporary files, and a lock that says that its process lives.

    What a process that was killed has left behind is deleted.

    Raises:
        StreamctlError: there is no place for temporary files.
    """
    with disk_errors(Path(tempfile.tempdir or os.environ.get("TMPDIR", "/tmp"))):
        top = Path(tempfile.gettempdir())
        folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        lock = open(Path(folder.name) / "lock", "wb")  # noqa: SIM115 - held as long as the folder
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for path in top.glob(f"{PREFIX}*/lock"):
        with suppress(OSError), open(path, "rb+") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > _YOUNG:  # its owner may be about to lock it
                shutil.rmtree(path.parent, ignore_errors=True)
    return folder, lock


@contextmanager
def database_errors(where: Path | None = None) -> Iterator[None]:
    """What DuckDB raises, as one line.

    Raises:
        StreamctlError: with the folder for temporary files where that is full.
    """
    try:
        yield
    except duckdb.InterruptException as error:
        raise KeyboardInterrupt from error
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StreamctlError(
            f"no room for the log: {first_sentence(error)}",
            where=tempfile.gettempdir(),
            run="TMPDIR=/a/larger/disk before the same command",
        ) from error
    except duckdb.Error as error:
        raise StreamctlError(
            f"cannot be read: {first_sentence(error)}",
            where=where,
            run="`streamctl data doctor` with the same source says what it finds",
        ) from error


def sql_text(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
