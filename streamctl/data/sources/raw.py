"""What a reader of any format returns: coded interactions and the items' columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from streamctl.data.columns import Column

# Rows collected before their ids are folded into the vocabulary, at least.
_FOLD_ROWS = 1 << 21


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


@dataclass
class RawLog:
    """A source as read: nothing filtered, nothing sorted.

    Attributes:
        users, items: int32 (T,) codes into `user_ids` and `item_ids`, in input order; like
            `times` a map of a file where they are long.
        user_ids, item_ids: string arrays of external ids.
        times: int64 (T,) clock time or position, or None where the input order is the order.
        timed: whether `times` are clock times; otherwise the source gives the order only.
        catalogue: the items file, or None.
        format: name of the reader.
        files: what was read, interactions first; set by `read_source`.
    """

    users: np.ndarray
    items: np.ndarray
    user_ids: pa.Array
    item_ids: pa.Array
    times: np.ndarray | None
    timed: bool
    catalogue: ItemTable | None = None
    format: str = ""
    files: tuple[Path, ...] = ()


class Coder:
    """Texts -> int32 codes in order of first appearance, a batch at a time.

    Only one copy of every distinct text is held beside a few million waiting ones.
    """

    def __init__(self) -> None:
        self._known: pa.Array | None = None
        self._waiting: list[pa.Array] = []
        self._rows = 0
        self._codes = Column(np.int32)

    def add(self, texts: pa.Array | Iterable[str]) -> None:
        batch = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
        self._waiting.append(batch.dictionary_encode())
        self._rows += len(batch)
        # Folding looks at every known text, so that it waits for as many rows.
        if self._rows >= max(_FOLD_ROWS, len(self._known or ())):
            self._fold()

    def finish(self) -> tuple[np.ndarray, pa.Array]:
        """(int32 (T,) codes, string array of the distinct texts).

        Raises:
            pyarrow.ArrowInvalid: a text is not UTF-8 (parquet files are not checked on reading).
        """
        self._fold()
        known = pa.array([], pa.string()) if self._known is None else self._known
        known.validate(full=True)
        return self._codes.finish(), known.cast(pa.string())

    def _fold(self) -> None:
        if not self._waiting:
            return
        chunks = self._waiting
        if self._known is not None:
            # The known texts lead, so that their codes stay what they are.
            nothing = pa.array([], pa.int32())
            chunks = [pa.DictionaryArray.from_arrays(nothing, self._known), *chunks]
        unified = pa.chunked_array(chunks).unify_dictionaries()
        start = 0 if self._known is None else 1
        for chunk in unified.chunks[start:]:
            self._codes.append(chunk.indices.to_numpy())
        self._known = unified.chunk(0).dictionary
        self._waiting, self._rows = [], 0
