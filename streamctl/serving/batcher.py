"""Dynamic batching: requests that may run together do, none waits longer than its bound."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamctl.serving.metrics import BATCH, EXPIRED, QUEUE, REJECTED, WAIT

MARGIN = 3.0  # of the expected wait: a batch that is under way, and batches that take longer
FADING = 0.5  # weight of all batches before against the newest, in the mean cost of a job


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


class Batcher:
    """One worker thread that computes batches of jobs, oldest first.

    Args:
        compute: list of jobs of one group -> list of answers, run in the worker thread.
        max_batch: most jobs in a batch.
        max_wait: seconds a job may wait for others to share its batch.
        capacity: most jobs waiting; beyond it `submit` raises Busy.
        prepare: called once in the worker thread, before everything else.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], list[Any]],
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
        capacity: int = 256,
        prepare: Callable[[], Any] = lambda: None,
    ):
        self.compute, self.max_batch, self.max_wait = compute, max_batch, max_wait
        self.capacity = capacity
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model", initializer=prepare)
        self._arrived = asyncio.Event()
        self._busy_until = 0.0
        self._spent, self._done = 0.0, 0.0  # seconds and jobs of the latest batches, fading
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def __len__(self) -> int:
        """Jobs waiting."""
        return len(self._queue)

    async def submit(self, jobs: Sequence[Job], deadline: float) -> list[Timed]:
        """The answers to some jobs, all of them admitted or none.

        Args:
            jobs: what to compute.
            deadline: `time.monotonic()` at which an answer is of no use any more.

        Raises:
            Busy: too many jobs are waiting.
            Late: the deadline passed.
        """
        self._admit(len(jobs), deadline)
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

    @property
    def full(self) -> bool:
        """Whether nobody would be let in."""
        return len(self._queue) >= self.capacity

    def refuse(self, count: int = 1) -> Busy:
        """What a request of so many jobs is told that is not let in."""
        REJECTED.inc(count)
        return Busy(self._cost * len(self._queue) / 2)

    @property
    def _cost(self) -> float:
        """Seconds a job. A full batch counts as many jobs: alone each of them costs far more."""
        return self._spent / self._done if self._done else 0.0

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the worker thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def drain(self) -> None:
        """Compute everything that waits, then stop."""
        while self._queue or self._busy_until:
            await asyncio.sleep(0.005)
        self._task.cancel()
        self._thread.shutdown(wait=True)

    def _admit(self, count: int, deadline: float) -> None:
        now = time.monotonic()
        ahead = len(self._queue)
        running = max(0.0, self._busy_until - now)
        expected = running + (ahead + count) * self._cost
        # A request behind an empty queue is always let in: the estimate is renewed by running.
        hopeless = ahead > 0 and now + MARGIN * expected > deadline
        if ahead + count > self.capacity or hopeless:
            raise self.refuse(count)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            batch = self._take()
            QUEUE.set(len(self._queue))
            if not batch:
                continue
            started = time.monotonic()
            self._busy_until = started + max(len(batch) * self._cost, 1e-9)
            jobs = [one.job for one in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self.compute, jobs)
            except Exception as error:  # the jobs' callers get it; the worker goes on
                answers = [error] * len(batch)
            took = time.monotonic() - started
            self._busy_until = 0.0
            self._spent = FADING * self._spent + took
            self._done = FADING * self._done + len(batch)
            BATCH.observe(len(batch))
            for one, answer in zip(batch, answers, strict=True):
                self._settle(one, answer, started, took, len(batch))

    async def _gather(self) -> None:
        """Wait for company until the oldest job's bound or a full batch."""
        while True:
            left = self._queue[0].since + self.max_wait - time.monotonic()
            if left <= 0 or len(self._queue) >= self.max_batch:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The oldest job and the next ones of its group; the others keep their places."""
        now = time.monotonic()
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        while self._queue and len(batch) < self.max_batch:
            one = self._queue.popleft()
            if one.future.done() or one.deadline <= now:
                continue
            if not batch or one.job.group == batch[0].job.group:
                batch.append(one)
            else:
                rest.append(one)
        self._queue.extendleft(reversed(rest))
        return batch

    @staticmethod
    def _settle(one: _Waiting, answer: Any, started: float, took: float, size: int) -> None:
        if one.future.done():
            return
        waited = started - one.since
        WAIT.observe(waited)
        if isinstance(answer, Exception):
            one.future.set_exception(answer)
        else:
            one.future.set_result(Timed(answer, waited, took, size))
