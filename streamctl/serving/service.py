"""The running service: the engine of the present run, its queue, and the changes to both."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from uvicorn.config import STARTUP_FAILURE

from streamctl.errors import StreamctlError, close_matches
from streamctl.progress import say, warn
from streamctl.runs import RunDir
from streamctl.serving import metrics
from streamctl.serving.batcher import Batcher, Busy, Late, Timed
from streamctl.serving.catalogue import announced_run
from streamctl.serving.engine import Engine
from streamctl.serving.job import Job
from streamctl.serving.keys import KeyRing
from streamctl.serving.model import best_stage
from streamctl.serving.problems import Problem
from streamctl.serving.schemas import NewItem, Query, Taken

REFUSAL_S = 0.2  # before a 429: who asks again at once must not take the time of those who wait
POLL_S = 0.5  # how often an idle worker looks for what the others wrote


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Attributes:
        run: the run's folder.
        items: the journal of changes to items and users; by default inside the run's folder.
        keys: the key file.
        open_to_all: answer without keys on an address that others can reach.
        max_batch, max_wait_ms, queue: the batcher's bounds.
        deadline_ms: for requests that name none.
        drain_s: seconds that a stopping server goes on answering, marked as not ready.
        server: a name that the workers of one server share, and no other server has.
        loaded: where there are several workers, set as soon as one of them has a model.
        threads: CPU threads of one worker's model. Matrices of one request are too small to share.
    """

    run: Path
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str = "auto"
    items: Path | None = None
    keys: Path | None = None
    open_to_all: bool = False
    beam: int = 20
    max_batch: int = 32
    max_wait_ms: float = 0.0
    queue: int = 128
    deadline_ms: int = 1000
    drain_s: float = 1.0
    threads: int = 1
    server: str = ""
    loaded: Event | None = None

    @property
    def journal(self) -> Path:
        return self.items or self.run / "serving" / "items.jsonl"


