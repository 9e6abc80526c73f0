"""The server through its life: overload, reload, changes, SIGTERM, kill -9, several workers."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import until
from serving_process import SLOW_S, WRITE, Server, Traffic

pytestmark = pytest.mark.xdist_group("serving")


def models(server: Server) -> list[psutil.Process]:
    """The model processes of a server."""
    return [
        child
        for child in psutil.Process(server.process.pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
    ]


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


@pytest.mark.parametrize("group", [False, True])
def test_sigterm_under_load_loses_no_request_that_was_accepted(own, group):
    """To the server alone, or to its whole process group, as a terminal's Ctrl-C is."""
    server = Server(own / "first", "--drain-seconds", 3.0, "--workers", 2, keys=own / "keys").wait()
    traffic = Traffic(server, threads=6)
    until(lambda: len({answer["user"] for answer in traffic.answers}) == 6 or traffic.failures)
    for process in (*(models(server) if group else ()), psutil.Process(server.process.pid)):
        process.send_signal(signal.SIGTERM)
    until(lambda: server.client.get("/readyz").status_code == 503)
    before = len(traffic.answers)
    code = server.process.wait(SLOW_S)
    traffic.stop()
    assert not traffic.failures
    assert traffic.refused == 6
    assert len(traffic.answers) > before
    assert code == 0


def test_killed_models_lose_no_request_and_others_take_their_place(own):
    server = Server(own / "first", "--workers", 2, keys=own / "keys").wait()
    try:
        traffic = Traffic(server, threads=6)
        for _ in range(3):
            before = len(traffic.answers)
            until(lambda before=before: len(traffic.answers) > before + 30 or traffic.failures)
            models(server)[0].kill()
            assert server.client.get("/readyz").status_code == 200
            until(lambda: "streamctl_models 1.0" in server.client.get("/metrics").text)
            until(lambda: "streamctl_models 2.0" in server.client.get("/metrics").text)
        for model in models(server):  # with none left they wait for the next
            model.kill()
        until(lambda: "streamctl_models 2.0" in server.client.get("/metrics").text)
        traffic.stop()
        assert not traffic.failures and not traffic.refused
        assert "streamctl_model_deaths_total 5.0" in server.client.get("/metrics").text
        assert server.stop() == 0
    finally:
        server.kill()


def test_models_end_with_their_server_however_it_ends(own):
    server = Server(own / "first", "--workers", 2, keys=own / "keys").wait()
    alive = models(server)
    assert len(alive) == 2
    server.kill()
    assert len(psutil.wait_procs(alive, SLOW_S)[0]) == 2


def test_a_killed_server_comes_back_with_everything_that_was_changed(own):
    server = Server(own / "first", keys=own / "keys").wait()
    for number in range(5):
        new = {"id": f"new-{number}", "title": f"Alder pigment {number}"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
    assert server.client.delete("/v1/items/new-2", headers=WRITE).status_code == 204
    taken = {"user_id": "newcomer", "items": ["new-1", "i001"]}
    assert server.client.post("/v1/interactions", json=taken, headers=WRITE).status_code == 201
    codes = [server.client.get(f"/v1/items/new-{n}").json().get("codes") for n in range(5)]
    best = server.ids(user_id="u017", k=20)
    newcomers = server.ids(user_id="newcomer", k=20)
    assert "new-1" not in newcomers  # it was taken
    server.kill()
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        again = [server.client.get(f"/v1/items/new-{n}").json().get("codes") for n in range(5)]
        assert again == codes and again[2] is None and again[0]
        assert server.ids(user_id="u017", k=20) == best
        assert server.ids(user_id="newcomer", k=20) == newcomers
        new = {"id": "new-9", "title": "Alder pigment 9"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
    finally:
        server.kill()


def test_what_changes_while_two_models_serve_holds_for_both_at_once_and_after_a_reload(own):
    server = Server(own / "first", "--workers", 2, keys=own / "keys").wait()
    try:
        for number, run in enumerate(("first", "second")):
            new = {"id": f"new-{number}", "title": "Quillon layout paper"}
            assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
            for _ in range(8):
                for known in range(number + 1):
                    asked = {"user_id": "u017", "allow": [f"new-{known}"]}
                    assert server.ids(**asked) == [f"new-{known}"]
            assert server.client.get("/readyz").json()["model"]["run"] == run
            server.client.post("/v1/reload", json={"run": "second"}, headers=WRITE)
    finally:
        server.kill()


def test_a_run_that_cannot_be_loaded_ends_the_server_with_the_reason(own):
    shutil.rmtree(own / "first" / "data")
    server = Server(own / "first", "--workers", 2)
    assert server.process.wait(SLOW_S) == 1
    assert "stage data" in server.errors and "Traceback" not in server.errors.split("Error:")[-1]


def test_an_unknown_method_is_a_mistake_of_use(own, streamctl):
    answer = streamctl("serve", "--run", own / "first", "--port", 0, "--method", "foo")
    assert answer.returncode == 2 and "unknown method 'foo'" in answer.stderr


def test_a_model_that_cannot_take_a_dead_ones_place_does_not_stop_the_others(own):
    server = Server(own / "first", "--workers", 2, keys=own / "keys").wait()
    try:
        moved = (own / "first" / "data").rename(own / "data")  # without it no method loads
        models(server)[0].kill()
        until(lambda: "no model can take its place" in server.errors)
        assert server.ids(user_id="u017") and server.client.get("/readyz").status_code == 200
        moved.rename(own / "first" / "data")
        until(lambda: "streamctl_models 2.0" in server.client.get("/metrics").text)
    finally:
        server.kill()
