"""Readers of interaction logs, one a format, and the detection of which one fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from streamctl.data.sources import lcrec, movielens, recbole, sequences, table
from streamctl.data.sources.amazon import AMAZON, AMAZON_2023
from streamctl.data.sources.items import ITEMS_FILE, read_items
from streamctl.data.sources.raw import RawLog, Reading
from streamctl.data.sources.source import Files, Source
from streamctl.data.sources.text import plain_name
from streamctl.errors import StreamctlError, UsageError, close_matches

# In the order of detection: what has the most particular file names comes first.
SOURCES: tuple[Source, ...] = (
    sequences.SOURCE,
    recbole.SOURCE,
    lcrec.SOURCE,
    movielens.SOURCE,
    AMAZON_2023,
    AMAZON,
    table.SOURCE,
)


def read_source(
    path: Path,
    format_name: str = "auto",
    *,
    items: Path | None = None,
    reading: Reading | None = None,
) -> RawLog:
    """A log of any format.

    Args:
        path: a folder or the interactions file.
        format_name: a reader's name, or "auto": the first whose files are there.
        items: the items file, where it is not one that lies beside the interactions.
        reading: how, and where bad lines are told of; by default the first is an error.

    Raises:
        UsageError: an unknown format; names the known ones.
        StreamctlError: no such path, nothing readable there, or what the reader raises.
    """
    source, files = find_source(path, format_name, items)
    reading = reading or Reading()
    raw = source.read(files, reading)
    raw.files = tuple(filter(None, (*(files.parts or (files.interactions,)), files.items)))
    own = items is None or plain_name(items).startswith("meta_")
    if files.items:
        raw.catalogue = (source.items if own else read_items)(files.items, reading)
    return raw


def find_source(
    path: Path, format_name: str = "auto", items: Path | None = None
) -> tuple[Source, Files]:
    """The format and the files of a path; nothing is read yet but first lines.

    Raises:
        UsageError, StreamctlError: as `read_source`.
    """
    names = [source.name for source in SOURCES]
    if format_name not in ("auto", *names):
        raise UsageError(
            f"unknown format {format_name!r}; {close_matches(format_name, ['auto', *names])}"
        )
    if not path.exists():
        raise StreamctlError(
            "no such file or folder",
            where=path,
            run="the path of your log, or `streamctl data fetch NAME` for a public one",
        )
    wanted = [source for source in SOURCES if format_name in ("auto", source.name)]
    for source in wanted:
        files = source.find(path)
        if files is not None:
            return source, _with_items(files, items)
    layouts = "; ".join(f"{source.name}: {source.layout}" for source in wanted)
    found = "" if path.is_file() else ", ".join(sorted(f.name for f in path.iterdir())[:8])
    raise StreamctlError(
        f"nothing here that can be read{f' (found {found})' if found else ''}; "
        f"the layouts are {layouts}",
        where=path,
        run="simplest: a file LOG.csv whose first line is user_id,item_id,timestamp"
        + (" (give the file, not the folder)" if path.is_dir() else ""),
    )


def _with_items(files: Files, items: Path | None) -> Files:
    if items is None:
        return files
    if not items.is_file():
        raise StreamctlError(
            "no such items file", where=items, run="the path of the file that lists the items"
        )
    if any(items.samefile(log) for log in files.parts or (files.interactions,)):
        raise UsageError(
            "this is the log of interactions, given as the items file, too",
            where=items,
            run=ITEMS_FILE,
        )
    return replace(files, items=items)


def parse_columns(named: Sequence[str]) -> dict[str, str]:
    """["user=uid", "item=product"] -> {"user": "uid", "item": "product"}.

    Raises:
        UsageError: another form, or a role that is none of `ROLES`.
    """
    columns = {}
    for part in named:
        role, equals, name = (word.strip() for word in part.partition("="))
        if not equals or not name or role not in table.ROLES:
            raise UsageError(
                "--columns takes user=NAME,item=NAME,time=NAME,rating=NAME,event=NAME, "
                f"not {part!r}",
                run="--columns user=NAME, with the name of that column in the file",
            )
        columns[role] = name
    return columns
