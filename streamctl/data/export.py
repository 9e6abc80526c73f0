"""A prepared log in other tools' formats: RecBole, LC-Rec and LETTER, or plain tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.runs import RunDir, atomic_file


def export(run: RunDir, folder: Path, format_name: str = "recbole") -> list[Path]:
    """Write the run's log and catalogue as files that `data prepare` and other tools read.

    The log is the filtered one, users by id and each user's items in order of time; a log
    without times gets positions. Files that are there are replaced.

    Args:
        run: a run with a data stage.
        folder: where the files go; made if missing.
        format_name: "recbole", "lcrec" or "table".

    Returns:
        the files written.

    Raises:
        UsageError: an unknown format.
        StreamctlError: no data stage, or an id that the format cannot hold.
    """
    if format_name not in WRITERS:
        raise UsageError(f"unknown format {format_name!r}; {close_matches(format_name, WRITERS)}")
    stage = run.require("data")
    catalog, log = Catalog.load(stage), InteractionLog.load(stage)
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[format_name](folder, catalog, log)


def _recbole(folder: Path, catalog: Catalog, log: InteractionLog) -> list[Path]:
    inter, item = folder / f"{folder.name}.inter", folder / f"{folder.name}.item"
    for name in (*log.user_ids, *catalog.ids):
        if "\t" in name or "\n" in name:
            raise StreamctlError(f"id {name!r} holds a tab or a line end", where=inter)
    with atomic_file(inter) as path, open(path, "w", encoding="utf-8") as handle:
        handle.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, taken, times in _sequences(catalog, log):
            handle.writelines(f"{user}\t{i}\t{t}\n" for i, t in zip(taken, times, strict=True))
    columns = {"title": catalog.titles, **catalog.fields}
    with atomic_file(item) as path, open(path, "w", encoding="utf-8") as handle:
        handle.write("\t".join(["item_id:token", *(f"{c}:token_seq" for c in columns)]) + "\n")
        for row in zip(catalog.ids, *columns.values(), strict=True):
            handle.write("\t".join(row) + "\n")
    return [inter, item]


def _lcrec(folder: Path, catalog: Catalog, log: InteractionLog) -> list[Path]:
    inter, item = folder / f"{folder.name}.inter.json", folder / f"{folder.name}.item.json"
    with atomic_file(inter) as path:
        sequences = {user: taken for user, taken, _ in _sequences(catalog, log)}
        path.write_text(json.dumps(sequences, ensure_ascii=False), encoding="utf-8")
    with atomic_file(item) as path:
        path.write_text(json.dumps(dict(_entries(catalog)), ensure_ascii=False), encoding="utf-8")
    return [inter, item]


def _table(folder: Path, catalog: Catalog, log: InteractionLog) -> list[Path]:
    inter, item = folder / "interactions.csv", folder / "items.jsonl"
    with atomic_file(inter) as path, open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        order = "position" if log.timestamps is None else "timestamp"
        writer.writerow(["user_id", "item_id", order])
        for user, taken, times in _sequences(catalog, log):
            writer.writerows((user, i, t) for i, t in zip(taken, times, strict=True))
    with atomic_file(item) as path, open(path, "w", encoding="utf-8") as handle:
        for name, fields in _entries(catalog):
            handle.write(json.dumps({"item_id": name, **fields}, ensure_ascii=False) + "\n")
    return [inter, item]


def _sequences(
    catalog: Catalog, log: InteractionLog
) -> Iterator[tuple[str, list[str], Iterable[int]]]:
    """(user id, item ids, times or positions) of every user."""
    for user, name in enumerate(log.user_ids):
        start, end = log.offsets[user], log.offsets[user + 1]
        times = range(end - start) if log.timestamps is None else log.timestamps[start:end].tolist()
        yield name, [catalog.ids[item] for item in log.items[start:end].tolist()], times


def _entries(catalog: Catalog) -> Iterator[tuple[str, dict[str, str]]]:
    """(item id, title and other columns) of every item."""
    columns = {"title": catalog.titles, **catalog.fields}
    for name, *values in zip(catalog.ids, *columns.values(), strict=True):
        yield name, dict(zip(columns, values, strict=True))


WRITERS: dict[str, Callable[[Path, Catalog, InteractionLog], list[Path]]] = {
    "recbole": _recbole,
    "lcrec": _lcrec,
    "table": _table,
}
