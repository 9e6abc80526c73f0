"""The store: items and users by id, and what changes while serving, in two SQLite files.

    FOLDER/catalog-HASH.sqlite  items, titles, users and their histories: made from the run once
    FOLDER/live.sqlite          items, removals and interactions that came since (WAL, synced)

The first can be thrown away; the second is the only copy of what it holds. Processes share both.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streamctl.data import id_reader, load_data
from streamctl.errors import StreamctlError, close_matches, did_you_mean
from streamctl.files import atomic_file_each
from streamctl.runs import RunDir

LIVE = "live.sqlite"
BUSY_S = 30  # a writer waits so long for another
FOUND = 1000  # titles that are found and counted, at most
HINTS_UP_TO = 20_000  # items; close matches among more take too long
# Scripts that put no blanks between words: each of their letters is a word of the index.
_NO_BLANKS = (  # Thai to Lao, Myanmar, Khmer, kana, Han
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_NO_BLANKS}]|(?:(?![{_NO_BLANKS}])[^\\W_])+|[^\\w\\s]")
_FTS = "fts5(title, content='', tokenize=\"unicode61 categories 'L* N* M* S* Co'\")"

_CATALOG = f"""
CREATE TABLE items(item INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, fields TEXT, codes TEXT,
                   taken INTEGER);
CREATE TABLE field(name TEXT, value TEXT, item INTEGER, PRIMARY KEY(name, value, item))
    WITHOUT ROWID;
CREATE TABLE users(user INTEGER PRIMARY KEY, id TEXT UNIQUE, items BLOB);
CREATE VIRTUAL TABLE titles USING {_FTS};
"""
_CHANGES = f"""
CREATE TABLE IF NOT EXISTS items(number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, title TEXT,
                                 text TEXT, fields TEXT);
