"""The catalogue: every item's external id, title, text and other columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from streamctl.errors import StreamctlError, close_matches
from streamctl.runs import Stage, StageWriter

_OWN = ("item_id", "title", "text")


@dataclass(frozen=True)
class Catalog:
    """Items by dense index 0..N-1.

    Attributes:
        ids: external id of each item.
        titles: a line to show people.
        texts: what the text encoder reads; title and descriptive columns.
        fields: the source's other columns (brand, category, ...), a list of N texts each.
    """

    ids: list[str]
    titles: list[str]
    texts: list[str]
    fields: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item: index for index, item in enumerate(self.ids)}

    def find(self, item_id: str) -> int | None:
        """Dense index of an external id, or None."""
        return self._index.get(item_id)

    def index(self, item_id: str) -> int:
        """Dense index of an external id.

        Raises:
            StreamctlError: the catalogue has no such item; names ids that are nearly the same.
        """
        found = self.find(item_id)
        if found is None:
            hint = close_matches(item_id, self.ids)
            known = f"; {hint}" if hint.startswith("did") else f" ({len(self)} items)"
            raise StreamctlError(f"item {item_id!r} is not in the catalogue{known}")
        return found

    def save(self, stage: StageWriter) -> None:
        """Write items.parquet: item_id, title, text and the other columns, a row an item."""
        import pyarrow as pa

        columns = {"item_id": self.ids, "title": self.titles, "text": self.texts, **self.fields}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        stage.save_table("items.parquet", table)

    @classmethod
    def load(cls, stage: Stage) -> Catalog:
        """The catalogue of a complete data stage.

        Raises:
            StreamctlError: the artifact is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = stage.file("items.parquet")
        try:
            columns = pq.read_table(path).to_pydict()
            ids, titles, texts = (columns.pop(name) for name in _OWN)
        except (pa.ArrowException, KeyError) as error:
            raise StreamctlError("damaged artifact", where=path, run=stage.again()) from error
        return cls(ids, titles, texts, columns)
