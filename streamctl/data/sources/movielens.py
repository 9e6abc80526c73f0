"""MovieLens: 100K (u.data), 1M and 10M (ratings.dat, `::`), 20M and later (ratings.csv)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from streamctl.data.sources.items import delimited_rows, make_table
from streamctl.data.sources.raw import ItemTable, RawLog, Reading
from streamctl.data.sources.source import Files, Source, beside, pick
from streamctl.data.sources.table import read_table
from streamctl.data.sources.text import plain_name

_GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
           "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery",
           "Romance", "Sci-Fi", "Thriller", "War", "Western")  # fmt: skip
_RATINGS = {"ratings.dat": "movies.dat", "u.data": "u.item", "ratings.csv": "movies.csv"}
_COLUMNS = ("user_id", "item_id", "rating", "timestamp")

# The items files without a header, which are in Latin-1.
MOVIE_COLUMNS = {
    "u.item": ("movieId", "title", "date", "video", "url", *_GENRES),
    "movies.dat": ("movieId", "title", "genres"),
}


def _find(path: Path) -> Files | None:
    found = pick(path, *_RATINGS)
    if found is None:
        return None
    return Files(found, beside(path, _RATINGS[plain_name(found)]))


def _read(files: Files, reading: Reading) -> RawLog:
    options = {
        "ratings.dat": {"delimiter": "::", "names": _COLUMNS, "quoted": False},
        "u.data": {"delimiter": "\t", "names": _COLUMNS, "quoted": False},
    }.get(plain_name(files.interactions), {})
    return read_table(files, reading, format_name="movielens", **options)


def _movies(path: Path, reading: Reading) -> ItemTable:
    rows = _movie_rows(path, reading)
    return make_table(rows, path, reading, id_column="movieId", text=("title", "genres"))


def _movie_rows(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, str]]]:
    kind = plain_name(path)
    names = MOVIE_COLUMNS.get(kind, ())
    old = {"names": names, "encoding": "latin-1", "quoted": False}
    if kind == "u.item":
        for line, row in delimited_rows(path, reading, "|", **old):
            genres = ", ".join(genre for genre in _GENRES if row[genre] == "1")
            yield line, {"movieId": row["movieId"], "title": row["title"], "genres": genres}
        return
    if kind == "movies.dat":
        rows = delimited_rows(path, reading, "::", **old)
    else:
        rows = delimited_rows(path, reading, ",")
    for line, row in rows:
        yield line, {**row, "genres": row.get("genres", "").replace("|", ", ")}


SOURCE = Source(
    "movielens",
    "ratings.dat + movies.dat, ratings.csv + movies.csv, or u.data + u.item",
    _find,
    _read,
    _movies,
)
