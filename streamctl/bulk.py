"""Files of users, answered or counted part by part: here, by torchrun's workers, or on Ray.

    recommend_files     FOLDER/**/NAME.parquet -> OUT/**/NAME.parquet   a part is a file
                        FILE -> OUT              joined from OUT.parts/part-0000012.parquet
    count_transitions   FOLDER or FILE -> OUT    summed from OUT.parts/

A part is there whole or not at all, and its metadata say what it was made from. One that is there
already is left alone, so that a job that was stopped goes on, and a part whose worker was killed
is made once more: no row is lost, and none is there twice.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streamctl.config import BEAM
from streamctl.data import POPULAR
from streamctl.data.sources.raw import MEMORY, database_errors, sql_text
from streamctl.distributed import is_main, world_size
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import answerer, answering
from streamctl.files import atomic_file_each
from streamctl.progress import progress_bar, say
from streamctl.recommender import Recommender, holds_lists
from streamctl.retrieval.transitions import UNIT, pair_counts
from streamctl.runs import RunDir

PART = 4096  # rows of a part of a file: what a killed job does again at most
POLL_S = 0.5  # how often the first worker looks whether the others are done
RETRIES = 5  # of a part whose Ray worker died
_SUMS = ".streamctl-sums"  # DuckDB's folder while it adds up
_KEY = b"streamctl"  # of what a part was made from, in its metadata


@dataclass(frozen=True)
class Part:
    """Rows `first` to `end` of a file, where their answers go, and what they are made from."""

    source: Path
    output: Path
    first: int
    end: int
    made_from: str


@dataclass(frozen=True)
class Job:
    """Who answers, and what is asked about every user.

    Attributes:
        method: as it was asked for; None for the run's best.
        origin: the method that answers and the hashes of the stages it is read from, as JSON.
        question: keyword arguments of `Recommender.recommend_many`, sorted by name.
    """

    run: Path
    method: str | None
    device: str
    origin: str
    question: tuple[tuple[str, Any], ...]

    def made_from(self, source: Path, first: int, end: int) -> str:
        """Everything that the answers to some rows depend on."""
        return json.dumps([*_stamp(source, first, end), self.origin, self.question])

    def answer(self, part: Part) -> Counter[str]:
        """Write the answers of a part; how many rows there were of each kind."""
        recommender, question = _recommender(self), dict(self.question)
        file = _open(part.source)
        nobody = file.schema_arrow.empty_table().select(_columns(file))
        schema = recommender.recommend_many(nobody, **question).schema
        schema = schema.with_metadata({_KEY: part.made_from})
        counts: Counter[str] = Counter()
        with (
            atomic_file_each(part.output) as path,
            pq.ParquetWriter(path, schema, compression="zstd") as writer,
        ):
            for users in _rows(part):
                answers = recommender.recommend_many(users, **question)
                writer.write_table(answers.cast(schema))
                methods = Counter(answers["method"].to_pylist())
                counts["rows"] += len(answers)
                counts["problems"] += methods[None]
                counts["popular"] += 0 if recommender.method == POPULAR else methods[POPULAR]
        return counts


@lru_cache(maxsize=1)
def _recommender(job: Job) -> Recommender:
    return Recommender(job.run, job.method, device=job.device, beam=BEAM)


def recommend_files(
    run: RunDir, source: Path, output: Path, *, method: str | None = None, device: str = "auto",
    on_ray: bool = False, **question: Any,
) -> dict[str, Any]:  # fmt: skip
    """`Recommender.recommend_many` for the rows of a parquet file, or of all files of a folder.

    Under torchrun every worker calls this and answers its share. A job that was stopped goes on
    when it is called again, with any number of workers; what is complete is left as it is.

    Args:
        source: a parquet file, or a folder of them, with a column `user_id` or `history`.
        output: a parquet file, or a folder, which gets a file for each of the source's.
        on_ray: one task a part, on the Ray cluster that RAY_ADDRESS names or that was started on
            this machine, else on this machine's processors. Every node sees the same paths.
        question: k, think, diversity, keep_seen.

    Returns:
        rows, answered, popular, problems, seconds and rows_per_s of this worker's share; and
        `complete`, if the output is there: the first of several workers waits for the others.

    Raises:
        UsageError: a value out of its range, an output that would replace or is inside the source,
            or a source inside OUT.parts/.
        StreamctlError: the run cannot answer, the input cannot be read, or Ray is missing.
    """
    began = time.monotonic()
    holder, name, _ = answering(run, method)
    row = answerer(holder, name)
    hashes = {stage: holder.stage(stage).hash for stage in row.stages}
    hashes["data"] = holder.require("data").hash
    if question.get("diversity"):  # compares vectors, whatever the method
        place = holder if holder.stage("tokenizer").complete else run
        hashes["vectors"] = place.require("tokenizer").hash
    counted = answering(run, POPULAR)[0].require("data").hash
    origin = json.dumps([name, hashes, counted], sort_keys=True)
    job = Job(run.path.resolve(), method, device, origin, tuple(sorted(question.items())))
    source, output, folder = source.resolve(), output.resolve(), source.is_dir()
    parts = _parts(job.made_from, source, output, output if folder else _beside(output))
    joined = None if folder else job.made_from(source, 0, parts[-1].end)
    counts: Counter[str] = Counter()
    complete = all(map(_done, parts)) if joined is None else _made_from(output) == joined
    if complete:
        say(f"{output}: complete already")
    else:
        counts, complete = _make(job.answer, parts, "recommend", on_ray, gpu=device != "cpu")
    if is_main() and joined is not None and _made_from(output) != joined:
        _join(parts, output, joined)
    seconds = time.monotonic() - began
    return {
        **{name: counts[name] for name in ("rows", "popular", "problems")},
        "answered": counts["rows"] - counts["problems"],
        "seconds": round(seconds, 2),
        "rows_per_s": round(counts["rows"] / seconds, 1),
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": world_size(),
        "complete": complete,
        "output": str(output),
    }


def count_transitions(
    source: Path, output: Path, *, keep: int = 1024, on_ray: bool = False
) -> dict[str, Any]:
    """How often one item followed another in logs of any size: `retrieval.Transitions` as a file.

    Each part is counted by itself, in whole numbers of 1/1024, and DuckDB adds the counts up: the
    sums are those of all users at once. Workers share the parts, and a job that was
    stopped goes on, as in `recommend_files`; a finished output is made anew if `source` or `keep`
    has changed.

    Args:
        source: a parquet file, or a folder of them, with a column `history`: lists of item ids,
            each user's oldest first, and all of a user's in one row.
        output: a parquet file with a row a pair, by item, the most frequent next one first:
            `item` and `next`, texts, `count`, and `total`, the sum of all counts of `item`.
        keep: the most rows of one item; `total` is of all.
        on_ray: one task a part, as in `recommend_files`.

    Returns:
        rows: users counted by this worker now; seconds; and `complete`, if the output is there.

    Raises:
        UsageError: an output that would replace or is inside the source, or a source inside
            OUT.parts/.
        StreamctlError: the input cannot be read or has no lists, or Ray is missing.
    """
    began = time.monotonic()
    source, output = source.resolve(), output.resolve()
    parts = _parts(lambda *rows: json.dumps(_stamp(*rows)), source, output, _beside(output))
    stamps = json.dumps([keep, *(part.made_from for part in parts)])
    summed = hashlib.sha256(stamps.encode()).hexdigest()
    counts, complete = Counter[str](), _made_from(output) == summed
    if not complete:
        counts, complete = _make(_count, parts, "count", on_ray)
    if is_main() and _made_from(output) != summed:
        _sum(parts, output, keep, summed)
    seconds = round(time.monotonic() - began, 2)
    return {"rows": counts["rows"], "seconds": seconds, "complete": complete}


_COUNTS = pa.schema([("item", pa.string()), ("next", pa.string()), ("units", pa.int64())])


def _count(part: Part) -> Counter[str]:
    """Write how often each item followed each other one in a part's histories."""
    if "history" not in _open(part.source).schema_arrow.names:
        raise StreamctlError(
            "has no column history", where=part.source,
            run="write each user's items, oldest first, as a list in a column history",
        )  # fmt: skip
    counts: Counter[str] = Counter()
    with (
        atomic_file_each(part.output) as path,
        pq.ParquetWriter(path, _COUNTS.with_metadata({_KEY: part.made_from})) as writer,
    ):
        for users in _rows(part):
            lists = users["history"].combine_chunks()
            ids, owner = pc.list_flatten(lists), pc.list_parent_indices(lists)
            owner, ids = owner.filter(ids.is_valid()), ids.drop_null().dictionary_encode()
            offsets = np.searchsorted(owner.to_numpy(), np.arange(len(lists) + 1))
            names = ids.dictionary.cast(pa.string())
            for lowest, table in pair_counts(ids.indices.to_numpy(), offsets, len(names)):
                first = np.repeat(np.arange(table.shape[0]) + lowest, np.diff(table.indptr))
                pair = names.take(pa.array(first)), names.take(pa.array(table.indices))
                writer.write_table(pa.table([*pair, pa.array(table.data)], schema=writer.schema))
            counts["rows"] += len(users)
    return counts


