"""Recommendations for a file of users: streamed, resumed, and shared among torchrun's workers.

    OUT.parts/plan.json            what is computed; parts of another plan are thrown away
    OUT.parts/items.jsonl          the catalogue's changes as they were when the job began
    OUT.parts/part-0000012.parquet a finished part; complete, because it was renamed into place
    OUT                            all parts in the input's order, once the last of them is there

Workers share nothing but this folder: each takes its own stretch of the parts, and whoever
finds all of them finished joins them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamctl.distributed import world_size
from streamctl.errors import StreamctlError
from streamctl.files import atomic_file_each, file_hash
from streamctl.progress import progress_bar, say
from streamctl.runs import RunDir
from streamctl.serving.catalogue import Refused
from streamctl.serving.engine import Engine
from streamctl.serving.job import Job
from streamctl.serving.model import servable
from streamctl.serving.schemas import Query

if TYPE_CHECKING:
    import pyarrow as pa

PART = 4096  # rows of a part: what a killed job does again at most
BATCH = 256  # histories computed together
POLL_S = 0.5  # how often the first worker looks whether the others are done
_KEY = b"streamctl"  # of the plan in the output's metadata


@dataclass(frozen=True)
class Part:
    """Rows [start, start + rows) of one row group of the input."""

    number: int
    group: int
    start: int
    rows: int


class Input:
    """A parquet file of users or histories.

    Args:
        path: has a column `user_id` (users of the log), or `history` (lists of item ids, oldest
            first), which counts where there are both.

    Raises:
        StreamctlError: not a parquet file, or neither column.
    """

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise StreamctlError(f"cannot be read as parquet ({error})", where=path) from error
        schema = self._file.schema_arrow
        self.columns = [name for name in ("user_id", "history") if name in schema.names]
        if not self.columns:
            raise StreamctlError(
                f"has no column user_id or history; it has {', '.join(schema.names) or 'none'}",
                where=path,
            )
        types = {"user_id": pa.string(), "history": pa.list_(pa.string())}
        self.schema = pa.schema([(name, types[name]) for name in self.columns])

    def parts(self) -> list[Part]:
        """All parts, in the order of the rows."""
        found: list[Part] = []
        for group in range(self._file.num_row_groups):
            total = self._file.metadata.row_group(group).num_rows
            for start in range(0, total, PART):
                found.append(Part(len(found), group, start, min(PART, total - start)))
        return found

    def read(self, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
        """The rows of some parts, a part at a time; row groups without any are not read.

        Raises:
            StreamctlError: damaged pages, or a column that does not hold ids.
        """
        import pyarrow as pa

        by_group: dict[int, list[Part]] = {}
        for part in parts:
            by_group.setdefault(part.group, []).append(part)
        try:
            for group, wanted in by_group.items():
                yield from self._read_group(group, wanted)
        except (OSError, pa.ArrowException) as error:
            raise StreamctlError(f"cannot be read ({error})", where=self.path) from error

    def _read_group(self, group: int, wanted: list[Part]) -> Iterator[tuple[Part, pa.Table]]:
        import pyarrow as pa

        batches = self._file.iter_batches(PART, row_groups=[group], columns=self.columns)
        buffer, at = self.schema.empty_table(), 0
        for part in wanted:
            end = part.start + part.rows
            while at + len(buffer) < end:
                rows = pa.Table.from_batches([next(batches)])
                rows = rows.select(self.columns).cast(self.schema)
                buffer = pa.concat_tables([buffer, rows])
                skip = min(len(buffer), max(0, part.start - at))
                buffer, at = buffer.slice(skip), at + skip
            yield part, buffer.slice(part.start - at, part.rows)


def recommend_file(
    run: RunDir, source: Path, output: Path, query: Query, *, device: str = "auto"
) -> dict[str, Any]:
    """Answer every row of a parquet file; the answers stand in the order of the rows.

    Columns of the output: those of the input that were read, `items` (ids, best first), `scores`
    (float32), and `problem`: why a row has no answer, or null.

    Under torchrun every worker calls this and computes its share. A job that was stopped goes on
    with the part it was at when it is called again, with as many workers as there are then; a
    job that is complete is left as it is.

    Args:
        run: a run with a finished model; items added by a server are known.
        query: k, think and the rest of the question; its user is replaced.

    Returns:
        rows, answered, problems, seconds and rows_per_s of this worker; `complete`, if the
        output is there. The first of several workers waits for the others.

    Raises:
        StreamctlError: the run cannot be served, or the input cannot be read.
    """
    began = time.monotonic()
    users = Input(source)
    options = query.model_dump(exclude={"user_id", "history", "explain", "deadline_ms"})
    stage = servable(run)
    plan = {"input": file_hash(source), "model": stage.hash, "part": PART, **options}
    job = Bulk(output, plan, run.path / "serving" / "items.jsonl")
    summary = {"rows": 0, "answered": 0, "problems": 0}
    if job.finished():
        say(f"{output} is complete: the same input, model, catalogue and question")
        return {**summary, "complete": True, "output": str(output)}
    job.open()
    parts = users.parts()
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    mine = parts[rank * len(parts) // world : (rank + 1) * len(parts) // world]
    left = [part for part in mine if not job.path(part).exists()]
    if left:
        engine = Engine(run, journal=job.journal, device=device)
        total = sum(part.rows for part in mine)
        with progress_bar("recommend", total, "users") as bar:
            bar.start_at(total - sum(part.rows for part in left))
            for part, table in users.read(left):
                answers = _answers(engine, table, query, _schema(users))
                job.save(part, answers)
                summary["rows"] += part.rows
                summary["problems"] += part.rows - answers["problem"].null_count
                bar.advance(part.rows)
    summary["answered"] = summary["rows"] - summary["problems"]
    seconds = time.monotonic() - began
    complete = job.join(parts, _schema(users))
    if rank == 0 and not complete:
        say("waiting for the other workers")  # the first one speaks for all: it tells the end
        while not (complete := job.join(parts, _schema(users))):
            time.sleep(POLL_S)
    return {
        **summary,
        "seconds": round(seconds, 2),
        "rows_per_s": round(summary["rows"] / seconds, 1),
        "rank": rank,
        "world_size": world,
        "complete": complete,
        "output": str(output),
    }


class Bulk:
    """One job's folder beside its output.

    Args:
        plan: everything that the answers depend on but the catalogue's changes.
        changes: the journal of these, which may be missing.
    """

    def __init__(self, output: Path, plan: dict[str, Any], changes: Path):
        self.output, self.plan, self.changes = output, plan, changes
        self.folder = output.with_name(output.name + ".parts")
        self.journal = self.folder / "items.jsonl"

    def path(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:07d}.parquet"

    def finished(self) -> bool:
        """Whether the output is there already, made of the present catalogue."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_schema(self.output).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return metadata.get(_KEY) == self._identity(self.changes)

    def open(self) -> None:
        """Make the folder, or find the one of the same job; parts of another job go."""
        with self._lock():
            plan = self.folder / "plan.json"
            if plan.exists() and json.loads(plan.read_text()) == self.plan:
                return
            if self.folder.exists():
                say(f"{self.folder} belongs to another job and is begun anew")
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            with atomic_file_each(self.journal) as path:
                path.write_bytes(self.changes.read_bytes() if self.changes.exists() else b"")
            with atomic_file_each(plan) as path:
                path.write_text(json.dumps(self.plan))

    def save(self, part: Part, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with atomic_file_each(self.path(part)) as path:
            pq.write_table(table, path, compression="zstd")

    def join(self, parts: Sequence[Part], schema: pa.Schema) -> bool:
        """Write the output if every part is there; whether it is written now, by whomever."""
        import pyarrow.parquet as pq

        with self._lock():
            if not self.folder.exists():  # another worker was last
                return True
            if not all(self.path(part).exists() for part in parts):
                return False
            with atomic_file_each(self.output) as path:
                told = schema.with_metadata({_KEY: self._identity(self.journal)})
                with pq.ParquetWriter(path, told, compression="zstd") as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(self.path(part)).cast(told))
            shutil.rmtree(self.folder)
            return True

    def _identity(self, changes: Path) -> bytes:
        """The plan and the catalogue's changes, as the output's metadata tells them."""
        content = changes.read_bytes() if changes.exists() else b""
        catalogue = hashlib.sha256(content).hexdigest()
        return json.dumps({**self.plan, "catalogue": catalogue}, sort_keys=True).encode()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.output.with_name(f".{self.output.name}.lock"), "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _schema(users: Input) -> pa.Schema:
    import pyarrow as pa

    answer = {
        "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "problem": pa.string(),
    }
    return pa.schema([*users.schema, *(pa.field(*column) for column in answer.items())])


