"""Tables in memory (pandas, polars, Arrow, DuckDB ...) as a log's source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamctl.config import DataConfig, resolve
from streamctl.data.prepare import prepare
from streamctl.data.sources.table import ROLES
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.files import atomic_file
from streamctl.runs import RunDir, Stage

if TYPE_CHECKING:
    import pyarrow as pa

SOURCE = "source"  # folder of a run where the tables are kept, as files that commands read, too
_FILES = {"source": "interactions", "items": "items"}


def prepare_tables(
    run: RunDir,
    interactions: Any,
    items: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    force: bool = False,
    **settings: Any,
) -> Stage:
    """`prepare` of tables, or of paths.

    Args:
        interactions, items: anything with `__arrow_c_stream__`, or a path.
        columns, force: as `prepare` takes them.
        settings: of `DataConfig`.

    Raises:
        UsageError: no table, or an unknown setting.
        StreamctlError: as `prepare`, in the words of this call.
    """
    for name in columns or {}:
        if name not in ROLES:
            raise UsageError(f"columns: unknown {name!r}; {close_matches(name, ROLES)}")
    if {"source", "items"} & set(settings):
        raise UsageError("interactions and items are the first two arguments")
    if columns:
        settings["columns"] = [f"{role}={name}" for role, name in columns.items()]
    resolve(DataConfig, **settings)  # a typing mistake costs no work
    with _said_here(run):
        for role, table in (("source", interactions), ("items", items)):
            file = run.path / SOURCE / f"{_FILES[role]}.parquet"
            if isinstance(table, str | Path):
                settings[role] = str(table)
            elif table is not None:
                keep(table, file, _FILES[role])
                settings[role] = str(file)
            elif role == "items" and not isinstance(interactions, str | Path):
                file.unlink(missing_ok=True)  # of an earlier call
        return prepare(run, resolve(DataConfig, **settings), force=force)


def read_table(table: Any, name: str) -> pa.RecordBatchReader:
    """The rows of a table, whoever made it; texts and categories as plain texts.

    Args:
        name: what it is, for messages.

    Raises:
        UsageError: it has no `__arrow_c_stream__`, or its values have no Arrow type.
    """
    import pyarrow as pa

    if not hasattr(table, "__arrow_c_stream__"):
        kind = type(table).__name__
        raise UsageError(
            f"{name}: not a table but a {kind}; give a pandas, polars or Arrow table",
            run="a data frame with a column user_id or history"
            if name == "users"
            else "a data frame, or the path of a file",
        )
    try:
        reader = pa.RecordBatchReader.from_stream(table)
    except (pa.ArrowException, TypeError) as error:
        told = " ".join(str(part) for part in error.args)
        raise UsageError(f"{name}: not a table that Arrow can read: {told}") from error
    # A row number that pandas was given for want of another column is none.
    names = [field for field in reader.schema.names if not field.startswith("__index_level_")]
    if not names:
        raise UsageError(
            f"{name}: a table without columns",
            run="columns user_id, item_id and timestamp; for items item_id and title",
        )
    schema = pa.schema([(name, _plain_type(reader.schema.field(name).type)) for name in names])
    batches = (
        pa.record_batch([_plain(batch[field.name], field.type) for field in schema], schema)
        for batch in reader
    )
    return pa.RecordBatchReader.from_batches(schema, batches)


def keep(table: Any, file: Path, name: str) -> None:
    """Write a table as parquet, a batch at a time."""
    import pyarrow.parquet as pq

    reader = read_table(table, name)
    with atomic_file(file) as path, pq.ParquetWriter(path, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    return pa.large_string() if pa.types.is_string_view(kind) else kind


def _plain(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if hasattr(column, "dictionary"):
        return column.dictionary.cast(kind).take(column.indices)
    return column.cast(kind)


@contextmanager
def _said_here(run: RunDir) -> Iterator[None]:
    """Rewrite errors about files and command-line options as errors of a call in Python."""
    try:
        yield
    except StreamctlError as error:
        where, hint = error.where or "", error.run or ""
        for name in _FILES.values():
            file = str(run.path / SOURCE / f"{name}.parquet")
            where = re.sub(rf"^{re.escape(file)}:(\d+)$", rf"{name}, row \1", where)
            where = name if where == file else where
        named = re.search(r"--columns (\w+=\w+(?:,\w+=\w+)*)", hint)
        if named:
            pairs = (pair.split("=") for pair in named[1].split(","))
            told = ", ".join(f'"{role}": "{column}"' for role, column in pairs)
            hint = hint.replace(named[0], f"columns={{{told}}}")
        if hint.endswith("--force") or "--force " in hint:
            hint = "force=True (keeps the old stage as data.previous)"
        hint = re.sub(r"--([a-z-]+) ([\w.%,]+)", lambda m: f"{m[1].replace('-', '_')}={m[2]}", hint)
        what = (
            error.what.replace("the file", "the table") if where in _FILES.values() else error.what
        )
        raise type(error)(what, where=where or None, run=hint or None) from error
