"""A raw log -> the data stage: filtered, ordered, densely numbered, with its statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.clean import clean, find_core, minimums
from streamctl.data.log import InteractionLog
from streamctl.data.order import number
from streamctl.data.sources import find_source, parse_columns, read_source
from streamctl.data.sources.raw import RawLog, Reading, database_errors
from streamctl.data.statistics import describe, warn_about
from streamctl.errors import StreamctlError, UsageError, count_of
from streamctl.files import file_hash
from streamctl.progress import say, warn
from streamctl.runs import RunDir, Stage


def prepare(run: RunDir, config: DataConfig, *, force: bool = False) -> Stage:
    """Read `config.source` and write the data stage.

    Args:
        run: where the stage goes.
        config: source, filters, tie policy and seed.
        force: redo a complete stage.

    Returns:
        the data stage: interactions.parquet, users.parquet, items.parquet, statistics.json.

    Raises:
        StreamctlError: the source cannot be read (file and line), or nothing is left of it.
    """
    items = Path(config.items) if config.items else None

    def read() -> RawLog:
        reading = reading_of(config)
        raw = read_source(Path(config.source), config.format, items=items, reading=reading)
        check_damages(reading, config.skip_bad, raw)
        return raw

    made = run.stage("data")
    before = made.manifest["config"] if made.complete and not force else {}
    if before and any(before.get(key) != getattr(config, key) for key in ("source", "items")):
        # Faults of the files before those of the settings.
        find_source(Path(config.source), config.format, items)
    return write_stage(run, config, read, force=force)


def reading_of(config: DataConfig) -> Reading:
    """How the source is read by a configuration.

    Raises:
        UsageError: `columns` of another form.
    """
    return Reading(
        parse_columns(config.columns or ()),
        rating=config.min_rating is not None,
        event=bool(config.events),
        numbers=config.ids == "number",
        skip_bad=config.skip_bad > 0,
    )


def check_damages(reading: Reading, share: float, raw: RawLog) -> None:
    """Report the lines that were left out.

    Raises:
        StreamctlError: they are more than `share` of a file's.
    """
    raw.damages = {damage.path.name: damage.count for damage in reading.damages}
    for damage in reading.damages:
        line, reason = damage.lines[0]
        if (bad := raw.bad_share(damage)) > share:
            raise StreamctlError(
                f"{count_of(damage.count, 'bad line')} ({bad:.1%}), the first: {reason}",
                where=damage.path,
                line=line,
                run=f"--skip-bad {bad:g} leaves them out; `data doctor` lists them",
            )
        listed = "; ".join(f"line {line}: {reason}" for line, reason in damage.lines)
        more = "; ..." if damage.count > len(damage.lines) else ""
        bad = count_of(damage.count, "bad line")
        warn(f"{damage.path.name}: {bad} left out ({listed}{more})")


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
        run.stage("data").check_sources(run.stage("data").manifest["sources"])
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
    with database_errors():
        read = raw.sizes
        if config.split != "auto":
            if raw.split:
                warn("the source's own parts become one log, which is split anew, as asked")
            raw.split = False
        taken = clean(raw, config)
        leave_one_out = not raw.split if config.split == "auto" else config.split == "leave-one-out"
        removed = find_core(raw, *minimums(raw, config, leave_one_out))
        log, names = number(raw, config)
    catalog, without_text = _catalog(raw, names)
    statistics = describe(raw, read, log, catalog, config)
    statistics |= {"removed": removed, "cleaned": taken, "bad_lines": raw.damages}
    statistics["items_without_text"] = without_text
    return catalog, log, statistics


def _catalog(raw: RawLog, names: list[str]) -> tuple[Catalog, int]:
    """(catalogue in dense order, how many items have no text and so got their id as title)."""
    table = raw.catalogue
    if table is None:
        return Catalog(names, list(names), list(names)), len(names)
    rows = {item: row for row, item in enumerate(table.ids)}
    where = [rows.get(name, -1) for name in names]
    if rows and max(where) < 0:
        warn(
            f"no id of the items file is one of the log's: {table.ids[0]!r} there, {names[0]!r} in "
            "the log. Next: --items with the file of this log, or --columns item=NAME"
        )
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
