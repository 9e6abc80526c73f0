"""The interaction log: who took what, in which order."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamctl.errors import StreamctlError
from streamctl.runs import Stage, StageWriter

RANGE_ROWS = 1 << 22  # interactions of the users that are worked on at once


def ranges(offsets: np.ndarray, rows: int = RANGE_ROWS) -> Iterator[tuple[int, int]]:
    """(first user, last user + 1) of ranges with at most `rows` interactions, or of one user.

    Args:
        offsets: int64 (U + 1,) boundaries of the users.
    """
    first, users = 0, len(offsets) - 1
    while first < users:
        last = int(np.searchsorted(offsets, offsets[first] + rows, side="right")) - 1
        last = min(max(last, first + 1), users)
        yield first, last
        first = last


def forget(column: np.ndarray | None) -> None:
    """Drop the pages of a column that is a map of a file from this process's memory."""
    while column is not None and not isinstance(column, mmap.mmap):
        column = getattr(column, "base", None)
    if column is not None:
        column.flush()
        column.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class InteractionLog:
    """Every user's items, oldest first, in one flat array.

    Attributes:
        items: int32 (T,) dense item index, sorted by user, then by time; like `timestamps` a map
            of a file while a log is prepared.
        offsets: int64 (U + 1,); user u has items[offsets[u]:offsets[u + 1]].
        user_ids: external ids of the U users.
        timestamps: int64 (T,) in the order of the source's times, whole numbers as they are, or
            None where only the order is known.
        weights: float32 (T,) of the kinds of events, or None: all are worth the same.
        cuts: int64 (U, 2) where in `items` each user's validation and test begin, or None: the
            last two interactions, leave-one-out.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: list[str]
    timestamps: np.ndarray | None = None
    weights: np.ndarray | None = None
    cuts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.user_ids) + 1 or self.offsets[-1] != len(self.items):
            raise ValueError(
                f"offsets of {len(self.user_ids)} users over {len(self.items)} interactions need "
                f"{len(self.user_ids) + 1} entries ending in {len(self.items)}"
            )

    def __len__(self) -> int:
        """Interactions."""
        return len(self.items)

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (U,): interactions of each user."""
        return np.diff(self.offsets)

    def of(self, user: int) -> np.ndarray:
        """int32: the items of one user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def save(self, stage: StageWriter) -> None:
        """Write interactions.parquet and users.parquet.

        (user, item[, timestamp][, weight]) a row, and (user_id[, valid, test]) with `cuts`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"item": self.items, "timestamp": self.timestamps, "weight": self.weights}
        columns = {name: values for name, values in columns.items() if values is not None}
        schema = [("user", pa.int32())]
        schema += [(name, pa.from_numpy_dtype(values.dtype)) for name, values in columns.items()]
        with (
            stage.writing("interactions.parquet") as path,
            pq.ParquetWriter(path, pa.schema(schema), compression="zstd") as writer,
        ):
            for first, last in ranges(self.offsets):
                part = slice(self.offsets[first], self.offsets[last])
                users = np.arange(first, last, dtype=np.int32)
                row = {"user": np.repeat(users, self.lengths[first:last])}
                row |= {name: values[part] for name, values in columns.items()}
                writer.write_table(pa.table(row))
                for values in columns.values():
                    forget(values)
        users = {"user_id": pa.array(self.user_ids, pa.string())}
        if self.cuts is not None:
            users |= {"valid": self.cuts[:, 0], "test": self.cuts[:, 1]}
        stage.save_table("users.parquet", pa.table(users))

    @classmethod
    def load(cls, stage: Stage) -> InteractionLog:
        """The log of a complete data stage.

        Raises:
            StreamctlError: an artifact is missing or is not what the manifest says.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = stage.file("interactions.parquet")
        try:
            table = pq.read_table(path)
            users = pq.read_table(stage.file("users.parquet"))
            user_ids = users["user_id"].to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise StreamctlError("damaged artifact", where=path, run=stage.again()) from error
        counts = np.bincount(table["user"].to_numpy(), minlength=len(user_ids))
        return cls(
            items=table["item"].to_numpy().astype(np.int32, copy=False),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            user_ids=user_ids,
            timestamps=table["timestamp"].to_numpy() if "timestamp" in table.column_names else None,
            weights=table["weight"].to_numpy() if "weight" in table.column_names else None,
            cuts=np.stack([users["valid"].to_numpy(), users["test"].to_numpy()], 1)
            if "valid" in users.column_names
            else None,
        )
