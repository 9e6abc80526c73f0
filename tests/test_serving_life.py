"""The server through its life: overload, reload, changes, SIGTERM, kill -9, several workers."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import until
from serving_process import SLOW_S, WRITE, Server, Traffic

pytestmark = pytest.mark.xdist_group("serving")


def test_overload_gives_429_with_retry_after_and_no_other_error(own):
    server = Server(own / "first", "--queue", 4, "--max-batch", 2, keys=own / "keys").wait()
    try:
        with ThreadPoolExecutor(24) as pool:
            call = lambda n: server.client.post(  # noqa: E731
                "/v1/recommend", json={"user_id": f"u{n % 100:03}"}
            )
            answers = list(pool.map(call, range(240)))
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.headers["content-type"] == "application/problem+json"
        late = server.client.post("/v1/recommend", json={"user_id": "u001", "deadline_ms": 1})
        assert late.status_code == 504
    finally:
        server.kill()


def test_requests_during_a_reload_all_succeed_and_each_is_of_one_model(own):
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        traffic = Traffic(server)
        until(lambda: traffic.answers or traffic.failures)
        for name in ("second", "first", "second"):
            answer = server.client.post("/v1/reload", json={"run": name}, headers=WRITE)
            assert answer.status_code == 200 and answer.json()["model"]["run"] == name
        until(lambda: traffic.failures or traffic.answers[-1]["model"]["run"] == "second")
        traffic.stop()
        assert not traffic.failures
        lists = {}
        for answer in traffic.answers:
            key = answer["user"], answer["model"]["run"]
            lists.setdefault(key, []).append([item["id"] for item in answer["items"]])
        assert {run for _, run in lists} == {"first", "second"}
        for found in lists.values():
            assert all(one == found[0] for one in found)
        refused = server.client.post("/v1/reload", json={"run": "../x"}, headers=WRITE)
        assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "/run"
    finally:
        server.kill()


def test_requests_during_additions_all_succeed_and_additions_show_at_once(own):
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        traffic = Traffic(server)
        for number in range(12):
            new = {"id": f"new-{number}", "title": f"Harbour black ink {number}"}
            assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
            assert server.ids(user_id="u017", allow=[f"new-{number}"]) == [f"new-{number}"]
        until(lambda: traffic.failures or len(traffic.answers) > 20)
        traffic.stop()
        assert not traffic.failures
    finally:
        server.kill()


@pytest.mark.parametrize(("workers", "group"), [(1, False), (2, False), (2, True)])
def test_sigterm_under_load_loses_no_request_that_was_accepted(own, workers, group):
    """To the server alone, or to its whole process group, as a terminal's Ctrl-C is."""
    options = ["--drain-seconds", 3.0, "--workers", workers]
    server = Server(own / "first", *options, keys=own / "keys").wait()
    until(lambda: server.errors.count("ready:") == workers)
    traffic = Traffic(server, threads=6)
    until(lambda: len({answer["user"] for answer in traffic.answers}) == 6 or traffic.failures)
    parent = psutil.Process(server.process.pid)
    for process in (*(parent.children() if group else ()), parent):
        process.send_signal(signal.SIGTERM)
    until(lambda: server.client.get("/readyz").status_code == 503)
    before = len(traffic.answers)
    code = server.process.wait(SLOW_S)
    traffic.stop()
    assert not traffic.failures
    assert traffic.refused == 6
    assert len(traffic.answers) > before
    assert code == 0


