"""Item vectors and Semantic IDs that a user brings: `--vectors` and `--semantic-ids`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streamctl.data.sources.items import id_text
from streamctl.errors import StreamctlError, count_of
from streamctl.files import file_hash, read_json
from streamctl.runs import StageWriter

SHOWN = 3  # ids that a message names
CODES = 'an object such as {"i1": ["<a_12>", "<b_3>"], ...}, with as many codes for each item'
MOST = (16, 2**16)  # levels, and codes of a level


class OwnVectors:
    """The user's vectors instead of a text encoder's.

    Attributes:
        rows: (N, d) float32, in the catalogue's order.
    """

    def __init__(self, path: str, rows: np.ndarray | None = None):
        self.path, self.rows = path, rows

    @classmethod
    def read(cls, path: str, ids: Sequence[str]) -> OwnVectors:
        """A row for each item.

        Args:
            path: .npy (N, d), rows in the order of the run's data/items.parquet, or in that of
                the ids in `NAME.ids.txt` beside it (one a line); or .parquet with `item_id` and
                either one column of lists or numeric columns.
            ids: the catalogue's, in its order.

        Raises:
            StreamctlError: no such file, another number of rows, an item without one, an id
                twice, or a value that is not finite.
        """
        file = Path(path)
        if not file.is_file():
            raise StreamctlError(
                "no such file of item vectors",
                where=file,
                run="--vectors with the path of a .npy or .parquet file",
            )
        try:
            names, rows = _parquet(file) if file.suffix == ".parquet" else _npy(file, len(ids))
            rows = np.ascontiguousarray(rows, np.float32)
        except (ValueError, OSError, TypeError, EOFError, NotImplementedError) as error:
            raise StreamctlError(
                f"cannot be read as item vectors: {error}",
                where=file,
                run="a .npy or a .parquet as `streamctl tokenize --help` describes",
            ) from error
        if rows.ndim != 2 or not rows.shape[1]:
            raise StreamctlError(
                f"item vectors are (N, d), not {rows.shape}",
                where=file,
                run="one vector of numbers for each item",
            )
        if names is not None:
            rows = rows[_places(file, names, ids, "vector")]
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(wrong):
            raise StreamctlError(
                f"{count_of(len(wrong), 'vector')} with a value that is not a finite number, "
                f"such as that of item {ids[wrong[0]]!r}",
                where=file,
                run="make these anew, or put zeros there",
            )
        return cls(path, rows)

    def save(self, stage: StageWriter) -> None:
        """Write encoder.json: where the vectors came from."""
        about = {"kind": "vectors", "name": self.path, "sha256": file_hash(Path(self.path))}
        stage.save_json("encoder.json", about)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Raises: the user brought no vectors for new texts."""
        if not len(texts) and self.rows is not None:
            return self.rows[:0]
        raise StreamctlError(
            f"this run's item vectors came from {self.path}: a new text has none",
            run="tokenize with --encoder, or add the item to the data and to the vectors",
        )


def _npy(file: Path, count: int) -> tuple[list[str] | None, np.ndarray]:
    rows = np.load(file, allow_pickle=False)
    beside = file.with_name(file.stem + ".ids.txt")
    if beside.is_file():
        names = beside.read_text(encoding="utf-8").splitlines()
        if len(names) != len(rows):
            raise ValueError(f"{len(rows)} rows, but {beside.name} has {len(names)} ids")
        return names, rows
    if len(rows) != count:
        raise ValueError(
            f"{len(rows)} rows for {count} items. A .npy has a row for each item of the run's "
            f"data/items.parquet, in its order; else put the ids into {beside.name}, one a line"
        )
    return None, rows


def _parquet(file: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    if "item_id" not in table.column_names:
        raise ValueError(f"there is no column item_id among {', '.join(table.column_names)}")
    names = [id_text(name) for name in table["item_id"].to_pylist()]
    rest = table.drop_columns(["item_id"]).combine_chunks()
    lists = [f.name for f in rest.schema if pa.types.is_nested(f.type)]
    if len(lists) == 1:
        return names, np.stack([np.asarray(row) for row in rest[lists[0]].to_pylist()])
    columns = [f.name for f in rest.schema if pa.types.is_integer(f.type) or
               pa.types.is_floating(f.type)]  # fmt: skip
    if lists or not columns:
        raise ValueError("beside item_id it needs one column of lists, or numeric columns")
    return names, np.stack([rest[name].to_numpy() for name in columns], 1)


def read_semantic_ids(path: str, ids: Sequence[str]) -> np.ndarray:
    """Codes (N, L) int64 from LC-Rec's and LETTER's index.json, in the catalogue's order.

    Args:
        path: a JSON object, item id -> ["<a_12>", "<b_3>", ...] (or the numbers alone).

    Raises:
        StreamctlError: another form, items without codes, or more levels or codes than fit.
    """
    file = Path(path)
    index = read_json(file)
    if not isinstance(index, dict) or not index:
        raise StreamctlError(
            "Semantic IDs are a JSON object: item id -> list of codes", where=file, run=CODES
        )
    order = _places(file, list(index), ids, "Semantic ID")
    names, rows = list(index), list(index.values())
    found = []
    for place in order.tolist():
        try:
            row = [int(re.fullmatch(r"(?:<[a-z]+_)?(\d+)>?", str(code))[1]) for code in rows[place]]
        except (TypeError, ValueError) as error:
            raise StreamctlError(
                f"item {names[place]!r} has {rows[place]!r}; codes look like "
                '["<a_12>", "<b_3>", ...]',
                where=file,
                run=CODES,
            ) from error
        if len(row) != len(rows[order[0]]) or not 0 < len(row) <= MOST[0] or max(row) >= MOST[1]:
            raise StreamctlError(
                f"item {names[place]!r} has {rows[place]!r}; every item has the same number of "
                f"codes, 1 to {MOST[0]}, each under {MOST[1]}",
                where=file,
                run=CODES,
            )
        found.append(row)
    return np.array(found, np.int64)


def _places(file: Path, names: list[str], ids: Sequence[str], what: str) -> np.ndarray:
    """Where each of the catalogue's ids stands among `names`."""
    place = {name: number for number, name in enumerate(names)}
    if len(place) != len(names):
        twice = next(name for number, name in enumerate(names) if place[name] != number)
        raise StreamctlError(
            f"item {twice!r} is there twice", where=file, run="leave one of them out"
        )
    missing = [name for name in ids if name not in place]
    if missing:
        raise StreamctlError(
            f"{count_of(len(missing), 'item')} of {len(ids):,} without a {what}, such as "
            + ", ".join(map(repr, missing[:SHOWN])),
            where=file,
            run="add them; the column item_id of the run's data/items.parquet lists all",
        )
    return np.array([place[name] for name in ids], np.int64)
