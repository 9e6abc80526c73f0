"""The batcher: who shares a batch, who is refused, and who is in time."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import pytest

from streamctl.serving.batcher import Batcher, Busy, Late


@dataclass
class Number:
    value: int
    group: str = "a"
    kind: str = "a"


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


class Model:
    """Doubles numbers, remembers its batches, and can be held up."""

    def __init__(self, seconds: float = 0.0):
        self.batches: list[list[int]] = []
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, jobs):
        self.gate.wait()
        time.sleep(self.seconds)
        self.batches.append([job.value for job in jobs])
        return [2 * job.value for job in jobs]


async def picked_up(batcher: Batcher) -> None:
    """Until the worker has what was submitted so far, and nothing waits."""
    await asyncio.sleep(0)  # the submissions
    while len(batcher):
        await asyncio.sleep(0.001)


def test_jobs_that_arrive_together_share_a_batch_and_get_their_own_answers():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=8, max_wait=0.05)
        answers = await asyncio.gather(*(batcher.submit([Number(n)], soon()) for n in range(20)))
        assert [answer[0].answer for answer in answers] == [2 * n for n in range(20)]
        assert max(len(batch) for batch in model.batches) == 8
        assert len(model.batches) <= 4
        await batcher.drain()

    asyncio.run(main())


def test_jobs_of_different_groups_never_share_a_batch_and_none_is_forgotten():
    async def main():
        model = Model()
        batcher = Batcher(model, max_batch=8, max_wait=0.02)
        jobs = [Number(n, group="ab"[n % 2]) for n in range(20)]
        await asyncio.gather(*(batcher.submit([job], soon()) for job in jobs))
        assert all(len({value % 2 for value in batch}) == 1 for batch in model.batches)
        assert sorted(value for batch in model.batches for value in batch) == list(range(20))
        await batcher.drain()

    asyncio.run(main())


def test_a_lone_job_waits_no_longer_than_the_bound():
    async def main():
        batcher = Batcher(Model(), max_batch=64, max_wait=0.03)
        waits = [1.0]
        # The shortest of many: what the batcher waits, not what a busy machine adds.
        while min(waits) >= 0.06 and len(waits) < 100:
            [timed] = await batcher.submit([Number(1)], soon())
            waits.append(timed.queue_s)
        assert min(waits) < 0.06
        await batcher.drain()

    asyncio.run(main())


def test_beyond_the_capacity_a_job_is_refused_and_the_others_are_answered():
    async def main():
        model = Model()
        model.gate.clear()
        batcher = Batcher(model, max_batch=2, max_wait=0.0, capacity=4)
        first = [asyncio.ensure_future(batcher.submit([Number(n)], soon())) for n in range(2)]
        await picked_up(batcher)
        waiting = [asyncio.ensure_future(batcher.submit([Number(n)], soon())) for n in range(2, 6)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as error:
            await batcher.submit([Number(9)], soon())
        assert error.value.seconds >= 0
        model.gate.set()
        answers = await asyncio.gather(*first, *waiting)
        assert [one[0].answer for one in answers] == [0, 2, 4, 6, 8, 10]
        await batcher.drain()

    asyncio.run(main())


def test_a_queue_that_cannot_meet_the_deadline_refuses_instead_of_answering_late():
    async def main():
        model = Model(seconds=0.2)
        batcher = Batcher(model, max_batch=1, max_wait=0.0, capacity=1000)
        await batcher.submit([Number(0)], soon())  # teaches the batcher what a job costs
        model.seconds = 0.0
        calls = (batcher.submit([Number(n)], soon(4.0)) for n in range(40))
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in results if isinstance(one, Busy)]
        assert len(refused) >= 30  # four seconds hold 20 jobs, ten with the margin
        assert all(isinstance(one, Busy | list) for one in results)
        assert isinstance(results[0], list) and isinstance(results[-1], Busy)
        assert all(one.seconds > 0 for one in refused)
        await batcher.drain()

    asyncio.run(main())


def test_at_four_times_what_can_be_computed_whoever_is_let_in_is_in_time():
    class Slow(Model):
        def __call__(self, jobs):
            time.sleep(0.02 * len(jobs))
            return super().__call__(jobs)

    async def main():
        model = Slow()
        batcher = Batcher(model, max_batch=8, max_wait=0.0, capacity=1000)
        calls = []
        for number in range(600):
            # Long beside the pauses of a busy machine: a job computed late was let in wrongly.
            submit = batcher.submit([Number(number)], soon(2.0))
            calls.append(asyncio.ensure_future(submit))
            await asyncio.sleep(0.005)
        results = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [type(one) for one in results]
        assert kinds.count(Late) == 0
        assert kinds.count(Busy) > 200
        assert kinds.count(list) > 100  # and the model was never without work
        assert max(len(batch) for batch in model.batches) > 4
        await batcher.drain()

    asyncio.run(main())


def test_a_batch_takes_no_more_jobs_than_leave_the_oldest_in_time():
    async def main():
        model = Model()
        model.gate.clear()
        batcher = Batcher(model, max_batch=8, max_wait=0.0)
        batcher.expect("a", 0.05)
        first = asyncio.ensure_future(batcher.submit([Number(0)], soon()))
        await picked_up(batcher)
        waiting = [asyncio.ensure_future(batcher.submit([Number(n)], soon())) for n in (1, 2, 3)]
        hurried = asyncio.ensure_future(batcher.submit([Number(4)], soon(4.0)))
        # The first job takes ten times what was expected: four of them would be too much.
        await asyncio.sleep(0.6)
        model.gate.set()
        await asyncio.gather(first, *waiting, hurried)
        assert model.batches[0] == [0] and len(model.batches) > 2
        await batcher.drain()

    asyncio.run(main())


def test_a_crowd_is_refused_before_it_is_heard_and_a_kind_never_seen_counts_as_the_dearest():
    async def main():
        model = Model()
        model.gate.clear()
        batcher = Batcher(model, max_batch=8, max_wait=0.0, capacity=100)
        batcher.expect("a", 0.2)
        batcher.expect("b", 2.0)
        calls = [asyncio.ensure_future(batcher.submit([Number(n)], soon())) for n in range(12)]
        await asyncio.sleep(0.02)
        assert batcher.crowded(soon(3.0)) and not batcher.crowded(soon(30.0))
        with pytest.raises(Busy):
            await batcher.submit([Number(1, kind="c")], soon(7.0))
        calls.append(asyncio.ensure_future(batcher.submit([Number(1)], soon(7.0))))
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(*calls)
        await batcher.drain()

    asyncio.run(main())


def test_a_deadline_that_passes_is_late_and_the_job_is_not_computed():
    async def main():
        model = Model()
        model.gate.clear()
        batcher = Batcher(model, max_batch=1, max_wait=0.0)
        blocked = asyncio.ensure_future(batcher.submit([Number(1)], soon()))
        await picked_up(batcher)
        with pytest.raises(Late):
            await batcher.submit([Number(2)], soon(0.05))
        model.gate.set()
        await blocked
        await batcher.drain()
        assert model.batches == [[1]]

    asyncio.run(main())


def test_a_failing_batch_fails_its_own_jobs_and_the_next_ones_go_on():
    async def main():
        def model(jobs):
            if jobs[0].value < 0:
                raise ValueError("broken")
            return [job.value for job in jobs]

        batcher = Batcher(model, max_wait=0.0)
        with pytest.raises(ValueError, match="broken"):
            await batcher.submit([Number(-1)], soon())
        [timed] = await batcher.submit([Number(3)], soon())
        assert timed.answer == 3
        await batcher.drain()

    asyncio.run(main())


def test_draining_answers_everything_that_waits():
    async def main():
        model = Model(seconds=0.01)
        batcher = Batcher(model, max_batch=1, max_wait=0.0)
        waiting = [asyncio.ensure_future(batcher.submit([Number(n)], soon())) for n in range(10)]
        await asyncio.sleep(0)
        await batcher.drain()
        answers = await asyncio.wait_for(asyncio.gather(*waiting), 30)
        assert [one[0].answer for one in answers] == [2 * n for n in range(10)]

    asyncio.run(main())
