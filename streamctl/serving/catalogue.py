"""The live catalogue: what may be recommended now, and the durable changes to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streamctl.data import Catalog
from streamctl.errors import StreamctlError, close_matches
from streamctl.runs import Stage
from streamctl.serving.items import LiveItems
from streamctl.serving.journal import Journal
from streamctl.serving.schemas import NewItem
from streamctl.serving.users import LiveUsers
from streamctl.tokenizer import PrefixTrie, SemanticIds, Tokens
from streamctl.tokenizer.tokenizer import Tokenizer

Kind = Literal["invalid", "unknown", "taken"]
_HINTS_UP_TO = 20_000  # items; close matches among more take too long


class Refused(Exception):
    """A request that cannot be answered: why, and the field at fault.

    Args:
        kind: "invalid" value, "unknown" item or user, "taken" id.
        field: JSON pointer into the body, or the parameter's name.
    """

    def __init__(self, kind: Kind, field: str, detail: str):
        super().__init__(detail)
        self.kind, self.field, self.detail = kind, field, detail


def announced_run(journal: Path, server: str) -> str | None:
    """The run that a worker of this server announced last; None if none did.

    Raises:
        StreamctlError: the journal is damaged.
    """
    records = Journal(journal).news()
    found = [
        one["name"] for one in records if one.get("op") == "run" and one.get("server") == server
    ]
    return found[-1] if found else None


class LiveCatalogue:
    """The run's items with those added and removed since, and the trie that leads to them.

    The journal that holds these changes holds what users take, too, so that all workers see one
    order. Questions may be asked from any thread; `add`, `remove`, `take`, `announce` and
    `refresh` belong to the model's thread.

    Args:
        catalog, ids: the run's.
        vocabulary: turns codes into tokens.
        stage: the tokenizer stage; gives new texts their codes.
        journal: file of the changes.
        joined: called with the index and the tokens (m,) int64 of every item that joins.
        users: get what the journal says that they took.

    Raises:
        StreamctlError: the journal is damaged.
    """

    def __init__(
        self,
        catalog: Catalog,
        ids: SemanticIds,
        vocabulary: Tokens,
        stage: Stage,
        journal: Path,
        joined: Callable[[int, np.ndarray], None],
        users: LiveUsers,
    ):
        self.items = LiveItems(catalog, ids.codes)
        self.trie = PrefixTrie(vocabulary.item_tokens(ids.codes))
        self._vocabulary, self._stage, self._joined = vocabulary, stage, joined
        self._users, self._data = users, stage.manifest["parents"]["data"]
        self._dedup = ids.dedup
        self._tokenizer: Tokenizer | None = None
        self._journal = Journal(
            journal, partial(_sound, sizes=vocabulary.sizes, tokenizer=stage.hash)
        )
        self._announced: dict[str, Any] | None = None
        self.problem: Exception | None = None
        self.refresh()

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """int64 (n, learned levels): codes of new texts; the first call loads the encoder."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._stage)
        return self._tokenizer.encode(list(texts))

    def check_new(self, new: NewItem) -> None:
        """Refuse an item whose id is taken or whose fields the catalogue does not have."""
        if self.items.index(new.id) is not None:
            raise Refused("taken", "/id", "an item with this id is in the catalogue")
        for name in new.fields:
            if name not in self.items.field_names:
                raise Refused("invalid", f"/fields/{name}", self.no_field(name))

    def add(self, new: NewItem, codes: np.ndarray) -> dict[str, Any]:
        """Write a new item to the journal and give it its place.

        Args:
            codes: those of its text, learned levels only; if they are taken it moves to free ones.

        Raises:
            Refused: the id is taken, or an unknown field.
            OSError: the journal cannot be written; nothing has changed.
        """
        with self._journal.lock():
            self.refresh()
            self.check_new(new)
            self._record(
                op="add",
                id=new.id,
                title=new.title,
                text=new.text or new.title,
                fields=new.fields,
                codes=self._free(codes),
                tokenizer=self._stage.hash,
            )
        return self.item(new.id)

    def remove(self, item_id: str) -> None:
        """Write to the journal that an item is gone, and leave it out from now on.

        Raises:
            Refused: there is no such item.
            OSError: the journal cannot be written; nothing has changed.
        """
        with self._journal.lock():
            self.refresh()
            if self.items.index(item_id) is None:
                raise Refused("unknown", "id", self.no_item(item_id))
            self._record(op="remove", id=item_id)

    def take(self, user_id: str, items: Sequence[str]) -> None:
        """Write to the journal what a user has taken, oldest first, and have it count from now on.

        It counts for runs of the data that is in service now: a log prepared later has it.

        Raises:
            Refused: an item that never was in the catalogue.
            OSError: the journal cannot be written; nothing has changed.
        """
        with self._journal.lock():
            self.refresh()
            self.known(items, "/items")
            self._record(op="take", user=user_id, items=list(items), data=self._data)

    def announce(self, run: str, server: str, process: int) -> None:
        """Tell the other workers of this server, through the journal, which run to serve."""
        with self._journal.lock():
            self.refresh()
            self._record(op="run", name=run, server=server, process=process)

    def take_announced(self, server: str, process: int) -> str | None:
        """The run that another worker of this server announced last, and since the last call.

        What was served in an earlier life, by a server that is gone, does not matter.
        """
        record, self._announced = self._announced, None
        ours = record and record.get("server") == server and record["process"] != process
        return record["name"] if ours else None

    def refresh(self) -> None:
        """Apply what the journal has gained; costs a look at the file's size when nothing has.

        Raises:
            StreamctlError: a damaged line; the records before it are applied.
        """
        while records := self._journal.news():
            for record in records:
                self._apply(record)

    def follow(self) -> None:
        """As `refresh`, but a journal that cannot be read further leaves its reason in `problem`.

        What is known already can be recommended all the same.
        """
        try:
            self.refresh()
            self.problem = None
        except (StreamctlError, OSError) as error:
            self.problem = error

    def _record(self, **record: Any) -> None:
        record["time"] = round(time.time(), 3)
        self._journal.append(record)
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        match record["op"]:
            case "add":
                self._join(record)
            case "remove":
                item = self.items.index(record["id"])
                if item is not None:
                    self.items.remove(item)
            case "take":
                found = [self.items.index_ever(item) for item in record["items"]]
                if record["data"] == self._data and None not in found:
                    self._users.take(record["user"], np.array(found, np.int64))
            case "run":
                self._announced = record

    def _join(self, record: dict[str, Any]) -> None:
        if self.items.index(record["id"]) is not None:
            return  # the run has learned the item in the meantime
        codes = record["codes"]
        if record["tokenizer"] != self._stage.hash:
            codes = self._free(self.tokenize([record["text"]])[0])
        tokens = self._vocabulary.item_tokens(np.array(codes))
        number = self.items.add(record["id"], record["title"], record["fields"], codes)
        self.trie.add(number, tokens)
        self._joined(number, tokens)

    def _free(self, codes: np.ndarray) -> list[int]:
        """The codes, with the last one moved to the nearest that no present item has.

        Under a prefix whose last level is full the item shares the codes that are its own.
        """
        codes = [int(code) for code in codes]
        prefix, last = (codes, 0) if self._dedup else (codes[:-1], codes[-1])
        order = np.arange(self._vocabulary.sizes[-1])
        if not self._dedup:
            book = self._stage.array("codebooks.npy")[-1]
            order = np.argsort(((book - book[last]) ** 2).sum(axis=1), kind="stable")
        for code in order.tolist():
            if not self._holds([*prefix, code]):
                return [*prefix, code]
        return [*prefix, last]

    def _holds(self, codes: Sequence[int]) -> bool:
        leaf = self.trie.walk(self._vocabulary.item_tokens(np.array(codes)).tolist())
        return leaf >= 0 and any(
            item not in self.items.removed for item in self.trie.items_at(leaf).tolist()
        )

    # Questions

    def no_item(self, item_id: str) -> str:
        """That there is no such item, and which ids are nearly the same."""
        small = len(self.items.ids) < _HINTS_UP_TO
        removed = self.items.removed
        there = (name for number, name in enumerate(self.items.ids) if number not in removed)
        hint = close_matches(item_id, there) if small else ""
        what = f"no such item: {item_id}"
        return f"{what}; {hint}" if hint.startswith("did") else what

    def no_field(self, name: str) -> str:
        """That the catalogue has no such field, and which it has."""
        return f"no such field; {close_matches(name, self.items.field_names)}"

    def known(self, ids: Sequence[str], field: str) -> np.ndarray:
        """int64: items with these ids, removed ones included.

        Raises:
            Refused: an id that never was in the catalogue, with its place in the request.
        """
        found = np.empty(len(ids), np.int64)
        for place, item_id in enumerate(ids):
            index = self.items.index_ever(item_id)
            if index is None:
                raise Refused("invalid", f"{field}/{place}", self.no_item(item_id))
            found[place] = index
        return found

    def search(self, words: str, limit: int) -> dict[str, Any]:
        """Present items by title; some of them where there are no words."""
        if not words.strip():
            found, total = self.items.first(limit), len(self.items)
        else:
            found = self.items.search(words)
            total = len(found)
        return {"items": [self.describe(item) for item in found[:limit]], "total": total}

    def item(self, item_id: str) -> dict[str, Any]:
        """One present item.

        Raises:
            Refused: there is none.
        """
        index = self.items.index(item_id)
        if index is None:
            raise Refused("unknown", "id", self.no_item(item_id))
        return self.describe(index)

    def describe(self, item: int) -> dict[str, Any]:
        """An item, present or not, by its index."""
        return {
            "id": self.items.ids[item],
            "title": self.items.titles[item],
            "fields": self.items.fields(item),
            "codes": list(self.items.codes[item]),
            "added": item >= self.items.base,
        }


def _sound(record: dict[str, Any], sizes: Sequence[int], tokenizer: str) -> bool:
    """Whether a record of the journal can be applied.

    Args:
        sizes: how many codes each level has. tokenizer: the hash of the stage that they are of.
    """
    match record:
        case {"op": "add", "id": str(), "title": str(), "text": str(), "tokenizer": str(maker),
              "fields": dict(fields), "codes": list(codes)}:  # fmt: skip
            named = all(isinstance(value, str) for value in fields.values())
            return named and (maker != tokenizer or _are_codes(codes, sizes))
        case {"op": "remove", "id": str()}:
            return True
        case {"op": "take", "user": str(), "items": [_, *_] as items, "data": str()}:
            return all(isinstance(item, str) for item in items)
        case {"op": "run", "name": str(), "process": int()}:
            return True
    return False


def _are_codes(codes: list[Any], sizes: Sequence[int]) -> bool:
    return len(codes) == len(sizes) and all(
        type(code) is int and 0 <= code < size for code, size in zip(codes, sizes, strict=True)
    )
