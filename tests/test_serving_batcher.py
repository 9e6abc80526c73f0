"""The batcher: who shares a batch, who is refused, who is in time, and what a dead model loses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import pytest

from streamctl.serving.batcher import TRIES, Batcher, Busy, Gone, Late


@dataclass
class Number:
    value: int
    group: str = "a"


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


class Model:
    """Doubles numbers, remembers its batches, can be held up, and dies of some numbers."""

    def __init__(self, seconds: float = 0.0, deadly: tuple[int, ...] = ()):
        self.batches: list[list[int]] = []
        self.seconds, self.deadly = seconds, deadly
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, jobs):
        await self.gate.wait()
        await asyncio.sleep(self.seconds * len(jobs))
        self.batches.append([job.value for job in jobs])
        if {job.value for job in jobs} & {*self.deadly}:
            raise Gone("killed")
        if any(job.value < 0 for job in jobs):
            raise ValueError("broken")
        return [2 * job.value for job in jobs]


@contextlib.asynccontextmanager
async def serving(*models: Model, **settings):
    """A batcher whose models are replaced when they die."""
    batcher = Batcher(**settings)

    async def keep(model):
        while True:
            with contextlib.suppress(Gone):
                await batcher.serve(model)

    tasks = [asyncio.create_task(keep(model)) for model in models]
    await asyncio.sleep(0)
    yield batcher
    for task in tasks:
        task.cancel()


def submit(batcher: Batcher, *numbers: int, seconds: float = 60.0, group: str = "a"):
    jobs = [Number(number, group) for number in numbers]
    return asyncio.ensure_future(batcher.submit(jobs, soon(seconds)))


async def picked_up(batcher: Batcher) -> None:
    """Until a model has what was submitted so far, and nothing waits."""
    await asyncio.sleep(0)
    while len(batcher):
        await asyncio.sleep(0.001)


def test_jobs_that_arrive_together_share_a_batch_and_get_their_own_answers():
    async def main():
        model = Model()
        async with serving(model, max_batch=8, max_wait=0.05) as batcher:
            answers = await asyncio.gather(*(submit(batcher, n) for n in range(20)))
        assert [answer[0].answer for answer in answers] == [2 * n for n in range(20)]
        assert max(len(batch) for batch in model.batches) == 8
        assert len(model.batches) <= 4

    asyncio.run(main())


def test_jobs_of_different_groups_never_share_a_batch_and_none_is_forgotten():
    async def main():
        model = Model()
        async with serving(model, max_batch=8, max_wait=0.02) as batcher:
            await asyncio.gather(*(submit(batcher, n, group="ab"[n % 2]) for n in range(20)))
        assert all(len({value % 2 for value in batch}) == 1 for batch in model.batches)
        assert sorted(value for batch in model.batches for value in batch) == list(range(20))

    asyncio.run(main())


def test_a_lone_job_waits_no_longer_than_the_bound():
    async def main():
        async with serving(Model(), max_batch=64, max_wait=0.03) as batcher:
            waits = [1.0]
            # The shortest of many: what the batcher waits, not what a busy machine adds.
            while min(waits) >= 0.06 and len(waits) < 100:
                [timed] = await submit(batcher, 1)
                waits.append(timed.queue_s)
            assert min(waits) < 0.06

    asyncio.run(main())


def test_beyond_the_capacity_a_job_is_refused_and_the_others_are_answered():
    async def main():
        model = Model()
        model.gate.clear()
        async with serving(model, max_batch=2, capacity=4) as batcher:
            first = submit(batcher, 0, 1)
            await picked_up(batcher)
            waiting = [submit(batcher, n) for n in range(2, 6)]
            await asyncio.sleep(0)
            assert batcher.refusal(1, soon()) is not None
            with pytest.raises(Busy):
                await submit(batcher, 9)
            model.gate.set()
            answers = await asyncio.gather(first, *waiting)
            assert [one.answer for each in answers for one in each] == [0, 2, 4, 6, 8, 10]

    asyncio.run(main())


def test_at_four_times_what_can_be_computed_few_are_late_and_the_model_is_never_idle():
    async def main():
        model = Model(seconds=0.01)
        async with serving(model, max_batch=8, capacity=1000) as batcher:
            calls = []
            for number in range(400):
                calls.append(submit(batcher, number, seconds=1.0))
                await asyncio.sleep(0.0025)
            results = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [type(one) for one in results]
        assert kinds.count(Late) <= 8  # a batch that a busy machine held up
        assert kinds.count(Busy) > 10 and kinds.count(list) > 80
        assert all(one.seconds > 0 for one in results if isinstance(one, Busy))

    asyncio.run(main())


def test_a_deadline_that_passes_is_late_and_the_job_is_not_computed():
    async def main():
        model = Model()
        model.gate.clear()
        async with serving(model, max_batch=1) as batcher:
            blocked = submit(batcher, 1)
            await picked_up(batcher)
            with pytest.raises(Late):
                await submit(batcher, 2, seconds=0.05)
            model.gate.set()
            await blocked
            await picked_up(batcher)
        assert model.batches == [[1]]

    asyncio.run(main())


def test_a_failing_batch_fails_its_own_jobs_and_the_next_ones_go_on():
    async def main():
        async with serving(Model()) as batcher:
            with pytest.raises(ValueError, match="broken"):
                await submit(batcher, -1)
            [timed] = await submit(batcher, 3)
            assert timed.answer == 6

    asyncio.run(main())


def test_what_a_dead_model_was_at_is_done_by_another_before_what_came_later():
    async def main():
        dies, lives = Model(deadly=(1,)), Model()
        dies.gate.clear()
        async with serving(max_batch=1) as batcher:
            dying = asyncio.create_task(batcher.serve(dies))
            await asyncio.sleep(0)
            first = submit(batcher, 1)
            await picked_up(batcher)
            second = submit(batcher, 2)
            dies.gate.set()
            with pytest.raises(Gone):
                await dying
            keeper = asyncio.create_task(batcher.serve(lives))
            assert [(await one)[0].answer for one in (first, second)] == [2, 4]
            keeper.cancel()
        assert (dies.batches, lives.batches) == ([[1]], [[1], [2]])

    asyncio.run(main())


def test_a_job_is_pending_at_every_moment_until_it_is_answered():
    async def main():
        model = Model()
        model.gate.clear()
        async with serving(model, max_batch=1) as batcher:
            asked = submit(batcher, 1)
            await asyncio.sleep(0)
            for _ in range(50):  # a server that stops waits while anything is pending
                assert batcher.pending == 1
                await asyncio.sleep(0)
            model.gate.set()
            assert (await asked)[0].answer == 2 and batcher.pending == 0

    asyncio.run(main())


def test_a_model_that_is_stopped_at_any_moment_loses_no_job():
    async def main():
        idle, held, lives = Model(), Model(), Model()
        held.gate.clear()
        async with serving(max_batch=1) as batcher:
            for model in (idle, held):
                asked = submit(batcher, 4) if model is held else None
                serving_it = asyncio.create_task(batcher.serve(model))
                await asyncio.sleep(0.01)
                serving_it.cancel("exit code -9")
                with pytest.raises(asyncio.CancelledError):
                    await serving_it
            keeper = asyncio.create_task(batcher.serve(lives))
            assert (await asked)[0].answer == 8 and not idle.batches
            keeper.cancel()

    asyncio.run(main())


def test_a_job_that_models_die_of_is_given_up():
    async def main():
        model = Model(deadly=(7,))
        async with serving(model, max_batch=1) as batcher:
            with pytest.raises(RuntimeError, match="died"):
                await submit(batcher, 7)
            [timed] = await submit(batcher, 3)
            assert timed.answer == 6
        assert model.batches == [[7]] * TRIES + [[3]]

    asyncio.run(main())


def test_two_models_share_the_work():
    async def main():
        models = Model(seconds=0.002), Model(seconds=0.002)
        async with serving(*models, max_batch=1) as batcher:
            await asyncio.gather(*(submit(batcher, n) for n in range(20)))
        assert all(len(model.batches) > 5 for model in models)

    asyncio.run(main())
