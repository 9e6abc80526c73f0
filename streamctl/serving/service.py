"""The running service: the run it answers with, its queue and models, and the changes to them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamctl.errors import StreamctlError, close_matches, count_of
from streamctl.progress import say, warn
from streamctl.runs import RunDir
from streamctl.serving import metrics
from streamctl.serving.batcher import Batcher, Busy, Gone, Late
from streamctl.serving.keys import KeyRing
from streamctl.serving.model import Model
from streamctl.serving.problems import Problem
from streamctl.serving.question import as_job, in_words
from streamctl.serving.schemas import NewItem, Query, Taken
from streamctl.serving.store import Store

RETRY_S = 5.0  # before another try to start a model in a dead one's place
COMPILER = "streamctl.model.warm"


@dataclass(frozen=True)
class Settings:
    """How a server runs: the options of `streamctl serve`, whose help says what they mean."""

    run: Path
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    method: str | None = None
    device: str = "auto"
    store: Path | None = None
    keys: Path | None = None
    open_to_all: bool = False
    origins: Sequence[str] = ()
    max_batch: int = 32
    max_wait_ms: float = 0.0
    queue: int = 128
    deadline_ms: int = 1000
    drain_s: float = 1.0
    threads: int = 1  # of one model: matrices of one request are too small to share


class Served:
    """A run in service: its store, its queue, and the models that take from it."""

    def __init__(self, run: Path, settings: Settings, loaded: Iterable[str] = ()):
        """Open the store; `start` loads the models, with the methods that are to be `loaded`."""
        self.run, self.settings, self.loaded = RunDir(run), settings, set(loaded)
        self.folder = settings.store or settings.run / "serving"
        self.store = Store(self.run, self.folder)  # for the event loop
        self.slow = Store(self.run, self.folder)  # for searches and changes, in threads
        self.batcher = Batcher(
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            capacity=settings.queue,
        )
        self.models: list[Model] = []
        self.about: dict[str, Any] = {}
        self._asking = 0  # changes, and what models are asked beside batches
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Load all models; ready when it returns.

        Raises:
            StreamctlError: the run cannot be served.
        """
        self._tasks = [asyncio.create_task(self._start()) for _ in range(self.settings.workers)]
        try:
            models = await asyncio.gather(*self._tasks)
        except BaseException:
            await self.stop()
            raise
        compiled = all(model.about["compiled"] for model in models)
        self.about = models[0].about | {"compiled": compiled}
        self.loaded = set(self.about["loaded"])
        self._tasks = [asyncio.create_task(self._keep(model)) for model in models]
        metrics.ITEMS.set_function(self.store.count)
        metrics.MODELS.set_function(lambda: len(self.models))
        metrics.QUEUE.set_function(lambda: len(self.batcher))

    async def _start(self) -> Model:
        settings, had = self.settings, set(self.loaded)
        model = await Model.start(
            run=str(self.run.path), store=str(self.folder), method=settings.method,
            device=settings.device, threads=settings.threads, batch=settings.max_batch,
            also=sorted(had),  # what the one before it could answer by
        )  # fmt: skip
        try:
            while late := self.loaded - had:  # what the others have loaded meanwhile
                had.add(method := late.pop())
                with contextlib.suppress(StreamctlError, RuntimeError):  # left to who asks for it
                    await model.ask("load", method=method)
        except BaseException:
            model.kill()
            raise
        self.models.append(model)
        return model

    async def _keep(self, model: Model) -> None:
        """Have a model answer; when it dies, another."""
        while True:
            serving = asyncio.create_task(self.batcher.serve(model.answer))
            try:
                how = await model.died()
            except asyncio.CancelledError:
                serving.cancel()
                raise
            serving.cancel(how)
            self.models.remove(model)
            await asyncio.gather(serving, return_exceptions=True)
            metrics.DEATHS.inc()
            warn(f"a model's process ended ({how}); another takes its place")
            while model not in self.models:
                try:
                    model = await self._start()
                except (StreamctlError, Gone, RuntimeError, OSError) as error:
                    warn(f"no model can take its place: {error}")
                    await asyncio.sleep(RETRY_S)

    async def ask(self, what: str, **details: Any) -> Any:
        """One model's answer to a question that is no recommendation.

        Raises:
            Problem: 503 while there is none.
        """
        with self._counted():
            for model in list(self.models):
                with contextlib.suppress(Gone):
                    return await model.ask(what, **details)
        raise Problem(503, "the model is loading", retry_after=2)

    async def change(self, method: str, *values: Any) -> None:
        """Have the store remove an item, take items or forget a user."""
        with self._counted():
            await asyncio.to_thread(getattr(self.slow, method), *values)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """What `stop` waits for."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1

    async def load(self, method: str) -> None:
        """Have every model load a method, one after another: the others go on answering.

        A batch that a model takes when it begins to load waits until it has.

        Raises:
            Problem: 503, a model has died of it.
        """
        done: set[Model] = set()
        with self._counted():
            while lacking := [model for model in self.models if model not in done]:
                done.add(lacking[0])
                try:
                    await lacking[0].ask("load", method=method)
                except Gone as gone:
                    told = f"a model's process ended ({gone}) while it loaded {method}"
                    raise Problem(503, told, retry_after=5) from None
        self.loaded.add(method)

    async def stop(self) -> None:
        """Answer what waits, then end the models."""
        while self._asking or (self.models and self.batcher.pending):
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.stop() for model in self.models))
        self.store.close()
        self.slow.close()


class Service:
    """What the application calls."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.keys = KeyRing(settings.keys)
        self.draining = False  # answering, but not ready for more
        self.closing = False  # connections end with their next answer
        self.failure: Exception | None = None
        self.failed: Callable[[], None] = lambda: None
        self.url = ""
        self._served: Served | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task] = set()

    @property
    def served(self) -> Served:
        """The run in service.

        Raises:
            Problem: 503 while the first one is loading.
        """
        if self._served is None:
            raise Problem(503, "the model is loading", retry_after=2)
        return self._served

    @property
    def ready(self) -> bool:
        return self._served is not None and bool(self._served.models) and not self.draining

    def start(self) -> None:
        """Begin loading; if that goes wrong `failure` is set and `failed` called."""
        self._later(self._load_first())

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_first(self) -> None:
        try:
            served = await asyncio.to_thread(Served, self.settings.run, self.settings)
            await served.start()
            self._served = served
        except Exception as error:  # raised by whoever started the server
            self.failure = error
            self.failed()
            return
        about = served.about
        run, items = about["model"]["run"], count_of(served.store.count(), "item")
        say(f"ready at {self.url}: {run} ({about['method']}: {about['why']}), {items}")
        if not about["compiled"]:
            await self._compile()

    async def _compile(self) -> None:
        """Compile what the models compute by, then have new models take their place: loading it
        themselves would keep their requests waiting."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", COMPILER, stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which ends it itself
        )  # fmt: skip
        try:
            if await process.wait():
                raise StreamctlError("the compiler failed", run=f"python -m {COMPILER}")
            await self.reload(None)
        except (Problem, StreamctlError) as error:
            say(f"goes on in plain PyTorch, until it is started again: {error}")
        finally:
            if process.returncode is None:
                process.terminate()

    async def stop(self) -> None:
        """Answer what waits, then end."""
        for task in self._tasks:
            task.cancel()
        if self._served is not None:
            await self._served.stop()

    def refusal(self) -> Problem | None:
        """What every request for recommendations is told now, if too many wait.

        Asked before a request is read: a refusal must cost less than the answer it makes room for.
        """
        if self._served is None:
            return None
        deadline = time.monotonic() + self.settings.deadline_ms / 1000
        busy = self._served.batcher.refusal(1, deadline)
        return None if busy is None else _too_many(busy)

    async def recommend(self, queries: Sequence[Query], within: str = "") -> list[dict[str, Any]]:
        """Answers in the order of the queries.

        Args:
            within: pointer to the list that they are in; empty where one is the whole body.

        Raises:
            Refused: a query with a wrong value.
            Problem: 429 for a full queue, 504 for a deadline.
        """
        arrived, served = time.monotonic(), self.served
        jobs = []
        for number, query in enumerate(queries):
            prefix = within and f"{within}/{number}"
            jobs.append(as_job(query, served.store, served.about, prefix))
        for method in {job.group["method"] for job in jobs} - served.loaded:
            await served.load(method)
            arrived = time.monotonic()  # loading is not what a deadline is for
        limit = min(query.deadline_ms or self.settings.deadline_ms for query in queries) / 1000
        try:
            answers = await served.batcher.submit(jobs, arrived + limit)
        except Busy as busy:
            raise _too_many(busy) from None
        except Late:
            raise Problem(504, f"no answer within {limit * 1000:.0f} ms") from None
        took = time.monotonic() - arrived
        found = []
        for timed in answers:
            answer = timed.answer
            metrics.LATENCY.labels(answer["method"], answer["think"]).observe(took)
            timing = {
                "queue_ms": round(timed.queue_s * 1e3, 2),
                "compute_ms": round(timed.compute_s * 1e3, 2),
                "batch": timed.batch,
            }
            found.append({**in_words(answer, served.store), "timing": timing})
        return found

    async def add(self, new: NewItem) -> dict[str, Any]:
        """Add an item; it is on the disk and can be recommended when this returns.

        Raises:
            Refused: the id is taken, or an unknown field.
            Problem: 507 if the disk refuses.
        """
        served, text = self.served, new.text or new.title
        served.store.check_new(new.id, new.fields)
        with _insufficient_storage():
            await served.ask("add", id_=new.id, title=new.title, text=text, fields=new.fields)
        return served.store.item(new.id)

    async def change(self, method: str, *values: Any) -> None:
        """Remove an item, take items or forget a user; it is on the disk when this returns.

        Raises:
            Refused: as the store says.
            Problem: 507 if the disk refuses.
        """
        with _insufficient_storage():
            await self.served.change(method, *values)

    async def take(self, taken: Taken) -> dict[str, Any]:
        """Add what a user took; it counts from the next answer on."""
        await self.change("take", taken.user_id, taken.items)
        return self.served.store.described_user(taken.user_id, self.served.about["history"])

    async def reload(self, name: str | None) -> None:
        """Load a run beside the present one and serve it from the next request on.

        Requests that are waiting are answered by the model that was there when they came.

        Args:
            name: a folder beside the present run's; None reads the present run again.

        Raises:
            Problem: 422 no such run, 409 a run that cannot be served.
        """
        async with self._changing:
            before = self.served
            path = before.run.path
            if name is not None:
                beside = self.settings.run.resolve().parent
                runs = {one.name: one for one in beside.iterdir() if (one / "data").is_dir()}
                if name not in runs:
                    hint = close_matches(name, runs)
                    raise Problem(422, f"no such run; {hint}", errors=[("/run", hint)])
                path = runs[name]
            try:
                asked_for = before.loaded - {before.about["method"]}
                served = await asyncio.to_thread(Served, path, self.settings, asked_for)
                await served.start()
            except StreamctlError as error:
                metrics.RELOADS.labels(outcome="failed").inc()
                raise Problem(409, str(error)) from error
            self._served = served
            self._later(before.stop())
            metrics.RELOADS.labels(outcome="done").inc()
            about = served.about
            say(f"serving {about['model']['run']} ({about['method']}) from now on")


def _too_many(busy: Busy) -> Problem:
    return Problem(429, "too many requests wait already", retry_after=busy.seconds)


@contextlib.contextmanager
def _insufficient_storage() -> Iterator[None]:
    try:
        yield
    except StreamctlError as error:
        raise Problem(507, str(error)) from error