class Service:
    """One worker's state. All changes to the engine happen in the batcher's thread."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.keys = KeyRing(settings.keys)
        self.draining = False
        self.failed: Callable[[], None] = self._end_worker
        self.failure: Exception | None = None
        self._engine: Engine | None = None
        self._batcher: Batcher | None = None
        self._tasks: list[asyncio.Task] = []
        self._changing = asyncio.Lock()

    @property
    def engine(self) -> Engine:
        """The engine in service.

        Raises:
            Problem: 503 while the first one is loading.
        """
        if self._engine is None:
            raise Problem(503, "the model is loading", retry_after=2)
        return self._engine

    @property
    def ready(self) -> bool:
        return self._engine is not None and not self.draining

    def start(self) -> None:
        """Begin loading; if that goes wrong `failure` is set and `failed` called."""
        import torch

        settings = self.settings
        self._batcher = Batcher(
            lambda jobs: jobs[0].engine.recommend(jobs),
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            capacity=settings.queue,
            # OpenMP keeps the number for each thread; the model's own is the one that counts.
            prepare=lambda: torch.set_num_threads(settings.threads),
        )
        self._tasks = [
            asyncio.create_task(self._load_first()),
            asyncio.create_task(self._watch()),
        ]

    def _end_worker(self) -> None:
        """Of several workers: say why, and end so that the parent starts another one.

        If none has had a model yet the parent stops: the next would most likely fail as well. An
        application without such a parent is stopped by the signal that stops a server.
        """
        loaded = self.settings.loaded
        if loaded is None:
            signal.raise_signal(signal.SIGTERM)
            return
        error = self.failure
        said = str(error) if isinstance(error, StreamctlError) else repr(error)
        warn(f"a worker cannot load its model: {said}")
        os._exit(1 if loaded.is_set() else STARTUP_FAILURE)

    async def stop(self) -> None:
        """Answer what waits, then end."""
        await self._batcher.drain()
        for task in self._tasks:
            task.cancel()

    async def recommend(self, queries: Sequence[Query], arrived: float) -> list[tuple[Job, Timed]]:
        """Answers in the order of the queries, each with the job that it was made from.

        Raises:
            Refused: a query with a wrong value.
            Problem: 429 for a full queue, 504 for a deadline.
        """
        engine = self.engine
        jobs = []
        for number, query in enumerate(queries):
            prefix = f"/requests/{number}" if len(queries) > 1 else ""
            jobs.append(engine.prepare(query, prefix))
        limit = min(query.deadline_ms or self.settings.deadline_ms for query in queries) / 1000
        try:
            answers = await self._batcher.submit(jobs, arrived + limit)
        except Busy as error:
            raise await self._refusal(error) from None
        except Late:
            raise Problem(504, f"no answer within {limit * 1000:.0f} ms") from None
        for job in jobs:
            metrics.LATENCY.labels(job.think).observe(time.monotonic() - arrived)
        return list(zip(jobs, answers, strict=True))

    async def overloaded(self) -> Problem | None:
        """The refusal that every request for recommendations gets now, if so many wait.

        Asked before a request is read: refusals must cost less than the answers they make room for.
        """
        deadline = time.monotonic() + self.settings.deadline_ms / 1000
        if self._batcher is None or not self._batcher.crowded(deadline):
            return None
        return await self._refusal(self._batcher.refuse())

    @staticmethod
    async def _refusal(error: Busy) -> Problem:
        await asyncio.sleep(REFUSAL_S)
        return Problem(429, "too many requests wait already", retry_after=error.seconds)

    async def add(self, new: NewItem) -> dict[str, Any]:
        """Add an item; it is on the disk and can be recommended when this returns.

        Raises:
            Refused: the id is taken, or an unknown field.
            Problem: 507 if the disk refuses.
        """
        async with self._changing:
            engine = self.engine
            engine.catalogue.check_new(new)
            codes = await asyncio.to_thread(engine.catalogue.tokenize, [new.text or new.title])
            return await self._changed(lambda: engine.catalogue.add(new, codes[0]))

    async def remove(self, item_id: str) -> None:
        """Take an item out; it is not recommended any more when this returns.

        Raises:
            Refused: an unknown id.
            Problem: 507 if the disk refuses.
        """
        async with self._changing:
            engine = self.engine
            await self._changed(lambda: engine.catalogue.remove(item_id))

    async def take(self, taken: Taken) -> dict[str, Any]:
        """Add what a user took; it is on the disk and counts in this worker when this returns.

        Raises:
            Refused: an unknown item.
            Problem: 507 if the disk refuses.
        """
        async with self._changing:
            engine = self.engine
            await self._changed(lambda: engine.catalogue.take(taken.user_id, taken.items))
            return engine.user(taken.user_id)

    async def reload(self, name: str | None) -> None:
        """Load a run beside the present one and serve it from the next batch on.

        Requests that are waiting are answered by the model that was there when they came.

        Args:
            name: the folder's name as `siblings` lists it; None reads the present run again.

        Raises:
            Problem: 422 no such run, 409 a run that cannot be served.
        """
        async with self._changing:
            engine = self.engine
            runs = self.siblings()
            if name is not None and name not in runs:
                hint = close_matches(name, runs)
                raise Problem(422, f"no such run; {hint}", errors=[("/run", hint)])
            path = engine.run.path if name is None else runs[name]
            await self._swap(path)
            if self.settings.workers > 1:
                own = self.settings.server, os.getpid()
                await self._changed(lambda: self._engine.catalogue.announce(path.name, *own))

    def siblings(self) -> dict[str, Path]:
        """Runs that can be served, by name: folders beside the run with a finished model."""
        parent = self.settings.run.resolve().parent
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
        return {path.name: path for path in folders if best_stage(RunDir(path)) is not None}

    async def _changed(self, change: Callable[[], Any]) -> Any:
        try:
            result = await self._batcher.call(change)
        except OSError as error:
            raise Problem(507, f"the change cannot be stored: {error.strerror}") from error
        except StreamctlError as error:
            raise Problem(507, "the change cannot be stored: the journal is damaged") from error
        metrics.ITEMS.set(len(self.engine.catalogue.items))
        return result

    async def _swap(self, path: Path) -> None:
        try:
            engine, costs = await asyncio.to_thread(self._load, path)
        except StreamctlError as error:
            metrics.RELOADS.labels(outcome="failed").inc()
            raise Problem(409, str(error)) from error
        self._take_over(engine, costs)
        metrics.RELOADS.labels(outcome="done").inc()
        say(f"serving {engine.name} ({engine.stage.name}) from now on")

    def _take_over(self, engine: Engine, costs: dict[Hashable, float]) -> None:
        self._engine = engine
        for kind, seconds in costs.items():
            self._batcher.expect(kind, seconds)
        metrics.ITEMS.set(len(engine.catalogue.items))

    def _load(self, path: Path) -> tuple[Engine, dict[Hashable, float]]:
        """An engine that is ready, and what its jobs take."""
        engine = Engine(
            RunDir(path),
            journal=self.settings.journal,
            device=self.settings.device,
            beam=self.settings.beam,
        )
        return engine, engine.warm_up(self.settings.max_batch)

    async def _load_first(self) -> None:
        import torch

        settings = self.settings
        torch.set_num_threads(settings.threads)
        try:
            # A worker that takes the place of one that died serves what its siblings serve.
            name = announced_run(settings.journal, settings.server)
            while True:
                path = self.siblings().get(name, settings.run)
                engine, costs = await asyncio.to_thread(self._load, path)
                served, name = name, engine.catalogue.take_announced(settings.server, os.getpid())
                if name in (None, served):
                    break
            self._take_over(engine, costs)
            if settings.loaded is not None:
                settings.loaded.set()
        except Exception as error:  # reported by whoever started the server
            self.failure = error
            self.failed()
            return
        say(f"ready: {engine.name} ({engine.stage.name}), {len(engine.catalogue.items):,} items")

    async def _watch(self) -> None:
        """Follow what other workers write: items, and the run to serve."""
        told = None
        while True:
            await asyncio.sleep(POLL_S)
            if self.keys.problem is not None:
                warn(str(self.keys.problem))
                self.keys.problem = None
            if self._engine is None or self._changing.locked():
                continue
            catalogue = self._engine.catalogue
            await self._batcher.call(catalogue.follow)
            if catalogue.problem is not None and str(catalogue.problem) != told:
                told = str(catalogue.problem)
                warn(f"the items' journal cannot be followed: {told}")
            name = catalogue.take_announced(self.settings.server, os.getpid())
            if name in self.siblings():
                try:
                    async with self._changing:
                        await self._swap(self.siblings()[name])
                except Problem as error:
                    warn(f"the run that another worker serves cannot be loaded: {error}")
