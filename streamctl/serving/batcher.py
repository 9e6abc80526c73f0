"""A bounded queue in front of the models: what may run together does, and nothing waits in vain."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamctl.serving.metrics import BATCH, EXPIRED, QUEUE, REJECTED, WAIT

TRIES = 3  # models that may die over a job before it is the job that is at fault
MARGIN = 1.5  # of the expected wait: a batch may take longer than the latest ones did


class Job(Protocol):
    """Something to compute; jobs of one `group` can share a batch."""

    group: Hashable


class Busy(Exception):
    """The queue is full, or so long that the deadline would pass; try again after `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(f"busy for about {seconds:.1f} s")
        self.seconds = seconds


class Late(Exception):
    """The deadline passed before there was an answer."""


class Gone(Exception):
    """A model has died; what it was at can be given to another."""


@dataclass
class Timed:
    """A job's answer and what it took."""

    answer: Any
    queue_s: float
    compute_s: float
    batch: int


@dataclass(eq=False)
class _Waiting:
    job: Job
    deadline: float
    future: asyncio.Future
    since: float = field(default_factory=time.monotonic)
    tries: int = 0


class Batcher:
    """Jobs, oldest first, for one or several models.

    Args:
        max_batch: most jobs in a batch.
        max_wait: seconds that a job may wait for others to share its batch.
        capacity: most jobs waiting; beyond it `submit` raises Busy.
    """

    def __init__(self, *, max_batch: int = 32, max_wait: float = 0.0, capacity: int = 128):
        self.max_batch, self.max_wait, self.capacity = max_batch, max_wait, capacity
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._running = 0  # jobs being computed
        self._models = 0
        self._pace = 0.0  # seconds a job, of the latest batches

    def __len__(self) -> int:
        """Jobs waiting."""
        return len(self._queue)

    @property
    def pending(self) -> int:
        """Jobs waiting or being computed."""
        return len(self._queue) + self._running

    @property
    def wait(self) -> float:
        """Seconds until all that is here now is expected to be done."""
        return self.pending * self._pace / max(1, self._models)

    def refusal(self, jobs: int, deadline: float) -> Busy | None:
        """What so many more jobs with this deadline are told, if they are not let in."""
        late = self._running and time.monotonic() + MARGIN * self.wait > deadline
        if not late and len(self._queue) + jobs <= self.capacity:
            return None
        REJECTED.inc(jobs)
        return Busy(self.wait)

    async def submit(self, jobs: Sequence[Job], deadline: float) -> list[Timed]:
        """The answers to some jobs, all of them admitted or none.

        Args:
            deadline: `time.monotonic()` at which an answer is of no use any more.

        Raises:
            Busy: too many jobs are waiting.
            Late: the deadline passed.
        """
        if (refusal := self.refusal(len(jobs), deadline)) is not None:
            raise refusal
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(job, deadline, loop.create_future()) for job in jobs]
        self._queue.extend(waiting)
        QUEUE.set(len(self._queue))
        self._arrived.set()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return list(await asyncio.gather(*(one.future for one in waiting)))
        except TimeoutError:
            EXPIRED.inc(len(jobs))
            raise Late from None
        finally:
            for one in waiting:
                one.future.cancel()

    async def serve(
        self, compute: Callable[[list[Any]], Awaitable[list[Any]]], died: asyncio.Future
    ) -> None:
        """Have one model compute batches until it dies; other models may do so at the same time.

        Args:
            compute: jobs of one group -> their answers, an exception where one has none.
            died: done, with the reason, once the model is dead.

        Raises:
            Gone: the model died; its batch is at the head of the queue again.
        """
        self._models += 1
        batch: list[_Waiting] = []
        try:
            while True:
                batch = []
                batch = await self._next_unless(died)
                await self._compute(batch, compute)
        except Gone as gone:
            for one in reversed(batch):
                one.tries += 1
                if one.tries < TRIES:
                    self._queue.appendleft(one)
                elif not one.future.done():
                    one.future.set_exception(RuntimeError(f"{TRIES} models died over it: {gone}"))
            self._arrived.set()
            raise
        finally:
            self._models -= 1

    async def _compute(self, batch: list[_Waiting], compute: Callable) -> None:
        started = time.monotonic()
        try:
            answers = await compute([one.job for one in batch])
        except Gone:
            raise
        except Exception as error:  # the jobs' callers get it; the model goes on
            answers = [error] * len(batch)
        finally:
            self._running -= len(batch)
        took = time.monotonic() - started
        pace = took / len(batch)
        self._pace = max(pace, 0.7 * self._pace + 0.3 * pace)  # slow batches count at once
        BATCH.observe(len(batch))
        for one, answer in zip(batch, answers, strict=True):
            if one.future.done():
                continue
            waited = started - one.since
            WAIT.observe(waited)
            if isinstance(answer, Exception):
                one.future.set_exception(answer)
            else:
                one.future.set_result(Timed(answer, waited, took, len(batch)))

    async def _next_unless(self, died: asyncio.Future) -> list[_Waiting]:
        """`_next`, for a model that may die while nobody asks for anything.

        Raises:
            Gone: it did.
        """
        taking = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait((taking, died), return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                return taking.result()
            raise Gone(died.result())
        finally:
            taking.cancel()

    async def _next(self) -> list[_Waiting]:
        """The oldest job that is still wanted, and the next ones of its group."""
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            if batch := self._take():
                self._running += len(batch)  # from now on, so that no job is ever in neither place
                return batch

    async def _gather(self) -> None:
        """Wait for company until the oldest job's bound or a full batch."""
        while self._queue and len(self._queue) < self.max_batch:
            left = self._queue[0].since + self.max_wait - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        now = time.monotonic()
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        while self._queue and len(batch) < self.max_batch:
            one = self._queue.popleft()
            if one.future.done() or one.deadline <= now:
                continue
            same = not batch or one.job.group == batch[0].job.group
            (batch if same else rest).append(one)
        self._queue.extendleft(reversed(rest))
        QUEUE.set(len(self._queue))
        return batch