CREATE INDEX IF NOT EXISTS items_id ON items(id);
CREATE TABLE IF NOT EXISTS field(name TEXT, value TEXT, number INTEGER,
                                 PRIMARY KEY(name, value, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS codes(number INTEGER, tokenizer TEXT, codes TEXT, vector BLOB,
                                 PRIMARY KEY(number, tokenizer));
CREATE INDEX IF NOT EXISTS codes_codes ON codes(codes);
CREATE TABLE IF NOT EXISTS removed(seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT, number INTEGER);
CREATE INDEX IF NOT EXISTS removed_id ON removed(id);
CREATE INDEX IF NOT EXISTS removed_number ON removed(number);
CREATE TABLE IF NOT EXISTS interactions(seq INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT,
                                        items TEXT, data TEXT);
CREATE INDEX IF NOT EXISTS interactions_user ON interactions(user);
CREATE TABLE IF NOT EXISTS forgotten(seq INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT UNIQUE);
CREATE VIRTUAL TABLE IF NOT EXISTS titles USING {_FTS};
"""

# An item that came while serving is gone, too, where the run has one of its id: it is of a log that
# was prepared since.
_VIEWS = """
CREATE TEMP VIEW of_run AS
SELECT item, id, title, fields, codes, taken,
       EXISTS (SELECT 1 FROM main.removed AS r WHERE r.id = i.id AND r.number IS NULL) AS gone
FROM base.items AS i;
CREATE TEMP VIEW of_live AS
SELECT i.number + {last} AS item, i.number, i.id, i.title, i.text, i.fields, c.codes, c.vector,
       EXISTS (SELECT 1 FROM main.removed AS r WHERE r.number = i.number)
       OR EXISTS (SELECT 1 FROM of_run AS b WHERE b.id = i.id AND NOT b.gone) AS gone
FROM main.items AS i
LEFT JOIN main.codes AS c ON c.number = i.number AND c.tokenizer = '{tokenizer}';
CREATE TEMP VIEW item AS
SELECT item, id, codes, gone FROM of_run UNION ALL SELECT item, id, codes, gone FROM of_live;
"""
VARIABLES = 30_000  # of one query; SQLite takes 32,766


class Refused(Exception):
    """A request that cannot be answered: why, and the field at fault.

    Args:
        kind: "invalid" value, "unknown" item or user, "taken" id.
        field: JSON pointer into the body, or the parameter's name.
    """

    def __init__(self, kind: Literal["invalid", "unknown", "taken"], field: str, detail: str):
        super().__init__(detail)
        self.kind, self.field, self.detail = kind, field, detail


def words_of(text: str) -> list[str]:
    """The words of a title in lower case; symbols, and letters of scripts without blanks, alone."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word for word in found if unicodedata.category(word[0])[0] != "P"]


def make_catalog(run: RunDir, path: Path) -> None:
    """Write the run's items and users, with the log's whole histories, to an SQLite file."""
    catalog, split = load_data(run)
    log, size = split.log, len(catalog)
    taken = np.bincount(log.items, minlength=size).tolist()
    tokenizer = run.stage("tokenizer")
    codes = tokenizer.array("codes.npy").tolist() if tokenizer.complete else [[]] * size
    filled = {name: column for name, column in catalog.fields.items() if any(column)}
    items = log.items.astype("<i4", copy=False)

    def fields(item: int) -> str:
        return json.dumps({name: column[item] for name, column in filled.items() if column[item]})

    with atomic_file_each(path) as part:
        part.unlink(missing_ok=True)
        base = sqlite3.connect(part, isolation_level=None)
        base.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _CATALOG)
        base.execute("BEGIN")
        rows = zip(range(size), catalog.ids, catalog.titles, strict=True)
        base.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
            ((i, id_, title, fields(i), json.dumps(codes[i]), taken[i]) for i, id_, title in rows),
        )
        titles = ((i, " ".join(words_of(title))) for i, title in enumerate(catalog.titles))
        base.executemany("INSERT INTO titles(rowid, title) VALUES (?, ?)", titles)
        for name in catalog.fields:  # one without a value has this row, so that its name is known
            column = filled.get(name, ())
            pairs = {(name, value, i) for i, value in enumerate(column) if value}
            base.executemany(
                "INSERT INTO field VALUES (?, ?, ?)", sorted(pairs) or [(name, "", -1)]
            )
        ends = log.offsets.tolist()
        base.executemany(
            "INSERT INTO users VALUES (?, ?, ?)",
            (
                (user, id_, items[ends[user] : ends[user + 1]].tobytes())
                for user, id_ in enumerate(log.user_ids)
            ),
        )
        base.execute("COMMIT")
        base.execute("CREATE INDEX items_taken ON items(taken DESC)")
        base.execute("CREATE INDEX items_codes ON items(codes)")
        base.close()


@dataclass(frozen=True)
class Changes:
    """What was written to the store from one moment to another.

    Attributes:
        mark: the last number of each table, for the next look; "items": live items there ever were.
        items: (dense index, text, codes, vector) of the new ones that are present; codes are None
            where this run's tokenizer has not read the item yet.
        removed: dense indexes of items taken out.
        forgotten: users. taken: (user, items) of what was taken since, oldest first.
    """

    mark: dict[str, int]
    items: list[tuple[int, str, list[int] | None, np.ndarray]]
    removed: list[int]
    forgotten: list[str]
    taken: list[tuple[str, list[int]]]


