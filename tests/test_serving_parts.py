"""The parts of the server that need no model: batcher, journal, keys, search, the live items."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys

import numpy as np
import pytest

from streamctl.data import Catalog
from streamctl.errors import StreamctlError
from streamctl.serving.closing import begin_no_connection
from streamctl.serving.items import LiveItems
from streamctl.serving.journal import Journal
from streamctl.serving.keys import KeyRing
from streamctl.serving.search import TitleIndex

READ, WRITE = "r" * 20, "w" * 20


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