def _null(user: dict[str, Any]) -> str | None:
    """Where a row has no value though it needs one; None where all is well."""
    history = user.get("history")
    if history is None:
        return "user_id" if user.get("user_id") is None else None
    return f"history/{history.index(None)}" if None in history else None


def _answers(engine: Engine, table: pa.Table, query: Query, schema: pa.Schema) -> pa.Table:
    """A part with its answers; histories of like length are computed together."""
    import pyarrow as pa

    jobs: dict[int, Job] = {}
    problems: list[str | None] = [None] * len(table)
    for row, user in enumerate(table.to_pylist()):
        if user.get("history") is not None:
            user["user_id"] = None
        if (missing := _null(user)) is not None:
            problems[row] = f"{missing}: is null"
            continue
        try:
            # The limits of a request are there to protect a server; a file's rows have none.
            jobs[row] = engine.prepare(query.model_copy(update={"history": None, **user}))
        except Refused as error:
            problems[row] = f"{error.field.strip('/')}: {error.detail}"
    order = sorted(jobs, key=lambda row: len(jobs[row].history))
    items: list[list[str]] = [[] for _ in problems]
    scores: list[list[float]] = [[] for _ in problems]
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        for row, answer in zip(rows, engine.recommend([jobs[r] for r in rows]), strict=True):
            items[row] = [item["id"] for item in answer["items"]]
            scores[row] = [item["score"] for item in answer["items"]]
    columns = [*table.columns, *map(pa.array, (items, scores, problems), schema.types[-3:])]
    return pa.Table.from_arrays(columns, schema=schema)
