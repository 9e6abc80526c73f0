"""The catalogue: every item's external id, title, text and other columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from streamctl.data.sources.items import as_number
from streamctl.errors import StreamctlError, count_of, did_you_mean, same_spelling
from streamctl.runs import Stage, StageWriter

_OWN = ("item_id", "title", "text")
POPULAR = "popularity"  # the method that answers where nothing is known of a user


def id_reader(stage: Stage) -> Callable[[str], str]:
    """How ids that a data stage is asked about are read: as its log's own were (`--ids`)."""
    return as_number if stage.manifest["config"]["ids"] == "number" else str


def stranger_note(user: object = None, users: Iterable[str] = ()) -> str:
    """Why the popular items answer: nothing is known of this user, or the history is empty.

    Args:
        users: those that are known, where their ids may be named.
    """
    if user is None:
        return "popular items: the history is empty"
    near = " or ".join(same_spelling(str(user), users))
    hint = f"; did you mean {near}?" if near else ""
    return f"popular items: nothing is known of user {str(user)!r}{hint}"


@dataclass(frozen=True)
class Catalog:
    """Items by dense index 0..N-1.

    Attributes:
        ids: external id of each item.
        titles: a line to show people.
        texts: what the text encoder reads; title and descriptive columns.
        fields: the source's other columns (brand, category, ...), a list of N texts each.
        read_id: how an id that somebody asks for is read.
    """

    ids: list[str]
    titles: list[str]
    texts: list[str]
    fields: dict[str, list[str]] = field(default_factory=dict)
    read_id: Callable[[str], str] = str

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item: index for index, item in enumerate(self.ids)}

    def find(self, item_id: str) -> int | None:
        """Dense index of an external id, or None."""
        return self._index.get(self.read_id(item_id))

    def index(self, item_id: str, *, near: bool = True) -> int:
        """Dense index of an external id.

        Args:
            near: look for ids that are nearly the same, which takes a large catalogue seconds.

        Raises:
            StreamctlError: the catalogue has no such item; names ids that are nearly the same.
        """
        found = self.find(item_id)
        if found is None:
            hint = did_you_mean(item_id, self.ids) if near else ""
            known = f"; {hint}" if hint else f" ({count_of(len(self), 'item')})"
            raise StreamctlError(
                f"item {item_id!r} is not in the catalogue{known}",
                run="an id of the column item_id in the run's data/items.parquet",
            )
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
        return cls(ids, titles, texts, columns, id_reader(stage))
