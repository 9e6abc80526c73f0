"""A bounded queue that batches requests for the models and refuses those that would be late."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamctl.serving.metrics import BATCH, EXPIRED, REJECTED, WAIT

TRIES = 3  # models that may die over a job before it is the job that is at fault
MARGIN = 1.5  # of the expected wait: a batch may take longer than the latest ones did


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
    job: Any
    deadline: float
    future: asyncio.Future
    since: float = field(default_factory=time.monotonic)
    tries: int = 0


class Batcher:
    """Jobs, oldest first, for one or several models; those of one `group` may share a batch.

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
        self._pace = 0.0  # seconds a job, mean of the latest batches

    def __len__(self) -> int:
        """Jobs waiting."""
        return len(self._queue)

    @property
    def pending(self) -> int:
        """Jobs waiting or being computed."""
        return len(self._queue) + self._running

    def refusal(self, jobs: int, deadline: float) -> Busy | None:
        """What so many more jobs with this deadline are told, if they are not let in."""
        wait = self.pending * self._pace / max(1, self._models)
        late = self._running and time.monotonic() + MARGIN * wait > deadline
        if not late and len(self._queue) + jobs <= self.capacity:
            return None
        REJECTED.inc(jobs)
        return Busy(wait)

    async def submit(self, jobs: Sequence[Any], deadline: float) -> list[Timed]:
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

    async def serve(self, compute: Callable[[list[Any]], Awaitable[list[Any]]]) -> None:
        """Have one model compute batches until it dies; other models may do so at the same time.

        Where it dies, or this is cancelled, its batch is at the head of the queue again.

        Args:
            compute: jobs of one group -> their answers, an exception where one has none.

        Raises:
            Gone: the model died.
        """
        self._models += 1
        batch: list[_Waiting] = []
        try:
            while True:
                batch = await self._next()
                await self._compute(batch, compute)
                batch = []
        except (Gone, asyncio.CancelledError) as ended:
            for one in reversed(batch):
                one.tries += 1
                if one.tries < TRIES:
                    self._queue.appendleft(one)
                elif not one.future.done():
                    one.future.set_exception(RuntimeError(f"{TRIES} models died over it: {ended}"))
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
        self._pace += (0.3 if self._pace else 1.0) * (pace - self._pace)
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

    async def _next(self) -> list[_Waiting]:
        """The oldest job that is still wanted, and the next ones of its group.

        A batch that is not full waits for company until its oldest job's bound.
        """
        while True:
            self._arrived.clear()
            oldest = self._queue[0].since if self._queue else float("inf")
            left = oldest + self.max_wait - time.monotonic()
            if len(self._queue) < self.max_batch and left > 0:
                with contextlib.suppress(TimeoutError):  # wait_for may swallow a cancellation
                    async with asyncio.timeout(left if self._queue else None):
                        await self._arrived.wait()
            elif batch := self._take():
                self._running += len(batch)  # from now on, so that no job is ever in neither place
                return batch

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
        return batch
