"""The live catalogue: the run's items, those added since, and those taken away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from streamctl.data import Catalog
from streamctl.serving.search import TitleIndex


class LiveItems:
    """Items by dense index; the run's come first, added ones follow, removed ones stay as gaps.

    Attributes:
        ids, titles: as in the catalogue, longer by the added items.
        codes: list of the m codes of each item.
        base: how many items the run has.
    """

    def __init__(self, catalog: Catalog, codes: np.ndarray):
        self.base = len(catalog)
        self.ids = list(catalog.ids)
        self.titles = list(catalog.titles)
        self.codes: list[tuple[int, ...]] = [tuple(row) for row in codes.tolist()]
        self._fields = {name: list(column) for name, column in catalog.fields.items()}
        self._index = {item: index for index, item in enumerate(self.ids)}
        self._titles = TitleIndex(self.titles)
        self._values: dict[str, dict[str, list[int]]] = {}
        self.removed: set[int] = set()

    def __len__(self) -> int:
        """Items that can be recommended."""
        return len(self.ids) - len(self.removed)

    @property
    def field_names(self) -> list[str]:
        return list(self._fields)

    def index(self, item_id: str) -> int | None:
        """Dense index of the present item with this id; None if there is none."""
        found = self._index.get(item_id)
        return None if found is None or found in self.removed else found

    def index_ever(self, item_id: str) -> int | None:
        """Like `index`, but a removed item counts: a history may still hold it."""
        return self._index.get(item_id)

    def fields(self, item: int) -> dict[str, str]:
        """The item's other columns that are not empty."""
        return {name: column[item] for name, column in self._fields.items() if column[item]}

    def add(self, item_id: str, title: str, fields: dict[str, str], codes: Sequence[int]) -> int:
        """Seat a new item; its dense index. Fields that the catalogue does not have are dropped."""
        number = len(self.ids)
        self.ids.append(item_id)
        self.titles.append(title)
        self.codes.append(tuple(codes))
        for name, column in self._fields.items():
            value = fields.get(name, "")
            column.append(value)
            if name in self._values and value:
                self._values[name].setdefault(value, []).append(number)
        self._titles.add(title)
        self._index[item_id] = number
        return number

    def remove(self, item: int) -> None:
        """Take an item out of search and recommendation."""
        self.removed.add(item)

    def with_values(self, name: str, values: Iterable[str]) -> np.ndarray:
        """int64: items whose field has one of the values; KeyError for an unknown field."""
        while name not in self._values:
            groups: dict[str, list[int]] = {}
            known = len(self._fields[name])
            for item, value in enumerate(self._fields[name][:known]):
                if value:
                    groups.setdefault(value, []).append(item)
            self._values[name] = groups
            if len(self._fields[name]) != known:  # an item joined meanwhile, and not in here
                del self._values[name]
        found = {item for value in values for item in self._values[name].get(value, ())}
        return np.array(sorted(found), np.int64)

    def search(self, query: str) -> list[int]:
        """Present items by title, best first."""
        return [item for item in self._titles.find(query) if item not in self.removed]

    def first(self, count: int) -> list[int]:
        """Some present items, for a page that has nothing to search for yet."""
        return [item for item in range(len(self.ids)) if item not in self.removed][:count]
