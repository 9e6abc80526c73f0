"""Search by title: every word of the query must begin a word of the title."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable

_WORD = re.compile(r"\w+", re.UNICODE)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


class TitleIndex:
    """An inverted index of titles that items can be added to."""

    def __init__(self, titles: Iterable[str]):
        self._titles: list[str] = []
        self._items: dict[str, list[int]] = {}
        self._sorted: list[str] | None = None
        for title in titles:
            self.add(title)

    def add(self, title: str) -> None:
        """The next item's title."""
        number = len(self._titles)
        self._titles.append(title)
        for word in set(words_of(title)):
            if word in self._items:
                self._items[word].append(number)
            else:
                self._items[word] = [number]
                self._sorted = None  # after the word is there, for who sorts them meanwhile

    def find(self, query: str) -> list[int]:
        """Items whose titles have all the words (the last letters may be missing), best first.

        Titles that begin with the query come first, then shorter titles; an empty query finds
        nothing.
        """
        words = words_of(query)
        if not words:
            return []
        found = set.intersection(*(self._beginning_with(word) for word in set(words)))
        text = " ".join(words)

        def order(item: int) -> tuple[bool, int, int]:
            title = self._titles[item]
            return not " ".join(words_of(title)).startswith(text), len(title), item

        return sorted(found, key=order)

    def _beginning_with(self, prefix: str) -> set[int]:
        # Kept in hand: `add` in the model's thread may drop the list meanwhile.
        known = self._sorted
        if known is None:
            known = self._sorted = sorted(self._items)
        low = bisect.bisect_left(known, prefix)
        found: set[int] = set()
        while low < len(known) and known[low].startswith(prefix):
            found.update(self._items[known[low]])
            low += 1
        return found
