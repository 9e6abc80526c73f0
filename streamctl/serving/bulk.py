"""Recommendations for a file of users: streamed, resumed, and shared among torchrun's workers.

    OUT.parts/plan.json            what is computed; parts of another plan are thrown away
    OUT.parts/live.sqlite          what had changed while serving when the job began
    OUT.parts/part-0000012.parquet a finished part; complete, because it was renamed into place
    OUT                            all parts in the input's order, once the last of them is there

Workers share nothing but this folder: each takes its own parts, and whoever finds all of them
finished joins them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamctl.distributed import world_size
from streamctl.errors import StreamctlError
from streamctl.files import atomic_file_each, file_hash, lock
from streamctl.progress import progress_bar, say
from streamctl.runs import RunDir
from streamctl.serving.question import as_job
from streamctl.serving.schemas import Query
from streamctl.serving.store import LIVE, Refused, Store

if TYPE_CHECKING:
    import pyarrow as pa

    from streamctl.serving.engine import Engine

PART = 4096  # rows of a part: what a killed job does again at most
BATCH = 256  # histories computed together
POLL_S = 0.5  # how often the first worker looks whether the others are done
_KEY = b"streamctl"  # of the plan in the output's metadata


class Input:
    """A parquet file of users or histories.

    Args:
        path: has a column `user_id`, or `history` (lists of item ids, oldest first), which counts
            where there are both.

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
        self.rows = self._file.metadata.num_rows
        self.columns = [name for name in ("user_id", "history") if name in schema.names]
        if not self.columns:
            raise StreamctlError(
                f"has no column user_id or history; it has {', '.join(schema.names) or 'none'}",
                where=path,
            )
        types = {"user_id": pa.string(), "history": pa.list_(pa.string())}
        self.schema = pa.schema([(name, types[name]) for name in self.columns])
        answer = [("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
        texts = [(name, pa.string()) for name in ("method", "note", "problem")]
        self.answers = pa.schema([*self.schema, *(pa.field(*one) for one in (*answer, *texts))])

    def parts(self) -> Iterator[tuple[int, pa.Table]]:
        """The rows, PART at a time, and each part's number.

        Raises:
            StreamctlError: damaged pages, or a column that does not hold ids.
        """
        import pyarrow as pa

        try:
            batches = self._file.iter_batches(PART, columns=self.columns)
            rest, number = None, 0
            for batch in batches:
                table = pa.Table.from_batches([batch]).select(self.columns).cast(self.schema)
                rest = table if rest is None else pa.concat_tables([rest, table])
                while len(rest) >= PART:
                    yield number, rest.slice(0, PART)
                    rest, number = rest.slice(PART), number + 1
            if rest is not None and len(rest):
                yield number, rest
        except (OSError, pa.ArrowException) as error:
            raise StreamctlError(f"cannot be read ({error})", where=self.path) from error


def recommend_file(
    run: RunDir, source: Path, output: Path, query: Query, *, device: str = "auto"
) -> dict[str, Any]:
    """Answer every row of a parquet file; the answers stand in the order of the rows.

    Columns of the output: those of the input that were read, `items` (ids, best first), `scores`
    (float32), `method` that answered, `note` where the popular items stand for an answer, and
    `problem`: why a row has no answer, or null.

    Under torchrun every worker calls this and computes its share. A job that was stopped goes on
    with the part it was at when it is called again, with as many workers as there are then; a
    job that is complete is left as it is.

    Args:
        run: a run with a finished model; what came while it was served is known.
        query: k, think, method and the rest of the question; its user is replaced.

    Returns:
        rows, answered, popular, problems, seconds and rows_per_s of this worker; `complete`, if
        the output is there. The first of several workers waits for the others.

    Raises:
        StreamctlError: the run cannot be served, or the input cannot be read.
    """
    began = time.monotonic()
    users, store = Input(source), Store(run)
    options = query.model_dump(exclude={"user_id", "history", "explain", "deadline_ms"})
    made = [path.parent.relative_to(run.path) for path in run.path.rglob("manifest.json")]
    stages = {str(name): run.stage(str(name)).hash for name in sorted(made)}
    plan = {"input": file_hash(source), "stages": stages, "part": PART, **options}
    job = Bulk(output, plan, store)
    summary = {"rows": 0, "answered": 0, "popular": 0, "problems": 0}
    if job.finished():
        say(f"{output} is complete: the same input, models, changes and question")
        return {**summary, "complete": True, "output": str(output)}
    job.open()
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    count = -(-users.rows // PART)
    mine = range(rank, count, world)
    if not all(job.path(number).exists() for number in mine):
        from streamctl.serving.engine import Engine

        store = Store(run, live=job.folder / LIVE)
        method = None if query.method == "auto" else query.method
        engine = Engine(run, store, method=method, device=device)
        with progress_bar("recommend", users.rows, "users") as bar:
            for number, table in users.parts():
                if number in mine and not job.path(number).exists():
                    answered = _answers(engine, table, query, users.answers)
                    job.save(number, answered)
                    summary["rows"] += len(table)
                    summary["popular"] += len(table) - answered["note"].null_count
                    summary["problems"] += len(table) - answered["problem"].null_count
                bar.advance(len(table))
    summary["answered"] = summary["rows"] - summary["problems"]
    seconds = time.monotonic() - began
    complete = job.join(count, users.answers)
    if rank == 0 and not complete:
        say("waiting for the other workers")  # the first one speaks for all: it tells the end
        while not (complete := job.join(count, users.answers)):
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
        plan: everything that the answers depend on but what changed while serving.
        store: where these changes are.
    """

    def __init__(self, output: Path, plan: dict[str, Any], store: Store):
        self.output, self.store = output, store
        self.plan = {**plan, "changes": store.changes()}
        self.folder = output.with_name(output.name + ".parts")

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}.parquet"

    def finished(self) -> bool:
        """Whether the output is there already, with the present changes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_schema(self.output).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return metadata.get(_KEY) == json.dumps(self.plan, sort_keys=True).encode()

    def open(self) -> None:
        """Make the folder, or find the one of the same job; parts of another job go.

        A job that goes on keeps the changes that it began with.
        """
        with self._lock():
            path = self.folder / "plan.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if {**known, "changes": None} == {**self.plan, "changes": None}:
                self.plan = known
                return
            if self.folder.exists():
                say(f"{self.folder} belongs to another job and is begun anew")
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self.store.copy(self.folder / LIVE)
            with atomic_file_each(path) as part:
                part.write_text(json.dumps(self.plan), encoding="utf-8")

    def save(self, number: int, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with atomic_file_each(self.path(number)) as path:
            pq.write_table(table, path, compression="zstd")

    def join(self, count: int, schema: pa.Schema) -> bool:
        """Write the output if all parts are there; whether it is written now, by whomever."""
        import pyarrow.parquet as pq

        with self._lock():
            if not self.folder.exists():  # another worker was last
                return True
            if not all(self.path(number).exists() for number in range(count)):
                return False
            with atomic_file_each(self.output) as path:
                plan = json.dumps(self.plan, sort_keys=True).encode()
                told = schema.with_metadata({_KEY: plan})
                with pq.ParquetWriter(path, told, compression="zstd") as writer:
                    for number in range(count):
                        writer.write_table(pq.read_table(self.path(number)).cast(told))
            shutil.rmtree(self.folder)
            return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        path = self.output.with_name(f".{self.output.name}.lock")
        with open(path, "w", encoding="utf-8") as file:
            lock(file, wait=True)
            yield


def _missing(user: dict[str, Any]) -> str | None:
    """Where a row has no value though it needs one; None where all is well."""
    history = user.get("history")
    if history is None:
        return "user_id" if user.get("user_id") is None else None
    return f"history/{history.index(None)}" if None in history else None


def _answers(engine: Engine, table: pa.Table, query: Query, schema: pa.Schema) -> pa.Table:
    """A part with its answers; histories of like length are computed together."""
    import pyarrow as pa

    size, about = len(table), engine.about()
    jobs = {}
    found: dict[str, list[Any]] = {
        "items": [[] for _ in range(size)],
        "scores": [[] for _ in range(size)],
        **{name: [None] * size for name in ("method", "note", "problem")},
    }
    for row, user in enumerate(table.to_pylist()):
        if user.get("history") is not None:
            user["user_id"] = None
        if (missing := _missing(user)) is not None:
            found["problem"][row] = f"{missing}: is null"
            continue
        try:
            # The limits of a request are there to protect a server; a file's rows have none.
            question = query.model_copy(update={"history": None, "explain": False, **user})
            jobs[row] = as_job(question, engine.store, about)
        except Refused as error:
            found["problem"][row] = f"{error.field.strip('/')}: {error.detail}"
    order = sorted(jobs, key=lambda row: (jobs[row].group[0], len(jobs[row].details["history"])))
    for start in range(0, len(order), BATCH):
        together = order[start : start + BATCH]
        for group in sorted({jobs[row].group for row in together}, key=str):
            rows = [row for row in together if jobs[row].group == group]
            answers = engine.answer([jobs[row].details for row in rows], *group)
            names = engine.store.names([item for one in answers for item, _ in one["items"]])
            for row, answer in zip(rows, answers, strict=True):
                found["items"][row] = [names[item]["id"] for item, _ in answer["items"]]
                found["scores"][row] = [score for _, score in answer["items"]]
                found["method"][row] = answer["method"]
                found["note"][row] = answer["note"] or jobs[row].note
    columns = [pa.array(found[name], schema.field(name).type) for name in found]
    return pa.Table.from_arrays([*table.columns, *columns], schema=schema)
