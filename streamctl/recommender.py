"""A trained method asked by the log's own ids: lists and tables in, Arrow tables out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from streamctl.baselines.hops import run_evidence
from streamctl.config import MAX_K, MAX_THINK
from streamctl.data import POPULAR, load_data, stranger_note
from streamctl.data.sources.items import id_text
from streamctl.data.tables import read_table
from streamctl.decode.explain import SHOWN, explained, grounds
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import answering, load_best, load_method, method_names
from streamctl.progress import warn
from streamctl.ranking import Ranking
from streamctl.ranking import Recommender as Method
from streamctl.ranking.mmr import Diverse
from streamctl.retrieval.evidence import Evidence
from streamctl.runs import RunDir
from streamctl.tokenizer import vectors
from streamctl.tokenizer.neighbours import nearest

BATCH = 512  # users answered together
SCORES = 1 << 26  # of items, at most, that are held at once for them
_KINDS = {
    "score": pa.float32(), "weight": pa.float32(), "ranking": pa.list_(pa.string()),
    "items": pa.list_(pa.string()), "scores": pa.list_(pa.float32()),
}  # fmt: skip


@dataclass(frozen=True)
class _Question:
    """In indexes: items (H,) oldest first, the user or -1, items barred and items wanted."""

    history: np.ndarray
    user: int
    exclude: np.ndarray
    allow: np.ndarray | None


class Recommender:
    """A trained method that answers by ids; `streamctl.load` makes it.

    Attributes:
        run: the folder it lies in.
        method, methods: its name, and those that `load` takes for this run.
    """

    def __init__(self, run: Path, method: str | None, *, device: str, beam: int):
        """See `streamctl.load`."""
        self.run, self._folder, self._device = run, RunDir(run), device
        self._catalog, self._split = load_data(self._folder)
        self.methods = method_names(self._folder)
        options = {"method": method, "beam": beam}
        self._source, self.method, self._method = load_best(self._folder, device, **options)
        self._users = {user: number for number, user in enumerate(self.users)}

    @property
    def users(self) -> list[str]:
        """Ids of the users of the log."""
        return self._split.log.user_ids

    def named(self, items: Iterable[Any]) -> pa.Table:
        """Ids with their titles: item_id, title.

        Raises:
            StreamctlError: an unknown item.
        """
        return self._table(self._items(items, "items").tolist())

    def history(self, user: Any) -> pa.Table:
        """What a user took, oldest first: item_id, title; nothing of one whom the log lacks."""
        return self._table(self._taken(user).tolist())

    def recommend(
        self, history: Iterable[Any] | None = None, k: int = 10, *, user: Any = None,
        think: int | None = None, exclude: Iterable[Any] = (), allow: Iterable[Any] | None = None,
        diversity: float = 0.0, keep_seen: bool = False,
    ) -> pa.Table:  # fmt: skip
        """The k best items of the whole catalogue: item_id, title, score, best first.

        A history of no items, or a user whom the log lacks, is answered with the popular items, and
        stderr says so. The schema's metadata hold the `method`, and as `note` what stderr says.

        Args:
            history: item ids, oldest first.
            k: 1 to 1,000; fewer come where no more are left.
            user: a user of the log: what they took is the history where none is given, and is
                never evidence for their own answer.
            think: pieces of evidence to think with; None: as many as the method is best with.
            exclude: ids that are not wanted, in the catalogue or not. allow: the only ids wanted.
            diversity: 0 to 1, to make the list's items less alike (`ranking.mmr`).
            keep_seen: recommend items of the history, too.

        Raises:
            UsageError: neither history nor user, or a number out of its range.
            StreamctlError: an unknown item; names the nearest.
        """
        barred, wanted = self._barred(exclude), self._wanted(allow)
        asked = self._question(history, user, barred, wanted, keep_seen)
        method, ranking = self._ask([asked], k, think, diversity)
        told = {"method": method}
        if not len(asked.history):
            told["note"] = stranger_note(user if history is None else None, self.users)
            warn(told["note"])
        items, scores = _listed(ranking, 0)
        return self._table(items, score=scores).replace_schema_metadata(told)

    def recommend_many(
        self, users: Any, k: int = 10, *, think: int | None = None, exclude: Iterable[Any] = (),
        allow: Iterable[Any] | None = None, diversity: float = 0.0, keep_seen: bool = False,
    ) -> pa.Table:  # fmt: skip
        """`recommend` for every row of a table with a column `history` (lists of ids), `user_id`.

        Returns:
            these columns, its rows in their order; `items` and `scores`, lists, best first;
            `method`; `note`: why the popular items answer, or null; and `problem`: why a row has
            no answer, or null.

        Raises:
            UsageError: no table, neither column, or a number out of its range.
        """
        table = read_table(users, "users").read_all()
        names = [name for name in ("user_id", "history") if name in table.column_names]
        if not names:
            raise UsageError(f"users: no column user_id or history; it has {table.column_names}")
        table = table.select(names)
        if "history" in names and not holds_lists(table.schema.field("history").type):
            raise UsageError(
                f"history: {table.schema.field('history').type}, not lists of item ids"
            )
        barred, wanted = self._barred(exclude), self._wanted(allow)
        found: dict[str, list[Any]] = {
            name: [None] * len(table) for name in ("items", "scores", "method", "note", "problem")
        }
        asked: list[tuple[int, _Question]] = []
        for place, row in enumerate(table.to_pylist()):
            given = row.get("history"), row.get("user_id")
            if given == (None, None):
                found["problem"][place] = "neither a history nor a user_id"
                continue
            try:
                question = self._question(*given, barred, wanted, keep_seen, near=False)
            except StreamctlError as error:
                found["problem"][place] = str(error)
                continue
            asked.append((place, question))
            if not len(question.history):
                found["note"][place] = stranger_note(given[1] if given[0] is None else None)
        asked.sort(key=lambda pair: len(pair[1].history))
        empty = sum(not len(question.history) for _, question in asked)
        size = max(1, min(BATCH, SCORES // len(self._catalog)))
        for part in (asked[:empty], asked[empty:]):
            for first in range(0, len(part), size):
                places, questions = zip(*part[first : first + size], strict=True)
                method, ranking = self._ask(questions, k, think, diversity)
                for index, place in enumerate(places):
                    items, found["scores"][place] = _listed(ranking, index)
                    found["items"][place] = [self._catalog.ids[item] for item in items]
                    found["method"][place] = method
        for name, values in found.items():
            table = table.append_column(name, _array(name, values))
        return table

    def explain(
        self, history: Iterable[Any] | None = None, k: int = 8, *, user: Any = None,
        think: int | None = None, shorten: int | None = None,
    ) -> pa.Table:  # fmt: skip
        """The thought in words, its k heaviest pieces one by one: item_id, title, hop, weight,
        reason, and `ranking`, the ids that would be best had the thought ended there.

        Of a method that does not think: those of its k best items for which other users or texts
        speak, and why; weight and ranking are null then. Nothing in a run without a tokenizer.
        The arguments are those of `recommend`, and `shorten`: characters of a title in a reason.
        """
        _whole("shorten", 1 if shorten is None else shorten, 1, 1000)
        asked = self._question(history, user, self._barred(()), None, False)
        _check(k)
        _, ranking = self._ask([asked], max(k, SHOWN), think)
        if ranking.thought is not None:
            steps = explained(
                self._method, torch.from_numpy(asked.history), ranking, 0, users=asked.user,
                exclude=asked.exclude, allow=None, pieces=k,
            )  # fmt: skip
        elif len(asked.history) and self._folder.stage("tokenizer").complete:
            items = _listed(ranking, 0)[0][:k]
            steps = grounds(self._evidence, asked.history, items, asked.user)
        else:
            steps = []
        titles, ids = self._catalog.titles, self._catalog.ids
        for step in steps:
            names = {
                name: shortened(titles[step[name]], shorten)
                for name in ("item", "via")
                if step[name] is not None
            }
            step["reason"] = step["text"].format(**names)
            if step["ranking"] is not None:
                step["ranking"] = [ids[item] for item, _ in step["ranking"]]
        columns = ("hop", "weight", "reason", "ranking")
        listed = {name: [step[name] for step in steps] for name in columns}
        return self._table([step["item"] for step in steps], **listed)

    def similar(self, item: Any, k: int = 10) -> pa.Table:
        """The k items most alike by text, then the k that most often come next: item_id, title,
        hop ("alike" or "next"), score (cosine of the texts, or share of what came next).

        Raises:
            StreamctlError: an unknown item, or a run without a tokenizer.
        """
        _check(k)
        place = self._catalog.index(*_texts([item], "item"))
        rows = self._evidence.vectors
        [alike], [cosines] = nearest(rows, rows[[place]], k + 1)
        alike, cosines = alike[alike != place][:k], cosines[alike != place][:k]
        items, counts = self._evidence.transitions.followers.row(place)
        after = np.argsort(-counts, kind="stable")[:k]
        shares = counts[after] / max(1, self._evidence.transitions.totals[place])
        hops = ["alike"] * len(alike) + ["next"] * len(after)
        found = np.concatenate([alike, items[after]]).tolist()
        return self._table(found, hop=hops, score=[*cosines.tolist(), *shares.tolist()])

    @cached_property
    def _evidence(self) -> Evidence:
        if (own := getattr(self._method, "evidence", None)) is not None:
            return own
        return run_evidence(self._texts)

    @property
    def _texts(self) -> RunDir:
        """Where item vectors are: beside the method, or in the run itself."""
        source = self._source if self._source.stage("tokenizer").complete else self._folder
        source.require("tokenizer")
        return source

    @cached_property
    def _vectors(self) -> np.ndarray:
        return vectors(self._texts)

    @cached_property
    def _popular(self) -> Method:
        return load_method(answering(self._folder, POPULAR)[0], POPULAR, self._device)

    def _user(self, user: Any) -> int:
        """Number of a user, -1 for None and for a stranger."""
        if user is None:
            return -1
        return self._users.get(*map(self._catalog.read_id, _texts([user], "user")), -1)

    def _taken(self, user: Any) -> np.ndarray:
        number = self._user(user)
        return self._split.log.of(number).astype(np.int64) if number >= 0 else np.zeros(0, np.int64)

    def _items(self, ids: Iterable[Any], what: str, near: bool = True) -> np.ndarray:
        found = [self._catalog.index(item, near=near) for item in _texts(ids, what)]
        return np.array(found, np.int64)

    def _barred(self, exclude: Iterable[Any]) -> np.ndarray:
        found = [self._catalog.find(item) for item in _texts(exclude, "exclude")]
        return np.array([item for item in found if item is not None], np.int64)

    def _wanted(self, allow: Iterable[Any] | None) -> np.ndarray | None:
        return None if allow is None else self._items(allow, "allow")

    def _question(
        self, history: Iterable[Any] | None, user: Any, barred: np.ndarray,
        wanted: np.ndarray | None, keep_seen: bool, *, near: bool = True,
    ) -> _Question:  # fmt: skip
        if history is None and user is None:
            raise UsageError(
                "give a history (item ids, oldest first) or a user",
                run="recommend(history=[...]) or recommend(user=...)",
            )
        seen = self._taken(user) if history is None else self._items(history, "history", near)
        barred = np.union1d(barred, seen[:0] if keep_seen else seen)
        return _Question(seen[-self._split.history :], self._user(user), barred, wanted)

    def _ask(
        self, asked: Sequence[_Question], k: int, think: int | None, diversity: float = 0.0
    ) -> tuple[str, Ranking]:
        """Answers to questions that all have a history, or all have none; and who answered."""
        _check(k, think)
        if not 0 <= diversity <= 1:
            raise UsageError(f"diversity is {diversity!r}; it must be 0 to 1")
        rows = [torch.from_numpy(one.history) for one in asked]
        histories = pad_sequence(rows, batch_first=True, padding_value=-1)
        name, method = self.method, self._method
        if not len(asked[0].history):
            name, method = POPULAR, self._popular
        if diversity:
            method = Diverse(method, self._vectors, diversity)
        with torch.inference_mode():
            return name, method.recommend(
                histories,
                min(k, len(self._catalog)),
                users=np.array([one.user for one in asked]),
                think=think,
                exclude=[one.exclude for one in asked],
                allow=None if asked[0].allow is None else [one.allow for one in asked],
            )

    def _table(self, items: Sequence[int | None], **columns: Any) -> pa.Table:
        """Items by index as a table, with more columns beside."""
        names = {"item_id": self._catalog.ids, "title": self._catalog.titles}
        columns = {
            name: [None if item is None else texts[item] for item in items]
            for name, texts in names.items()
        } | columns
        return pa.table({name: _array(name, values) for name, values in columns.items()})


def shortened(title: str, most: int | None) -> str:
    """A title of at most so many characters, the last of them … if some are cut."""
    return title if most is None or len(title) <= most else f"{title[: most - 1].rstrip()}…"


def holds_lists(kind: pa.DataType) -> bool:
    """Whether a column of histories can be read; one of nulls can."""
    return kind == pa.null() or "list" in str(kind).partition("<")[0]


def _array(name: str, values: list[Any]) -> pa.Array:
    return pa.array(values, _KINDS.get(name, pa.string()))


def _listed(ranking: Ranking, row: int) -> tuple[list[int], list[float]]:
    """One user's items and scores, as many as there are."""
    items, scores = ranking.items[row], ranking.scores[row]
    return items[items >= 0].tolist(), scores[items >= 0].tolist()


def _texts(ids: Iterable[Any], what: str) -> list[str]:
    """Ids as texts, in the way that logs are read."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise UsageError(f"{what} is {ids!r}; give a list of ids")
    ways = (getattr(ids, name, None) for name in ("to_pylist", "tolist", "to_list"))
    texts = [id_text(id_) for id_ in next(filter(None, ways), lambda: ids)()]
    if "" in texts:
        raise UsageError(f"{what}: id {texts.index('') + 1} is empty")
    return texts


def _check(k: int, think: int | None = None) -> None:
    _whole("k", k, 1, MAX_K)
    _whole("think", 0 if think is None else think, 0, MAX_THINK)


def _whole(name: str, value: Any, least: int, most: int) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}; it must be {least:,} to {most:,}")
