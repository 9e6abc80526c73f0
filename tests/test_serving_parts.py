"""The parts of the server that need no model: batcher, journal, keys, search, the live items."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from streamctl.data import Catalog
from streamctl.errors import StreamctlError
from streamctl.serving.batcher import Batcher, Busy, Late
from streamctl.serving.closing import begin_no_connection
from streamctl.serving.items import LiveItems
from streamctl.serving.journal import Journal
from streamctl.serving.keys import KeyRing
from streamctl.serving.search import TitleIndex

READ, WRITE = "r" * 20, "w" * 20


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


def test_a_journal_gives_back_its_records_to_every_reader(tmp_path):
    path = tmp_path / "sub" / "items.jsonl"
    writer, reader = Journal(path), Journal(path)
    assert reader.news() == []
    for number in range(3):
        with writer.lock():
            writer.news()
            writer.append({"number": number})
    assert writer.news() == []
    assert reader.news() == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert Journal(path).news() == [{"number": 0}, {"number": 1}, {"number": 2}]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_record_that_was_cut_off_is_dropped_and_the_next_one_takes_its_place(tmp_path, cut):
    path = tmp_path / "items.jsonl"
    journal = Journal(path)
    journal.append({"number": 0})
    whole = path.read_bytes()
    journal.append({"number": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    after = Journal(path)
    assert after.news() == [{"number": 0}]
    with after.lock():
        after.news()
        after.append({"number": 2})
    assert path.read_bytes() == whole + b'{"number": 2}\n'


@pytest.mark.parametrize("line", ["not json", "[1]", "null", '"text"', "[" * 5000, '{"bad": 1}'])
def test_a_damaged_line_names_the_file_and_the_line_and_the_ones_before_count(tmp_path, line):
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    journal = Journal(path, lambda record: "bad" not in record)
    assert journal.news() == [{"a": 1}]
    for _ in range(2):
        with pytest.raises(StreamctlError, match=r"items\.jsonl:2"):
            journal.news()


def _append_many(path, name):
    journal = Journal(path)
    for number in range(30):
        with journal.lock():
            journal.news()
            journal.append({"who": name, "number": number})


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "items.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for name in "ab":
        assert [one["number"] for one in records if one["who"] == name] == list(range(30))


def test_a_disk_that_refuses_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "items.jsonl"
    journal = Journal(path)
    journal.append({"number": 0})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.append({"number": 1})
    assert path.read_bytes() == before
    journal.append({"number": 2})
    assert [one["number"] for one in Journal(path).news()] == [0, 2]


def test_keys_come_from_the_file_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# who may\nread {READ}  # the shop\nwrite {WRITE}\n")
    monkeypatch.setenv("STREAMCTL_READ_KEYS", f"{'e' * 20}, {'f' * 20}")
    ring = KeyRing(path)
    assert ring.guards_reading
    assert [ring.right_of(key) for key in (READ, WRITE, "e" * 20, "f" * 20)] == [
        "read",
        "write",
        "read",
        "read",
    ]
    assert ring.right_of(READ[:-1]) is None
    assert ring.right_of("\udc80") is None


def test_a_changed_key_file_is_in_force_at_once(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"read {READ}\n")
    ring = KeyRing(path)
    path.write_text(f"write {WRITE}\n# changed\n")
    assert ring.right_of(READ) is None
    assert ring.right_of(WRITE) == "write"


def test_a_key_file_that_breaks_keeps_the_last_keys_in_force(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"read {READ}\n")
    ring = KeyRing(path)
    path.write_text("reed something-quite-wrong\n")
    assert ring.right_of(READ) == "read"
    assert "keys:1" in str(ring.problem)
    path.unlink()
    assert ring.right_of(READ) == "read"


@pytest.mark.parametrize("text", ["read short\n", "write\n", "admin " + READ, "read a b c\n"])
def test_a_wrong_key_file_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text("# first line\n" + text)
    with pytest.raises(StreamctlError, match="keys:2"):
        KeyRing(path)


@pytest.mark.parametrize("text", ["", "# none yet\n"])
def test_a_key_file_without_a_key_does_not_open_the_door(tmp_path, monkeypatch, text):
    monkeypatch.delenv("STREAMCTL_READ_KEYS", raising=False)
    monkeypatch.delenv("STREAMCTL_WRITE_KEYS", raising=False)
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(StreamctlError, match=r"holds no key\. Next: openssl"):
        KeyRing(path)


def test_without_keys_reading_is_open_and_no_key_may_write(monkeypatch):
    monkeypatch.delenv("STREAMCTL_READ_KEYS", raising=False)
    monkeypatch.delenv("STREAMCTL_WRITE_KEYS", raising=False)
    ring = KeyRing(None)
    assert not ring.guards_reading
    assert ring.right_of(WRITE) is None


def test_search_finds_titles_with_all_words_best_first():
    index = TitleIndex(["Red lip balm", "Lip balm", "Red nail polish", "Balm for red lips", "Öl"])
    assert index.find("lip balm") == [1, 0, 3]
    assert index.find("RED li") == [0, 3]
    assert index.find("öl") == [4]
    assert index.find("blue") == []
    assert index.find("  ") == []
    index.add("Lip balm deluxe")
    assert index.find("lip balm") == [1, 5, 0, 3]


@pytest.fixture
def live():
    catalog = Catalog(
        ["a", "b", "c"], ["A a", "B b", "C c"], ["", "", ""], {"brand": ["x", "y", "x"]}
    )
    return LiveItems(catalog, np.array([[0, 0], [0, 1], [1, 0]]))


def test_added_items_are_searched_filtered_and_counted(live):
    assert live.with_values("brand", ["x"]).tolist() == [0, 2]
    number = live.add("d", "D d", {"brand": "x"}, [1, 1])
    assert number == 3 and len(live) == 4
    assert live.with_values("brand", ["x"]).tolist() == [0, 2, 3]
    assert live.with_values("brand", []).tolist() == []
    assert live.fields(3) == {"brand": "x"}
    assert live.search("d") == [3]


def test_a_removed_item_is_gone_but_histories_may_hold_it_and_its_id_is_free(live):
    live.remove(1)
    assert live.index("b") is None and live.index_ever("b") == 1
    assert live.search("b") == [] and len(live) == 2
    assert live.add("b", "B again", {}, [0, 1]) == 3
    assert live.index("b") == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's socket filters")
def test_before_the_socket_closes_connections_that_were_begun_are_kept_and_no_other_begins():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        early = socket.create_connection(address, 10)
        begin_no_connection(listening.fileno())
        with pytest.raises(TimeoutError):
            socket.create_connection(address, 0.3)
        early.sendall(b"asked")
        listening.settimeout(10)
        accepted, _ = listening.accept()
        assert accepted.recv(5) == b"asked"
        accepted.close()
        early.close()