def _sum(parts: Sequence[Part], output: Path, keep: int, made_from: str) -> None:
    """One table of the counts of all parts; they are not needed any more then."""
    folder = _beside(output)
    files = ", ".join(sql_text(str(part.output)) for part in parts)
    with database_errors(output), atomic_file_each(output) as path, duckdb.connect() as con:
        con.execute(f"""
            SET memory_limit = '{MEMORY}'; SET temp_directory = {sql_text(str(folder / _SUMS))};
            SET enable_progress_bar = false""")
        table = con.sql(f"""
            WITH pairs AS (SELECT item, next, sum(units)::BIGINT AS units
                           FROM read_parquet([{files}], hive_partitioning = false)
                           GROUP BY item, next)
            SELECT item, next, units / {UNIT} AS count,
                   sum(units) OVER (PARTITION BY item) / {UNIT} AS total
            FROM pairs
            QUALIFY row_number() OVER (PARTITION BY item ORDER BY units DESC, next) <= {keep}
            ORDER BY item, units DESC, next""").to_arrow_reader()
        schema = table.schema.with_metadata({_KEY: made_from})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in table:
                writer.write_batch(batch)
    _clear(parts, folder)


def _make(
    work: Callable[[Part], Counter[str]], parts: Sequence[Part], doing: str, on_ray: bool,
    gpu: bool = False,
) -> tuple[Counter[str], bool]:  # fmt: skip
    """Make this worker's share of the parts that are not there; the first one waits for the others.

    Returns:
        the sum of what `work` counted, and whether all parts are there.
    """
    counts: Counter[str] = Counter()
    rank = int(os.environ.get("RANK", "0"))
    mine = [part for part in parts[rank :: world_size()] if not _done(part)]
    with progress_bar(doing, sum(part.end - part.first for part in mine), "users") as bar:
        for found in _on_ray(work, mine, gpu) if on_ray else map(work, mine):
            counts.update(found)
            bar.advance(found["rows"])
    complete = all(map(_done, parts))
    if rank == 0 and not complete:
        say("waiting for the other workers")
        while not (complete := all(map(_done, parts))):
            time.sleep(POLL_S)
    return counts, complete


