"""A raw log -> the data stage: filtered, ordered, densely numbered, with its statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.data.sources import read_source
from streamctl.data.sources.raw import RawLog
from streamctl.data.statistics import describe, warn_about
from streamctl.device import derive_seed
from streamctl.errors import StreamctlError, UsageError
from streamctl.progress import say, warn
from streamctl.runs import RunDir, Stage, file_hash

CORE = 5  # the benchmarks' filter for logs with times
LEAVE_ONE_OUT = 3  # history, valid and test: a user with less cannot be evaluated


def prepare(
    run: RunDir,
    config: DataConfig,
    *,
    columns: dict[str, str] | None = None,
    force: bool = False,
) -> Stage:
    """Read `config.source` and write the data stage.

    Args:
        run: where the stage goes.
        config: source, filters, tie policy and seed.
        columns: names of the `user`, `item` and `time` columns where they are not the usual ones.
        force: redo a complete stage.

    Returns:
        the data stage: interactions.parquet, users.parquet, items.parquet, statistics.json.

    Raises:
        StreamctlError: the source cannot be read (file and line), or nothing is left of it.
    """

    def read() -> RawLog:
        return read_source(Path(config.source), config.format, columns)

    return write_stage(run, config, read, force=force)


def write_stage(
    run: RunDir, config: DataConfig, read: Callable[[], RawLog], *, force: bool = False
) -> Stage:
    """Filter, order and number the log that `read` gives and publish it as the data stage.

    A log that cannot be read or used leaves no stage behind.

    Raises:
        StreamctlError: no user is left after filtering, or the stage is complete and its files
            have changed since.
    """
    complete = run.stage("data").complete and not force
    if complete:
        _check_unchanged(run.stage("data"))
    else:
        raw = read()
        catalog, log, statistics = build(raw, config)
    with run.begin("data", config, force=force) as stage:
        if stage is None:
            say("data: complete already")
            return run.stage("data")
        warn_about(statistics)
        log.save(stage)
        catalog.save(stage)
        stage.save_json("statistics.json", statistics)
        stage.publish(sources={str(file.resolve()): file_hash(file) for file in raw.files})
    return run.stage("data")


def _check_unchanged(stage: Stage) -> None:
    """Raise if a file that the stage was made of is there and is another one now."""
    for name, seen in stage.manifest["sources"].items():
        if Path(name).is_file() and file_hash(Path(name)) != seen:
            raise StreamctlError(
                "the file has changed since the data stage was made of it",
                where=name,
                run=f"{stage.run.command('data')} --force",
            )


def build(raw: RawLog, config: DataConfig) -> tuple[Catalog, InteractionLog, dict[str, Any]]:
    """(catalogue, log, statistics) of a raw log, as `prepare` writes them.

    The result depends on the interactions and the seed alone, not on the order in which users
    or items come in the source: users are sorted by id, items by id and then permuted.

    Raises:
        UsageError: a history of no items.
        StreamctlError: no user is left after filtering.
    """
    if config.history < 1:
        raise UsageError(f"data.history is {config.history}; a model needs 1 item or more")
    kept, removed = _filter(raw, config)
    log, names = _number(raw, kept, config)
    catalog, without_text = _catalog(raw, names)
    statistics = describe(raw, log, catalog, config)
    statistics["removed"] = removed
    statistics["items_without_text"] = without_text
    return catalog, log, statistics


def _number(raw: RawLog, kept: np.ndarray, config: DataConfig) -> tuple[InteractionLog, list[str]]:
    """(the kept interactions in order with dense indexes, external id of each item index)."""
    users, user_ids = _rank(raw.users[kept], raw.user_ids)
    items = raw.items[kept]
    times = None if raw.times is None else raw.times[kept]
    names, dense = _number_items(raw, items, config)
    if config.ties == "runs":
        order = _shuffle_runs(users, _rank(items, raw.item_ids)[0], config, raw.timed)
    else:
        order = _order(users, times, config, raw.timed)
    log = InteractionLog(
        items=dense[items[order]],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64),
        user_ids=user_ids,
        timestamps=times[order] if raw.timed else None,
    )
    return log, names


def minimums(raw: RawLog, config: DataConfig) -> tuple[int, int]:
    """(interactions a user needs, interactions an item needs).

    By default a log with times gets the benchmarks' 5-core. One that gives the order only has
    been cut by whoever made it: cutting it again would change the published benchmark (of the
    Amazon 2018 Scientific copy a tenth would be left), so only leave-one-out's need is kept.
    """
    core = CORE if raw.timed else 1
    user = core if config.min_user is None else config.min_user
    item = core if config.min_item is None else config.min_item
    return max(user, LEAVE_ONE_OUT), item


def _filter(raw: RawLog, config: DataConfig) -> tuple[np.ndarray, dict[str, int]]:
    """(bool (T,) interactions kept, what each filter removed), to a fixed point."""
    min_user, min_item = minimums(raw, config)
    kept = np.ones(len(raw.users), bool)
    by_user = by_item = rounds = 0
    while True:
        rounds += 1
        counts = np.bincount(raw.users[kept], minlength=len(raw.user_ids))
        poor = kept & (counts < min_user)[raw.users]
        kept &= ~poor
        by_user += int(poor.sum())
        counts = np.bincount(raw.items[kept], minlength=len(raw.item_ids))
        rare = kept & (counts < min_item)[raw.items]
        kept &= ~rare
        by_item += int(rare.sum())
        if not rare.any():
            break
    removed = {
        "min_user": min_user,
        "min_item": min_item,
        "rounds": rounds,
        "interactions_of_short_users": by_user,
        "interactions_of_rare_items": by_item,
        "users": len(raw.user_ids) - len(_used(raw.users[kept])),
        "items": len(raw.item_ids) - len(_used(raw.items[kept])),
    }
    if not kept.any():
        raise StreamctlError(
            f"no usable interactions are left of {len(kept):,}: users with fewer than {min_user} "
            f"took {by_user:,}, items with fewer than {min_item} took {by_item:,}",
            where=raw.files[0] if raw.files else None,
            run=f"--min-user {LEAVE_ONE_OUT} --min-item 1 (a user needs {LEAVE_ONE_OUT} "
            "interactions: history, valid, test)",
        )
    return kept, removed


def _used(codes: np.ndarray) -> np.ndarray:
    """int64: the codes that occur, ascending."""
    return np.flatnonzero(np.bincount(codes))


def _rank(codes: np.ndarray, names: Any) -> tuple[np.ndarray, list[str]]:
    """Codes -> ranks of their names among those that occur, and these names, sorted."""
    import pyarrow.compute as pc

    used = _used(codes)
    values = names.take(used)
    by_name = pc.sort_indices(values).to_numpy()
    ranks = np.zeros(len(names), np.int32)
    ranks[used[by_name]] = np.arange(len(used))
    return ranks[codes], values.take(by_name).to_pylist()


def _number_items(
    raw: RawLog, items: np.ndarray, config: DataConfig
) -> tuple[list[str], np.ndarray]:
    """(external id of each dense index, int32 dense index of each raw code).

    The catalogue holds the items that occur in the filtered log; `--min-item 0` keeps those of
    the items file that nobody took, too. Numbers are a seeded permutation of the sorted ids, so
    that no model can read order or age from an id.
    """
    used = _used(items)
    names = raw.item_ids.take(used).to_pylist()
    if config.min_item == 0 and raw.catalogue is not None:
        names += sorted(set(raw.catalogue.ids).difference(names))
    by_name = sorted(range(len(names)), key=names.__getitem__)
    rng = np.random.default_rng(derive_seed(config.seed, "items"))
    place = np.empty(len(names), np.int32)
    place[by_name] = rng.permutation(len(names))
    dense = np.full(len(raw.item_ids), -1, np.int32)
    dense[used] = place[: len(used)]
    ordered = [""] * len(names)
    for name, index in zip(names, place.tolist(), strict=True):
        ordered[index] = name
    return ordered, dense


def _order(
    users: np.ndarray, times: np.ndarray | None, config: DataConfig, timed: bool
) -> np.ndarray:
    """int64 (T,): rows by user, time, then input order (or a seeded shuffle of equal times)."""
    if config.ties == "shuffle":
        if not timed:
            warn("--ties shuffle has no effect: the source gives the order only, not times")
        else:
            rng = np.random.default_rng(derive_seed(config.seed, "ties"))
            return np.lexsort((rng.random(len(users)), times, users))
    if times is None:
        return np.argsort(users, kind="stable")
    return np.lexsort((times, users))


def _shuffle_runs(
    users: np.ndarray, ranks: np.ndarray, config: DataConfig, timed: bool
) -> np.ndarray:
    """int64 (T,): rows by user in input order, every run of ascending item ids shuffled.

    Public copies that give the order only have interactions of one time sorted by item id. Which
    runs are ties cannot be told, so this shuffles true order too: figures on it are a lower bound.

    Args:
        ranks: int32 (T,) rank of each row's item id.

    Raises:
        UsageError: the log has times, which say what is tied.
    """
    if timed:
        raise UsageError("--ties runs is for a log without times; this one takes --ties shuffle")
    order = np.argsort(users, kind="stable")
    starts = np.ones(len(order), bool)
    starts[1:] = (np.diff(users[order]) != 0) | (np.diff(ranks[order]) <= 0)
    rng = np.random.default_rng(derive_seed(config.seed, "ties"))
    return order[np.lexsort((rng.random(len(order)), np.cumsum(starts)))]


def _catalog(raw: RawLog, names: list[str]) -> tuple[Catalog, int]:
    """(catalogue in dense order, how many items have no text and so got their id as title)."""
    table = raw.catalogue
    if table is None:
        return Catalog(names, list(names), list(names)), len(names)
    rows = {item: row for row, item in enumerate(table.ids)}
    where = [rows.get(name, -1) for name in names]
    columns = {
        column: [values[row] if row >= 0 else "" for row in where]
        for column, values in table.columns.items()
    }
    parts = [columns[name] for name in table.text]
    texts = [". ".join(filter(None, words)) for words in zip(*parts, strict=True)]
    texts = texts or [""] * len(names)
    titles = columns.pop(table.title) if table.title else [""] * len(names)
    missing = sum(not text for text in texts)
    texts = [text or name for text, name in zip(texts, names, strict=True)]
    titles = [title or name for title, name in zip(titles, names, strict=True)]
    for reserved in ("item_id", "title", "text"):
        if reserved in columns:
            columns[f"{reserved}_"] = columns.pop(reserved)
    return Catalog(names, titles, texts, columns), missing
