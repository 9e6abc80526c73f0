"""Files of users answered part by part: here, by torchrun's workers, or on a Ray cluster.

    FOLDER/**/NAME.parquet -> OUT/**/NAME.parquet    a part is a file
    FILE -> OUT                                      joined from OUT.parts/part-0000012.parquet

A part is there whole or not at all, and its metadata say what it was made from. One that is there
already is left alone, so that a job that was stopped goes on, and a part whose worker was killed
is made once more: no row is lost, and none is there twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamctl.distributed import world_size
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import answering, choose_rows
from streamctl.files import atomic_file_each
from streamctl.progress import progress_bar, say
from streamctl.recommender import POPULAR, Recommender
from streamctl.runs import RunDir

PART = 4096  # rows of a part of a file: what a killed job does again at most
POLL_S = 0.5  # how often the first worker looks whether the others are done
RETRIES = 5  # of a part whose Ray worker died
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
        state = source.stat()
        stamp = [str(source), state.st_size, state.st_mtime_ns, first, end]
        return json.dumps([*stamp, self.origin, self.question])

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
    return Recommender(job.run, job.method, device=job.device, beam=50)


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
        UsageError: a value out of its range, or an output inside the source.
        StreamctlError: the run cannot answer, the input cannot be read, or Ray is missing.
    """
    began = time.monotonic()
    holder, name, _ = answering(run, method)
    [row], _ = choose_rows(holder, (name,))
    hashes = {stage: holder.require(stage).hash for stage in ("data", *row.stages)}
    origin = json.dumps([name, hashes], sort_keys=True)
    job = Job(run.path.resolve(), method, device, origin, tuple(sorted(question.items())))
    source, output, folder = source.resolve(), output.resolve(), source.is_dir()
    parts = _parts(job, source, output)
    joined = None if folder else job.made_from(source, 0, parts[-1].end)
    counts = Counter(rows=0, popular=0, problems=0)
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    complete = joined is not None and _made_from(output) == joined
    if not complete:
        mine = [part for part in parts[rank::world] if not _done(part)]
        with progress_bar("recommend", sum(part.end - part.first for part in mine), "users") as bar:
            for found in _on_ray(job, mine) if on_ray else map(job.answer, mine):
                counts.update(found)
                bar.advance(found["rows"])
        complete = all(map(_done, parts))
    if rank == 0 and not complete:
        say("waiting for the other workers")
        while not (complete := all(map(_done, parts))):
            time.sleep(POLL_S)
    if rank == 0 and joined is not None and _made_from(output) != joined:
        _join(parts, output, joined)
    seconds = time.monotonic() - began
    return {
        **counts,
        "answered": counts["rows"] - counts["problems"],
        "seconds": round(seconds, 2),
        "rows_per_s": round(counts["rows"] / seconds, 1),
        "rank": rank,
        "world_size": world,
        "complete": complete,
        "output": str(output),
    }


def _parts(job: Job, source: Path, output: Path) -> list[Part]:
    """What there is to do, in the order of the rows."""
    folder = source.is_dir()
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
    parts = []
    for file in files:
        rows = _open(file).metadata.num_rows
        size = max(1, rows) if folder else PART
        for number, first in enumerate(range(0, max(1, rows), size)):
            target = output / file.relative_to(source)
            if not folder:
                target = output.with_name(f"{output.name}.parts") / f"part-{number:07d}.parquet"
            end = min(first + size, rows)
            parts.append(Part(file, target, first, end, job.made_from(file, first, end)))
    return parts


def _on_ray(job: Job, parts: Sequence[Part]) -> Iterator[Counter[str]]:
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
        gpus = float(job.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
        answer = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(Job.answer)
        waiting = [answer.remote(job, part) for part in parts]
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
    shutil.rmtree(parts[0].output.parent)


def _open(path: Path) -> pq.ParquetFile:
    """A parquet file of users.

    Raises:
        StreamctlError: it is none, or has no column of users.
    """
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
