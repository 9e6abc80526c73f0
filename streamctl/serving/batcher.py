"""Dynamic batching: requests that may run together do, none waits longer than its bound."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamctl.serving.metrics import BATCH, EXPIRED, QUEUE, REJECTED, WAIT

MARGIN = 2.0  # of the expected seconds: a batch may take longer than any of the latest did
CROWD = 0.25  # of a full batch: who waits behind fewer is heard before being refused
FADING = 0.75  # weight of what is known of a job's cost against a batch that was faster


class Job(Protocol):
    """Something to compute.

    Attributes:
        group: jobs of one group can share a batch.
        kind: jobs of one kind take about equally long; there are few kinds.
    """

    group: Hashable
    kind: Hashable


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
        self._busy_until: float | None = None  # as expected; None for an idle worker
        self._waiting_s = 0.0  # what the waiting jobs will take
        self._costs: dict[Hashable, float] = {}  # seconds a job, by its kind
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
        seconds = sum(map(self._cost, jobs))
        if len(self) + len(jobs) > self.capacity or not self._in_time(seconds, deadline):
            raise self.refuse(len(jobs))
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(job, deadline, loop.create_future()) for job in jobs]
        self._queue.extend(waiting)
        self._waiting_s += seconds
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

    def crowded(self, deadline: float) -> bool:
        """Whether not even the cheapest job would be let in with this deadline."""
        if len(self) >= self.capacity:
            return True
        cheapest = min(self._costs.values(), default=0.0)
        return len(self) >= CROWD * self.max_batch and not self._in_time(cheapest, deadline)

    def refuse(self, count: int = 1) -> Busy:
        """What a request of so many jobs is told that is not let in."""
        REJECTED.inc(count)
        return Busy(self._waiting_s / 2)

    def expect(self, kind: Hashable, seconds: float) -> None:
        """What a job of a kind takes that has not run here yet."""
        self._costs.setdefault(kind, seconds)

    def _cost(self, job: Job) -> float:
        """Seconds that a job is expected to take; an unknown kind as many as the dearest known."""
        return self._costs.get(job.kind) or max(self._costs.values(), default=0.0)

    def _learn(self, kind: Hashable, seconds: float) -> None:
        """A job's cost follows slow batches at once and fast ones slowly: a promise is kept on a
        busy machine too."""
        known = self._costs.get(kind, seconds)
        self._costs[kind] = max(seconds, FADING * known + (1 - FADING) * seconds)

    def _in_time(self, seconds: float, deadline: float) -> bool:
        """Whether jobs of so many seconds, behind those that wait, can be expected by a deadline.

        An idle worker takes all: what it then needs renews the estimate.
        """
        if self._busy_until is None and not self._queue:
            return True
        now = time.monotonic()
        running = max(0.0, (self._busy_until or now) - now)
        return now + MARGIN * (running + self._waiting_s + seconds) <= deadline

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the worker thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def drain(self) -> None:
        """Compute everything that waits, then stop."""
        while self._queue or self._busy_until is not None:
            await asyncio.sleep(0.005)
        self._task.cancel()
        self._thread.shutdown(wait=True)

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
            jobs = [one.job for one in batch]
            self._busy_until = started + sum(map(self._cost, jobs))
            try:
                answers = await loop.run_in_executor(self._thread, self.compute, jobs)
            except Exception as error:  # the jobs' callers get it; the worker goes on
                answers = [error] * len(batch)
            took = time.monotonic() - started
            self._busy_until = None
            self._learn(jobs[0].kind, took / len(jobs))
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
        """The oldest job and the next ones of its group; the others keep their places.

        As many as leave all of them in time: a late one helps nobody.
        """
        now, seconds, earliest = time.monotonic(), 0.0, math.inf
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        while self._queue and len(batch) < self.max_batch:
            one = self._queue.popleft()
            if one.future.done() or one.deadline <= now:
                continue
            if batch and one.job.group != batch[0].job.group:
                rest.append(one)
                continue
            seconds, earliest = seconds + self._cost(one.job), min(earliest, one.deadline)
            if batch and now + MARGIN * seconds > earliest:
                rest.append(one)
                break
            batch.append(one)
        self._queue.extendleft(reversed(rest))
        self._waiting_s = sum(self._cost(one.job) for one in self._queue)
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
