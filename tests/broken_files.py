"""A corpus of broken files: what is broken, and how it is written into an empty folder."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from odd_logs import HEAD, ODD_IDS

GOOD = "".join(f"u{u},i{i},{1000 + 7 * u + i}\n" for u in range(6) for i in range(6))


def _csv(*lines: str | bytes) -> Callable[[Path], None]:
    """A writer of interactions.csv: a good log and these lines after it."""
    tail = b"".join(line.encode() if isinstance(line, str) else line for line in lines)
    return lambda folder: put(folder, "interactions.csv", (HEAD + GOOD).encode() + tail)


def put(folder: Path, name: str, content: bytes | str) -> None:
    """Write a file of a source."""
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)


def _loop(folder: Path) -> None:
    (folder / "interactions.csv").symlink_to("interactions.csv")


def _folder_loop(folder: Path) -> None:
    put(folder, "interactions.csv", HEAD + GOOD)
    (folder / "deeper").symlink_to(folder, target_is_directory=True)


def _denied(folder: Path) -> None:
    put(folder, "interactions.csv", HEAD + GOOD)
    (folder / "interactions.csv").chmod(0)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "interactions.csv")


# What is broken -> how it is written into an empty folder.
CORPUS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "empty file": lambda folder: put(folder, "interactions.csv", b""),
    "empty gz": lambda folder: put(folder, "interactions.csv.gz", b""),
    "empty zst": lambda folder: put(folder, "interactions.csv.zst", b""),
    "gz of nothing": lambda folder: put(folder, "interactions.csv.gz", gzip.compress(b"")),
    "truncated gz": lambda folder: put(
        folder, "interactions.csv.gz", gzip.compress((HEAD + GOOD * 50).encode())[:-40]
    ),
    "gz with rubbish after it": lambda folder: put(
        folder, "interactions.csv.gz", gzip.compress((HEAD + GOOD).encode()) + b"rubbish"
    ),
    "plain text called gz": lambda folder: put(folder, "interactions.csv.gz", HEAD + GOOD),
    "gz called csv": lambda folder: put(
        folder, "interactions.csv", gzip.compress((HEAD + GOOD).encode())
    ),
    "utf-16": lambda folder: put(folder, "interactions.csv", (HEAD + GOOD).encode("utf-16")),
    "utf-32": lambda folder: put(folder, "interactions.csv", (HEAD + GOOD).encode("utf-32")),
    "latin-1": _csv("é,i1,5\n".encode("latin-1")),
    "shift-jis": _csv("日本,i1,5\n".encode("shift-jis")),
    "surrogates in utf-8": _csv(b"\xed\xa0\x80,i1,5\n"),
    "NUL bytes": _csv(b"u\0,i1,5\n", b"\0" * 300, b"\n"),
    "only NUL bytes": lambda folder: put(folder, "interactions.csv", bytes(10_000)),
    "a line of 10 MB": _csv("x" * 10_000_000, ",i1,5\n"),
    "a header of 10 MB": lambda folder: put(folder, "interactions.csv", "a," * 5_000_000),
    "10 MB without a line end": lambda folder: put(folder, "interactions.csv", "x" * 10_000_000),
    "a json line of 10 MB": lambda folder: put(
        folder, "interactions.jsonl", '{"user_id": "' + "x" * 10_000_000 + '"}\n'
    ),
    "json nested too deep": lambda folder: put(folder, "x.inter.json", "[" * 1_000_000),
    "json lines nested too deep": lambda folder: put(folder, "interactions.jsonl", "[" * 100_000),
    "a huge json number": lambda folder: put(
        folder, "interactions.jsonl", '{"user_id": 1, "item_id": ' + "9" * 5000 + "}\n"
    ),
    "an open quote": _csv('"u1,i1,5\n', "u2,i2,6\n" * 2000),
    "a quote inside": _csv('u"1,i"1,5\n'),
    "numbers as strings": _csv('"1","2","3"\n', "'1','2','3'\n"),
    "NaN times": _csv("u1,i1,NaN\n"),
    "times of every kind": _csv("u1,i1,5\n", "u1,i2,2020-01-01\n", "u1,i3,5.5\n"),
    "a time of 1e300": _csv("u1,i1,1e300\n"),
    "a header twice": lambda folder: put(folder, "interactions.csv", HEAD + HEAD + GOOD),
    "a column twice": lambda folder: put(
        folder, "interactions.csv", "user_id,item_id,item_id,timestamp\n1,2,3,4\n"
    ),
    "a header alone": lambda folder: put(folder, "interactions.csv", HEAD),
    "blank lines alone": lambda folder: put(folder, "interactions.csv", "\n" * 1000),
    "a folder called as the file": lambda folder: (folder / "interactions.csv").mkdir(),
    "a link to itself": _loop,
    "a link to nothing": lambda folder: (folder / "interactions.csv").symlink_to("nowhere"),
    "a folder that holds itself": _folder_loop,
    "a named pipe": _fifo,
    "permission denied": _denied,
    "rubbish called parquet": lambda folder: put(folder, "interactions.parquet", b"PAR1" * 99),
    "a parquet of no rows": lambda folder: pq.write_table(
        pa.table({"user_id": pa.array([], pa.string())}), folder / "interactions.parquet"
    ),
    "a parquet of structs": lambda folder: pq.write_table(
        pa.table(
            {"user_id": [{"a": 1}], "item_id": [[1, 2]], "timestamp": [{"b": 2}]}
        ),
        folder / "interactions.parquet",
    ),
    "a parquet with fractions as ids": lambda folder: pq.write_table(
        pa.table({"user_id": [1.5], "item_id": [2.0], "timestamp": [3]}),
        folder / "interactions.parquet",
    ),
    "items that are a list": lambda folder: (
        _csv()(folder), put(folder, "items.jsonl", '["i1"]\n')
    )[0],
    "items of 10 MB in one value": lambda folder: (
        _csv()(folder),
        put(folder, "items.jsonl", json.dumps({"item_id": "i1", "title": "x" * 10_000_000})),
    )[0],
    "every odd id": _csv(*(f'"{odd}",i1,5\n' for odd in ODD_IDS if odd and '"' not in odd)),
}  # fmt: skip
