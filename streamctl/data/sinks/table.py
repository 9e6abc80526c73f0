"""Tables of any kind: interactions.KIND and items.KIND, in csv, tsv, parquet or jsonl."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import numpy as np

from streamctl.data.log import ranges
from streamctl.data.sinks.sink import Export, Sink, text_file, write_lines
from streamctl.files import atomic_file


def write_csv(path: Path, header: list[str], rows, delimiter: str = ",") -> None:
    """A delimited file with a header; what holds the delimiter or a quote is quoted."""
    with text_file(path) as handle:
        writer = csv.writer(handle, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _header(export: Export) -> list[str]:
    return ["user_id", "item_id", "position" if export.log.timestamps is None else "timestamp"]


def _delimited(export: Export, *, kind: str, delimiter: str) -> list[Path]:
    inter, item = export.path(f"interactions.{kind}"), export.path(f"items.{kind}")
    export.check_ids(inter)
    write_csv(inter, _header(export), export.interactions(), delimiter)
    rows = ([name, *fields.values()] for name, fields in export.items())
    write_csv(item, ["item_id", *export.columns], rows, delimiter)
    return [inter, item]


def _jsonl(export: Export) -> list[Path]:
    inter, item = export.path("interactions.jsonl"), export.path("items.jsonl")
    header = _header(export)
    write_lines(inter, (dict(zip(header, row, strict=True)) for row in export.interactions()))
    write_lines(item, ({"item_id": name, **fields} for name, fields in export.items()))
    return [inter, item]


def _parquet(export: Export) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    inter, item = export.path("interactions.parquet"), export.path("items.parquet")
    log, header = export.log, _header(export)
    users, items = pa.array(log.user_ids, pa.string()), pa.array(export.catalog.ids, pa.string())
    schema = pa.schema(list(zip(header, (pa.string(), pa.string(), pa.int64()), strict=True)))
    with atomic_file(inter) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first, last in ranges(log.offsets):
            part = slice(log.offsets[first], log.offsets[last])
            of_user = np.repeat(np.arange(first, last), log.lengths[first:last])
            times = log.timestamps
            order = np.arange(part.start, part.stop) - log.offsets[of_user]
            columns = [
                users.take(pa.array(of_user)),
                items.take(pa.array(log.items[part])),
                pa.array(order if times is None else times[part], pa.int64()),
            ]
            writer.write_table(pa.table(columns, schema))
    columns = {"item_id": export.catalog.ids, **export.columns}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    with atomic_file(item) as path:
        pq.write_table(table, path, compression="zstd")
    return [inter, item]


SINKS = (
    Sink(
        "table",
        "table",
        "interactions.csv + items.csv",
        partial(_delimited, kind="csv", delimiter=","),
    ),
    Sink(
        "table-tsv",
        "table",
        "interactions.tsv + items.tsv",
        partial(_delimited, kind="tsv", delimiter="\t"),
    ),
    Sink("table-jsonl", "table", "interactions.jsonl + items.jsonl", _jsonl),
    Sink(
        "table-parquet",
        "table",
        "interactions.parquet + items.parquet",
        _parquet,
        compressible=False,
    ),
)