def test_a_killed_server_comes_back_with_everything_that_was_added(own):
    server = Server(own / "first", keys=own / "keys").wait()
    for number in range(5):
        new = {"id": f"new-{number}", "title": f"Alder pigment {number}"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
    assert server.client.delete("/v1/items/new-2", headers=WRITE).status_code == 204
    codes = [server.client.get(f"/v1/items/new-{n}").json().get("codes") for n in range(5)]
    best = server.ids(user_id="u017", k=20)
    server.kill()
    journal = own / "first" / "serving" / "items.jsonl"
    with open(journal, "ab") as handle:
        handle.write(b'{"op": "add", "id": "half')  # the kill came in the middle of a write
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        again = [server.client.get(f"/v1/items/new-{n}").json().get("codes") for n in range(5)]
        assert again == codes and again[2] is None and again[0]
        assert server.ids(user_id="u017", k=20) == best
        new = {"id": "new-9", "title": "Alder pigment 9"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
    finally:
        server.kill()


def test_a_damaged_journal_stops_changes_but_no_answers_and_no_start_hides_it(own):
    server = Server(own / "first", keys=own / "keys").wait()
    journal = own / "first" / "serving" / "items.jsonl"
    try:
        new = {"id": "new-1", "title": "Alder pigment"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
        with open(journal, "a") as handle:
            handle.write('[1, 2]\n{"op": "remove", "id": "new-1"}\n')
        until(lambda: "items.jsonl:2" in server.errors)  # the idle worker has looked at it, too
        assert server.ids(user_id="u017", allow=["new-1"]) == ["new-1"]
        refused = server.client.delete("/v1/items/new-1", headers=WRITE)
        assert refused.status_code == 507 and "damaged" in refused.json()["detail"]
        assert journal.read_text().count("\n") == 3
    finally:
        server.kill()
    again = Server(own / "first", keys=own / "keys")
    assert again.process.wait(SLOW_S) != 0 and "items.jsonl:2" in again.errors


def test_added_items_follow_to_a_run_with_other_codes(own):
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        new = {"id": "new-1", "title": "Northwind broad nibs", "text": "Northwind broad nibs"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
        answer = server.client.post("/v1/reload", json={"run": "second"}, headers=WRITE)
        assert answer.status_code == 200
        assert server.ids(user_id="u017", allow=["new-1"]) == ["new-1"]
    finally:
        server.kill()


def test_two_workers_agree_on_items_and_follow_a_reload(own):
    server = Server(own / "first", "--workers", 2, keys=own / "keys").wait()
    try:

        def everywhere(check) -> None:
            """Each call on a connection of its own, so that both workers are met."""

            def holds() -> bool:
                for _ in range(16):
                    with server.connect() as client:
                        if client.get("/readyz").status_code != 200 or not check(client):
                            return False
                return True

            until(holds)

        def has_it(client) -> bool:
            answer = client.post("/v1/recommend", json={"user_id": "u017", "allow": ["new-1"]})
            return answer.is_success and answer.json()["items"][0]["id"] == "new-1"

        def is_second(client) -> bool:
            return client.get("/readyz").json()["model"]["run"] == "second"

        new = {"id": "new-1", "title": "Quillon layout paper"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
        everywhere(has_it)
        server.client.post("/v1/reload", json={"run": "second"}, headers=WRITE)
        everywhere(is_second)
        # Workers that take the place of killed ones serve what these served.
        for child in psutil.Process(server.process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        for _ in range(16):
            with server.connect() as client:
                until(lambda client=client: client.get("/readyz").status_code == 200)
                assert is_second(client)
        metrics = server.client.get("/metrics").text
        assert "streamctl_recommend_seconds_count" in metrics
        assert server.stop() == 0
    finally:
        server.kill()


def test_workers_of_which_none_can_load_the_run_end_with_the_reason(own, tmp_path):
    damaged = tmp_path / "items.jsonl"
    damaged.write_text("no record\nnor this\n")
    server = Server(own / "first", "--workers", 2, "--items", damaged)
    try:
        assert server.process.wait(SLOW_S) == 1
    finally:
        server.kill()
    assert "items.jsonl:1: not a record" in server.errors
    assert "could not load the run, and none had" in server.errors


def test_a_worker_that_cannot_take_a_dead_ones_place_does_not_stop_the_others(own, tmp_path):
    items = tmp_path / "items.jsonl"
    server = Server(own / "first", "--workers", 2, "--items", items).wait()
    try:
        until(lambda: server.errors.count("ready:") == 2)
        items.write_text("no record\nnor this\n")  # who reads it from the start will stumble
        first, *_ = (
            child
            for child in psutil.Process(server.process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        )
        first.kill()
        until(lambda: server.errors.count("a worker cannot load its model") >= 2)
        assert server.process.poll() is None
        items.unlink()
        until(lambda: server.errors.count("ready:") == 3)
        assert server.ids(user_id="u017")
        assert server.stop() == 0
    finally:
        server.kill()