def _stamp(source: Path, first: int, end: int) -> list[Any]:
    """Rows of a file, which may change."""
    state = source.stat()
    return [str(source), state.st_size, state.st_mtime_ns, first, end]


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _parts(
    made_from: Callable[[Path, int, int], str], source: Path, output: Path, target: Path
) -> list[Part]:
    """What there is to do, in the order of the rows; `target` is the folder of the parts."""
    folder = source.is_dir()
    if not folder and output.suffix.lower() not in ("", ".parquet", ".pq"):
        raise UsageError(
            f"--output {output.name}: it is written as parquet",
            run=f"--output {output.with_suffix('.parquet').name}",
        )
    files = sorted(source.rglob("*.parquet")) if folder else [source]
    if not files:
        raise StreamctlError(
            "there is no .parquet file in this folder",
            where=source,
            run="--input with a folder of parquet files, or with one such file",
        )
    if folder and output.is_relative_to(source):
        raise UsageError(
            f"--output {output} is inside the input: its files would be read, too",
            run="--output with a folder outside of --input",
        )
    if target != output and source.is_relative_to(target):
        raise UsageError(
            f"the input is in {target}, where the parts of --output {output} are kept and removed",
            run="--output with another name",
        )
    parts = []
    for file in files:
        rows = _open(file).metadata.num_rows
        size = max(1, rows) if folder else PART
        for number, first in enumerate(range(0, max(1, rows), size)):
            name = file.relative_to(source) if folder else f"part-{number:07d}.parquet"
            end = min(first + size, rows)
            parts.append(Part(file, target / name, first, end, made_from(file, first, end)))
    if (target == output) != output.is_dir() and output.exists():
        kind, wanted = ("file", "folder") if target == output else ("folder", "file")
        raise UsageError(
            f"--output {output} is a {kind}, and this makes a {wanted}",
            run="--output with another name",
        )
    read = {file.resolve() for file in files}
    for path in (*([] if target == output else [output]), *(part.output for part in parts)):
        if path.is_file() and path.resolve() not in read and not _made_from(path):
            raise UsageError(
                f"{path} is there already, and not from such a command",
                run="--output with another name",
            )
        if path.resolve() in read:
            raise UsageError(
                f"--output {output} would take the place of the input {path}",
                run="--output with another name",
            )
    return parts