class Store:
    """One connection to a run's catalogue and to the changes since; several threads may use it.

    Items have dense indexes: those of the run first, then item `number` of the live ones at
    `base + number - 1`, gone or not.

    Attributes:
        base, log_users: how many items and users the run has.
        tokenizer, data: hashes of the run's stages; codes and interactions belong to them.
    """

    def __init__(self, run: RunDir, folder: Path | None = None):
        """Open both files; make the run's catalogue if it is not there yet.

        Args:
            folder: where they are; by default `RUN/serving`.

        Raises:
            StreamctlError: no such run, a folder that cannot be written, or a damaged file.
        """
        self.run, self.folder = run, folder or run.path / "serving"
        data, tokenizer = run.require("data"), run.stage("tokenizer")
        self.data, self.tokenizer = data.hash, tokenizer.hash if tokenizer.complete else ""
        self.read_id = id_reader(data)
        catalog = self.folder / f"catalog-{(self.tokenizer or self.data)[:16]}.sqlite"
        self._lock = threading.RLock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not catalog.exists():
                make_catalog(run, catalog)
            self._db = sqlite3.connect(
                self.folder / LIVE, BUSY_S, isolation_level=None, check_same_thread=False, uri=True
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(
                "PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;" + _CHANGES
            )
            # Nobody writes to it; with locks on it who reads would keep writers of LIVE waiting.
            self._db.execute("ATTACH ? AS base", [f"{catalog.resolve().as_uri()}?immutable=1"])
            self.base = self._one("SELECT count(*) FROM base.items")
            self.log_users = self._one("SELECT count(*) FROM base.users")
            self._db.executescript(_VIEWS.format(last=self.base - 1, tokenizer=self.tokenizer))
        except (OSError, sqlite3.Error) as error:
            raise StreamctlError(
                f"the store cannot be opened: {getattr(error, 'strerror', None) or error}",
                where=self.folder,
                run="--store FOLDER with one that can be written, or the file's backup",
            ) from error

    def close(self) -> None:
        self._db.close()

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _among(self, sql: str, wanted: Sequence[Any], *values: Any) -> list[Any]:
        """Rows of a query with {} in the place of a list, behind its other values."""
        rows = []
        for start in range(0, len(wanted), VARIABLES):
            part = wanted[start : start + VARIABLES]
            rows += self._all(sql.format(",".join("?" * len(part))), *values, *part)
        return rows

    def _one(self, sql: str, *values: Any) -> Any:
        """The first column of the first row, or None."""
        rows = self._all(sql, *values)
        return rows[0][0] if rows else None

    @contextmanager
    def _transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
        """Queries that see one state, and changes that come to be together; part of a larger one
        if there is one."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute(f"BEGIN {kind}")
            with self._db:  # commits, or rolls back
                yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that keeps other writers out from its first look; synced at its end.

        Raises:
            StreamctlError: the disk refuses; nothing of it is stored.
        """
        try:
            with self._transaction("IMMEDIATE"):
                yield
        except sqlite3.Error as error:
            what = f"the change cannot be stored: {error}"
            raise StreamctlError(what, where=self.folder) from error

    # Items

    def indexes(self, ids: Sequence[str]) -> list[int | None]:
        """Dense indexes of items that are or were there; None for ids that never were."""
        # Of several with one id the present one is last, or the latest that was there.
        sql = "SELECT id, item FROM item WHERE id IN ({}) ORDER BY gone DESC, item"
        ids = [self.read_id(id_) for id_ in ids]
        found = dict(self._among(sql, ids))
        return [found.get(id_) for id_ in ids]

    def known(self, ids: Sequence[str], field: str) -> list[int]:
        """As `indexes`, but an id that never was is refused with its place below `field`.

        Raises:
            Refused: naming ids that are nearly the same.
        """
        found = self.indexes(ids)
        if None in found:
            place = found.index(None)
            raise Refused("invalid", f"{field}/{place}", self._no_item(ids[place]))
        return found

    def index(self, id_: str) -> int | None:
        """Dense index of an item that is there; None if there is none."""
        return self._one("SELECT item FROM item WHERE id = ? AND NOT gone", self.read_id(id_))

    def _of_items(self, columns: str, items: Iterable[int], where: str = "1") -> list[Any]:
        """Columns of some items by dense index, in any order."""
        wanted = sorted(set(items))
        numbers = [item - self.base + 1 for item in wanted if item >= self.base]
        sql = f"SELECT {columns} FROM %s WHERE {where} AND %s IN ({{}})"
        rows = self._among(sql % ("of_run", "item"), wanted[: len(wanted) - len(numbers)])
        return rows + self._among(sql % ("of_live", "number"), numbers)

    def describe(self, items: Iterable[int]) -> list[dict[str, Any]]:
        """id, title, fields, codes and `added` of items, gone or not, by dense index."""
        items = list(items)
        found = {
            item: {
                "id": id_, "title": title, "fields": json.loads(fields),
                "codes": json.loads(codes or "[]"), "added": item >= self.base,
            }
            for item, id_, title, fields, codes in self._of_items(
                "item, id, title, fields, codes", items
            )
        }  # fmt: skip
        return [found[item] for item in items]

    def names(self, items: Iterable[int]) -> dict[int, dict[str, str]]:
        """{dense index: {id, title}} of some items."""
        rows = self._of_items("item, id, title", items)
        return {item: {"id": id_, "title": title} for item, id_, title in rows}

    def item(self, id_: str) -> dict[str, Any]:
        """One item that is there.

        Raises:
            Refused: there is none.
        """
        return self.describe([self.present(id_)])[0]

    def present(self, id_: str) -> int:
        """Dense index of an item that is there.

        Raises:
            Refused: there is none.
        """
        item = self.index(id_)
        if item is None:
            raise Refused("unknown", "id", self._no_item(id_))
        return item

    def search(self, words: str, limit: int) -> dict[str, Any]:
        """Items whose titles have all the words, or their beginnings; at most FOUND are counted.

        Without words, those that most users took.
        """
        if not words.strip():
            sql = "SELECT item FROM of_run WHERE NOT gone ORDER BY taken DESC LIMIT ?"
            items = [item for (item,) in self._all(sql, limit)]
            return {"items": self.describe(items), "total": self.count()}
        phrases = [" ".join(words_of(part)) for part in words.split()]
        query = " AND ".join(f'"{phrase}" *' for phrase in phrases if phrase)
        if not query:
            return {"items": [], "total": 0}
        sql = """SELECT rowid FROM base.titles WHERE titles MATCH ?1 UNION ALL
                 SELECT rowid + ?2 FROM main.titles WHERE titles MATCH ?1 LIMIT ?3"""
        matches = [item for (item,) in self._all(sql, query, self.base - 1, FOUND)]
        begin = " ".join(words_of(words))
        found = sorted(
            (not " ".join(words_of(title)).startswith(begin), len(title), item)
            for item, title in self._of_items("item, title", matches, "NOT gone")
        )
        items = self.describe(item for *_, item in found[:limit])
        return {"items": items, "total": len(found)}

    def count(self) -> int:
        """Items that can be recommended."""
        sql = "SELECT count(DISTINCT id) FROM removed WHERE number IS NULL AND id IN {}"
        gone = self._one(sql.format("(SELECT id FROM base.items)"))
        return self.base - gone + self._one("SELECT count(*) FROM of_live WHERE NOT gone")

    def with_values(self, name: str, values: Sequence[str], field: str) -> list[int]:
        """Items whose column `name` has one of the values, in order.

        Raises:
            Refused: no such column; names those that there are.
        """
        self.check_field(name, field)
        sql = "SELECT {} WHERE name = ? AND value IN ({{}})"
        parts = "item FROM base.field", f"number + {self.base - 1} FROM main.field"
        rows = [row for part in parts for row in self._among(sql.format(part), values, name)]
        return sorted({item for (item,) in rows if item >= 0})

    def check_field(self, name: str, field: str) -> None:
        """Refuse the name of a column that the catalogue does not have."""
        if not self._all("SELECT 1 FROM base.field WHERE name = ? LIMIT 1", name):
            names = [one for (one,) in self._all("SELECT DISTINCT name FROM base.field")]
            hint = close_matches(name, names) if names else "it has none"
            raise Refused("invalid", f"{field}/{name}", f"no such field; {hint}")

    def _no_item(self, id_: str) -> str:
        """That there is no such item, and which ids are nearly the same."""
        what, there = f"no such item: {id_}", []
        if self.base < HINTS_UP_TO:
            there = [one for (one,) in self._all("SELECT id FROM item WHERE NOT gone")]
        near = did_you_mean(id_, there)
        return f"{what}; {near}" if near else what

    # Users

    def user(self, id_: str) -> list[int] | None:
        """All items that a user took, oldest first; None if nothing is known of the user."""
        id_ = self.read_id(id_)
        rows = self._all("SELECT items FROM base.users WHERE id = ?", id_)
        if rows and self._all("SELECT 1 FROM forgotten WHERE user = ?", id_):
            rows = []
        sql = "SELECT items FROM interactions WHERE user = ? AND data = ? ORDER BY seq"
        live = self._all(sql, id_, self.data)
        if not rows and not live:
            return None
        since = [item for (items,) in live for item in self.indexes(json.loads(items))]
        taken = np.frombuffer(rows[0][0], "<i4").tolist() if rows else []
        return taken + [item for item in since if item is not None]

    def number_in_log(self, id_: str) -> int | None:
        """Dense number of a user of the log, forgotten or not."""
        return self._one("SELECT user FROM base.users WHERE id = ?", self.read_id(id_))

    def described_user(self, id_: str, latest: int) -> dict[str, Any]:
        """What is read of a user: the latest items, and how many there are.

        Raises:
            Refused: there is no such user.
        """
        items = self.user(id_)
        if items is None:
            raise Refused("unknown", "id", f"nothing is known of user {id_!r}")
        return {
            "id": self.read_id(id_),
            "history": self.describe(items[-latest:]),
            "interactions": len(items),
        }

    def users(self, beginning: str, limit: int) -> dict[str, Any]:
        """Users whose ids begin so, evenly over those of the log, then those who came since."""
        span = (beginning, beginning + "\U0010ffff")
        where = "id >= ? AND id < ? AND id NOT IN (SELECT user FROM forgotten)"
        base = self._one(f"SELECT count(*) FROM base.users WHERE {where}", *span)
        sql = f"""SELECT id FROM (SELECT id, row_number() OVER (ORDER BY user) - 1 AS place
                  FROM base.users WHERE {where}) WHERE place % ? = 0 LIMIT ?"""
        found = [one for (one,) in self._all(sql, *span, max(1, base // limit), limit)]
        sql = """SELECT DISTINCT user FROM interactions WHERE user >= ? AND user < ? AND data = ?
                 AND (user NOT IN (SELECT id FROM base.users)
                      OR user IN (SELECT user FROM forgotten))"""
        live = [one for (one,) in self._all(sql, *span, self.data)]
        return {"users": [*found, *live][:limit], "total": base + len(live)}

    # Changes

    def check_new(self, id_: str, fields: dict[str, str]) -> None:
        """Refuse an item whose id is taken or whose fields the catalogue does not have."""
        if self.index(id_) is not None:
            raise Refused("taken", "/id", "an item with this id is in the catalogue")
        for name in fields:
            self.check_field(name, "/fields")

    def add(self, id_: str, title: str, text: str, fields: dict[str, str]) -> int:
        """A new item, inside `writing`; its dense index."""
        record = self.read_id(id_), title, text, json.dumps(fields)
        sql = "INSERT INTO items(id, title, text, fields) VALUES (?, ?, ?, ?)"
        number = self._db.execute(sql, record).lastrowid
        sql = "INSERT INTO main.titles(rowid, title) VALUES (?, ?)"
        self._db.execute(sql, (number, " ".join(words_of(title))))
        rows = [(name, value, number) for name, value in fields.items() if value]
        self._db.executemany("INSERT INTO main.field VALUES (?, ?, ?)", rows)
        return self.base + number - 1

    def set_codes(self, item: int, codes: Sequence[int], vector: np.ndarray) -> None:
        """What the run's tokenizer makes of a live item, inside `writing`; the first word counts.

        Args:
            codes: (m,). vector: float32 (dim,).
        """
        record = item - self.base + 1, self.tokenizer, json.dumps([int(code) for code in codes])
        blob = np.asarray(vector, "<f4").tobytes()
        self._db.execute("INSERT OR IGNORE INTO codes VALUES (?, ?, ?, ?)", (*record, blob))

    def last_codes(self, prefix: Sequence[int]) -> set[int]:
        """The last codes of present items whose other codes are these."""
        begin = json.dumps([*prefix, 0])[:-2]
        sql = "SELECT codes FROM item WHERE codes BETWEEN ? AND ? AND NOT gone"
        return {json.loads(codes)[-1] for (codes,) in self._all(sql, begin, begin + "~")}

    def remove(self, id_: str) -> None:
        """Take an item out; histories that hold it stay valid.

        Raises:
            Refused: there is no such item.
        """
        with self.writing():
            item = self.present(id_)
            number = item - self.base + 1 if item >= self.base else None
            record = self.read_id(id_), number
            self._db.execute("INSERT INTO removed(id, number) VALUES (?, ?)", record)

    def take(self, user: str, items: Sequence[str]) -> None:
        """Add what a user, known or new, took, oldest first.

        It counts for runs of the data in service now: a log that is prepared later has it.

        Raises:
            Refused: an item that never was in the catalogue.
        """
        self.known(items, "/items")
        with self.writing():
            record = self.read_id(user), json.dumps(list(items)), self.data
            sql = "INSERT INTO interactions(user, items, data) VALUES (?, ?, ?)"
            self._db.execute(sql, record)

    def forget(self, user: str) -> None:
        """Delete what came of a user while serving, and read nothing of the log's from now on.

        Raises:
            Refused: there is no such user.
        """
        if self.user(user) is None:
            raise Refused("unknown", "id", f"nothing is known of user {user!r}")
        user = self.read_id(user)
        with self.writing():
            self._db.execute("DELETE FROM interactions WHERE user = ?", (user,))
            self._db.execute("INSERT OR REPLACE INTO forgotten(user) VALUES (?)", (user,))
        # The user is forgotten already; a checkpoint that fails now is made up for by a later one.
        with self._lock, suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # What others changed

    def changes(self, since: Mapping[str, int]) -> Changes | None:
        """What was written after a mark, by whichever connection; None if nothing was.

        Args:
            since: the `mark` of the last changes; empty for all that there ever were.
        """
        with self._transaction("DEFERRED"):
            mark = dict(self._all("SELECT name, seq FROM main.sqlite_sequence"))
            if mark == since:
                return None
            live, removed, taken, forgotten = (
                since.get(table, 0) for table in ("items", "removed", "interactions", "forgotten")
            )
            sql = """SELECT item, text, codes, vector FROM of_live
                     WHERE number > ? AND NOT gone ORDER BY number"""
            items = [
                (item, text, codes and json.loads(codes), np.frombuffer(vector or b"", "<f4"))
                for item, text, codes, vector in self._all(sql, live)
            ]
            sql = """SELECT coalesce(r.number + ?, b.item) FROM removed AS r
                     LEFT JOIN base.items AS b ON b.id = r.id WHERE seq > ? ORDER BY seq"""
            gone = [item for (item,) in self._all(sql, self.base - 1, removed) if item is not None]
            sql = "SELECT user, items FROM interactions WHERE seq > ? AND data = ? ORDER BY seq"
            rows = [(user, json.loads(ids)) for user, ids in self._all(sql, taken, self.data)]
            ids = list(dict.fromkeys(id_ for _, some in rows for id_ in some))
            known = dict(zip(ids, self.indexes(ids), strict=True))
            users = self._all("SELECT user FROM forgotten WHERE seq > ? ORDER BY seq", forgotten)
        return Changes(
            mark, items, gone, [user for (user,) in users],
            [(user, [known[id_] for id_ in some if known[id_] is not None]) for user, some in rows],
        )  # fmt: skip
