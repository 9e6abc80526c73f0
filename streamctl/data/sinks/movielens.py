"""MovieLens: ratings.dat and movies.dat (`::`, as 1M and 10M), or ratings.csv and movies.csv.

Every rating is `RATING`. Of the catalogue these files hold titles and genres.
"""

from __future__ import annotations

from pathlib import Path

from streamctl.data.sinks.sink import RATING, Export, Sink, cannot_hold, text_file
from streamctl.data.sinks.table import write_csv


def _movies(export: Export):
    """(item id, title, genres as MovieLens writes them) of every item."""
    for name, fields in export.items():
        yield name, fields["title"], fields.get("genres", "").replace(", ", "|")


def _dat(export: Export) -> list[Path]:
    """Movies are in Latin-1, as the originals."""
    inter, item = export.path("ratings.dat"), export.path("movies.dat")
    export.check_ids(inter, ":", ascii_only=True)
    movies = []
    for row in _movies(export):
        movies.append(line := "::".join(row))
        if line.split("::") != list(row):
            raise cannot_hold(f"{line!r} ('::' parts its columns)", item)
        if any(ord(character) > 255 for character in line):
            raise cannot_hold(f"{line!r} (it is in Latin-1)", item)
    with text_file(inter) as handle:
        handle.writelines(f"{u}::{i}::{RATING}::{time}\n" for u, i, time in export.interactions())
    with text_file(item, "latin-1") as handle:
        handle.writelines(f"{line}\n" for line in movies)
    return [inter, item]


def _csv(export: Export) -> list[Path]:
    inter, item = export.path("ratings.csv"), export.path("movies.csv")
    export.check_ids(inter)
    rows = ((user, name, RATING, time) for user, name, time in export.interactions())
    write_csv(inter, ["userId", "movieId", "rating", "timestamp"], rows)
    write_csv(item, ["movieId", "title", "genres"], _movies(export))
    return [inter, item]


SINKS = (
    Sink("movielens", "movielens", "ratings.dat + movies.dat", _dat, columns=("genres",)),
    Sink("movielens-csv", "movielens", "ratings.csv + movies.csv", _csv, columns=("genres",)),
)