def _on_ray(
    work: Callable[[Part], Counter[str]], parts: Sequence[Part], gpu: bool
) -> Iterator[Counter[str]]:
    """Every part as a task of its own, in whatever order they end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the cluster
    try:
        import ray
    except ImportError as error:
        raise StreamctlError("Ray is not installed", run="pip install 'streamctl[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        gpus = float(gpu and ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(lambda part: work(part))
        waiting = [task.remote(part) for part in parts]
        while waiting:
            [ended], waiting = ray.wait(waiting)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                what = (
                    f"a worker of the Ray cluster died {RETRIES + 1} times over one part ({error})"
                )
                raise StreamctlError(what, run="the same command, which goes on") from error
    finally:
        if ours:
            ray.shutdown()


def _made_from(path: Path) -> str | None:
    """What a finished file was made from; None where there is none."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return metadata.get(_KEY, b"").decode()


def _done(part: Part) -> bool:
    return _made_from(part.output) == part.made_from


def _join(parts: Sequence[Part], output: Path, made_from: str) -> None:
    """One file of all parts in their order; they are not needed any more then."""
    schema = pq.read_schema(parts[0].output).with_metadata({_KEY: made_from})
    with (
        atomic_file_each(output) as path,
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part.output).cast(schema))
    _clear(parts, _beside(output))


def _clear(parts: Sequence[Part], folder: Path) -> None:
    """Remove the parts, what killed workers left of them, and their folders if these are empty."""
    shutil.rmtree(folder / _SUMS, ignore_errors=True)
    emptied = {folder}
    for part in parts:
        path = part.output
        path.unlink(missing_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            left.unlink()
        emptied |= {above for above in path.parents if above.is_relative_to(folder)}
    for path in sorted(emptied, reverse=True):  # what is inside of another first
        with suppress(OSError):  # somebody else's files are in it
            path.rmdir()


def _open(path: Path) -> pq.ParquetFile:
    """A parquet file of users.

    Raises:
        StreamctlError: it is none, or has no column of users.
    """
    if not path.exists():
        raise StreamctlError("no such file", where=path, run="--input with the path of a file")
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise StreamctlError(
            f"cannot be read as parquet ({error})",
            where=path,
            run="write the users as parquet, with a column user_id or history",
        ) from error
    names = file.schema_arrow.names
    if not {"user_id", "history"} & set(names):
        raise StreamctlError(
            f"has no column user_id or history; it has {', '.join(names) or 'none'}",
            where=path,
            run="call the column of users user_id, or that of lists of item ids history",
        )
    if "history" in names and not holds_lists(kind := file.schema_arrow.field("history").type):
        raise StreamctlError(
            f"its column history holds {kind}, not lists of item ids",
            where=path,
            run="write each user's items, oldest first, as a list",
        )
    return file


def _columns(file: pq.ParquetFile) -> list[str]:
    return [name for name in ("user_id", "history") if name in file.schema_arrow.names]


def _rows(part: Part) -> Iterator[pa.Table]:
    """A part's rows, at most PART at a time.

    Raises:
        StreamctlError: damaged pages.
    """
    file, place, changed = _open(part.source), 0, part.source.stat().st_mtime_ns
    for number in range(file.num_row_groups):
        size = file.metadata.row_group(number).num_rows
        first, end = max(part.first - place, 0), min(part.end - place, size)
        place += size
        for start in range(first, end, PART):
            group = _row_group(part.source, changed, number)
            yield group.slice(start, min(PART, end - start))


@lru_cache(maxsize=1)  # parts of one group follow one another
def _row_group(path: Path, changed: int, number: int) -> pa.Table:
    file = _open(path)
    try:
        return file.read_row_group(number, _columns(file))
    except (OSError, pa.ArrowException) as error:
        raise StreamctlError(
            f"cannot be read ({error})", where=path, run="write the file anew: it is damaged"
        ) from error
