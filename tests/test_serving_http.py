"""The server as its users meet it: a real process on loopback, spoken to over HTTP."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from serving_process import SLOW_S, WRITE, Server
from serving_run import THINK

from streamctl.runs import RunDir

pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def server(runs):
    server = Server(runs / "first", "--store", runs / "store", keys=runs / "keys")
    yield server.wait()
    server.kill()


@pytest.fixture(scope="module")
def history(server):
    return [item["id"] for item in server.client.get("/v1/users/u017").json()["history"]]


def test_a_history_gets_ranked_items_that_it_does_not_hold(server, history):
    answer = server.recommend(history=history, k=7)
    assert len(answer["items"]) == 7 and answer["think"] == THINK
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert not {item["id"] for item in answer["items"]} & set(history)
    assert answer["model"]["run"] == "first" and answer["model"]["stage"] == "sft"


def test_a_known_user_stands_for_the_history(server, history):
    assert server.ids(user_id="u017") == server.ids(history=history)


def test_seen_items_may_be_asked_for(server, history):
    every = server.ids(history=history, k=100, exclude_seen=False)
    assert set(history) & set(every)


def test_the_thinking_budget_and_the_method_are_the_callers(server, history):
    for think in (0, 1, 8):
        assert server.recommend(history=history, think=think)["think"] == think
    served = server.client.get("/readyz").json()
    assert served["method"] == server.recommend(history=history)["method"] == "stream_sft"
    for method in served["methods"]:
        assert server.recommend(history=history, method=method)["method"] == method


def test_the_model_that_is_named_is_the_one_that_answered(server, runs, history):
    run = RunDir(runs / "first")
    of = {"stream_sft": "sft", "stream_pt": "pretrain", "popularity": "data"}
    for method, stage in of.items():
        told = server.recommend(history=history, method=method)["model"]
        assert told == {"run": "first", "stage": stage, "hash": run.stage(stage).hash}
    assert server.recommend(user_id="nobody")["model"]["stage"] == "data"


def test_who_is_not_known_gets_the_popular_items_and_the_answer_says_so(server):
    for query in ({"user_id": "nobody"}, {"history": []}):
        answer = server.recommend(**query, explain=True)
        assert answer["method"] == "popularity" and "popular" in answer["note"]
        assert len(answer["items"]) == 10
    assert server.recommend(user_id="u017")["note"] is None


def test_items_alike_are_listed_best_first(server):
    found = server.client.get("/v1/items/i001/similar", params={"k": 5}).json()["items"]
    assert len(found) == 5 and "i001" not in [item["id"] for item in found]
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.5
    assert server.client.get("/v1/items/nothing/similar").status_code == 404
    wrong = server.client.get("/v1/items/i001/similar", params={"k": 0})
    assert wrong.json()["errors"][0]["field"] == "k"


def test_allow_deny_and_filter_are_obeyed(server, history):
    best = server.ids(history=history, k=5)
    assert server.ids(history=history, allow=best[1:3]) == best[1:3]
    assert server.ids(history=history, k=4, deny=best[:1]) == best[1:]
    brand = server.client.get(f"/v1/items/{best[0]}").json()["fields"]["brand"]
    found = server.ids(history=history, k=50, filter={"brand": [brand]})
    assert best[0] in found
    for item in found:
        assert server.client.get(f"/v1/items/{item}").json()["fields"]["brand"] == brand
    assert server.ids(history=history, filter={"brand": []}) == []


def test_the_batch_form_gives_what_single_requests_give(server, history):
    questions = [{"history": history, "k": 3}, {"user_id": "u020", "k": 5, "think": 0}]
    answer = server.client.post("/v1/recommend/batch", json={"requests": questions}).json()
    together = [[item["id"] for item in one["items"]] for one in answer["answers"]]
    assert together == [server.ids(**question) for question in questions]


def test_the_explanation_says_what_came_to_mind_why_and_how_the_ranking_moved(server, history):
    answer = server.recommend(history=history, k=5, explain=True)
    before, steps = answer["explain"]["before"], answer["explain"]["steps"]
    assert len(steps) == 9 and [step["item"] is None for step in steps] == [False] * 8 + [True]
    weights = [step["weight"] for step in steps[:-1]]
    assert weights == sorted(weights, reverse=True)
    assert sum(step["weight"] for step in steps) == pytest.approx(1, abs=1e-3)
    for step in steps[:-1]:
        assert step["item"]["title"] in step["text"] and step["hop"]
        assert step["via"] is None or step["via"]["title"] in step["text"]
    ids = [[item["id"] for item in one] for one in (before, *(step["ranking"] for step in steps))]
    assert ids[-1][:5] == [item["id"] for item in answer["items"]]
    assert ids[0] == server.ids(history=history, think=0)
    assert len({tuple(one) for one in ids}) > 4
    direct = server.recommend(history=history, method="popularity", explain=True)
    assert direct["explain"] is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "/"),
        ({"history": ["i001", "nothing"]}, "/history/1"),
        ({"history": ["i001"], "user_id": "u017"}, "/"),
        ({"user_id": "u017", "k": 0}, "/k"),
        ({"user_id": "u017", "k": 1001}, "/k"),
        ({"user_id": "u017", "think": 65}, "/think"),
        ({"user_id": "u017", "method": "deep"}, "/method"),
        ({"user_id": "u017", "kk": 1}, "/kk"),
        ({"user_id": "u017", "filter": {"brnd": ["x"]}}, "/filter/brnd"),
        ({"user_id": "u017", "allow": ["nothing"]}, "/allow/0"),
        ({"history": ["i001"] * 201}, "/history"),
        ({"history": ["\ud800"]}, "/history/0"),
    ],
)
def test_a_wrong_request_names_the_field_at_fault(server, body, field):
    answer = server.client.post(
        "/v1/recommend", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 422 and problem["errors"][0]["field"] == field
    assert problem["detail"]


def test_a_wrong_path_or_method_is_told_where_the_api_is_described(server):
    for method, path, status in (("GET", "/v2/x", 404), ("PUT", "/v1/recommend", 405)):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["detail"].endswith(f": {method} {path}; /docs describes the API")


def test_the_address_is_told_when_it_is_ready(server):
    assert f"ready at {server.url}: first (stream_sft: " in server.errors


def test_a_close_id_is_suggested(server):
    item = server.client.get("/v1/items", params={"limit": 1}).json()["items"][0]["id"]
    answer = server.client.post("/v1/recommend", json={"history": [item + "0"]})
    assert f"did you mean {item}" in answer.json()["errors"][0]["detail"]


def test_a_wrong_place_in_a_batch_is_named(server):
    right, wrong = {"user_id": "u017"}, {"history": ["nothing"]}
    for place, requests in ((1, [right, wrong]), (0, [wrong])):
        answer = server.client.post("/v1/recommend/batch", json={"requests": requests})
        assert answer.json()["errors"][0]["field"] == f"/requests/{place}/history/0"


def test_bodies_over_a_mebibyte_are_refused_declared_or_not(server):
    large = b'{"user_id": "' + b"x" * (1 << 20) + b'"}'
    for content in (large, iter([large[: 1 << 19], large[1 << 19 :]])):
        answer = server.client.post(
            "/v1/recommend", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b"NaN"])
def test_what_is_not_a_json_object_is_refused_and_not_fallen_over(server, content):
    answer = server.client.post(
        "/v1/recommend", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_not_declared_as_json_is_refused(server):
    # A form or plain text could be sent by any web page without asking the server first.
    answer = server.client.post(
        "/v1/recommend", content=b'{"user_id": "u017"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 422


def test_without_the_right_key_nothing_is_read_or_changed(server):
    new = {"id": "zzz", "title": "Zzz"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
        with httpx.Client(base_url=server.url, headers=headers) as client:
            assert client.post("/v1/recommend", json={"user_id": "u017"}).status_code == 401
            for path in ("/v1/items", "/v1/users", "/v1/run", "/metrics"):
                assert client.get(path).status_code == 401
            assert client.post("/v1/items", json=new).status_code == 401
            taken = {"user_id": "u017", "items": ["i001"]}
            assert client.post("/v1/interactions", json=taken).status_code == 401
            assert client.get("/healthz").status_code == 200
            assert client.get("/").status_code == 200
    assert server.client.post("/v1/items", json=new).status_code == 403
    assert server.client.delete("/v1/items/i001").status_code == 403
    assert server.client.delete("/v1/users/u017").status_code == 403
    assert server.client.post("/v1/reload", json={}).status_code == 403


def test_every_answer_carries_the_protective_headers(server):
    for path in ("/", "/docs", "/page/main.js", "/v1/items", "/nothing"):
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/..%2fapp.py", "/page//etc/passwd"])
def test_only_the_pages_own_files_can_be_fetched(server, path):
    assert server.client.get(path).status_code == 404


def test_an_added_item_is_found_read_and_recommended(server):
    new = {"id": "new-1", "title": "Wrenfield varnish brush", "fields": {"brand": "Wrenfield"}}
    added = server.client.post("/v1/items", json=new, headers=WRITE)
    assert added.status_code == 201 and added.json()["added"]
    codes = added.json()["codes"]
    others = server.client.get("/v1/items", params={"q": "", "limit": 100}).json()["items"]
    assert codes not in [item["codes"] for item in others if item["id"] != "new-1"]
    found = server.client.get("/v1/items", params={"q": "varnish brush"}).json()
    assert "new-1" in [item["id"] for item in found["items"]]
    assert server.ids(user_id="u017", allow=["new-1"]) == ["new-1"]
    assert server.ids(history=["new-1"], k=3)
    again = server.client.post("/v1/items", json=new, headers=WRITE)
    assert again.status_code == 409 and again.json()["errors"][0]["field"] == "/id"
    wrong = {**new, "id": "new-2", "fields": {"brnd": "x"}}
    refused = server.client.post("/v1/items", json=wrong, headers=WRITE)
    assert refused.status_code == 422 and "brand" in refused.json()["detail"]
    assert server.client.delete("/v1/items/new-1", headers=WRITE).status_code == 204
    assert server.client.get("/v1/items/new-1").status_code == 404
    assert server.client.delete("/v1/items/new-1", headers=WRITE).status_code == 404
    assert server.ids(user_id="u017", allow=["new-1"]) == []
    assert server.ids(history=["new-1"], k=3)


def test_what_a_user_takes_is_read_from_then_on(server):
    items = server.ids(user_id="u021", k=2)
    taken = {"user_id": "u021", "items": items}
    assert server.client.post("/v1/interactions", json=taken).status_code == 403
    added = server.client.post("/v1/interactions", json=taken, headers=WRITE)
    assert added.status_code == 201
    assert [item["id"] for item in added.json()["history"]][-2:] == items
    assert server.client.get("/v1/users/u021").json() == added.json()
    assert not {*items} & {*server.ids(user_id="u021", k=20)}
    wrong = server.client.post(
        "/v1/interactions", json={**taken, "items": [*items, "nothing"]}, headers=WRITE
    )
    assert wrong.status_code == 422 and wrong.json()["errors"][0]["field"] == "/items/2"
    new = {"user_id": "new/comer", "items": items}
    assert server.client.get("/v1/users/new/comer").status_code == 404
    assert server.client.post("/v1/interactions", json=new, headers=WRITE).status_code == 201
    assert server.client.get("/v1/users/new/comer").json()["interactions"] == 2
    assert len(server.ids(user_id="new/comer", k=3)) == 3


def test_a_user_can_be_forgotten(server):
    history = server.client.get("/v1/users/u044").json()["history"]
    assert server.client.delete("/v1/users/u044", headers=WRITE).status_code == 204
    assert server.client.get("/v1/users/u044").status_code == 404
    assert server.recommend(user_id="u044")["method"] == "popularity"
    assert server.client.delete("/v1/users/u044", headers=WRITE).status_code == 404
    taken = {"user_id": "u044", "items": [history[0]["id"]]}
    assert server.client.post("/v1/interactions", json=taken, headers=WRITE).status_code == 201
    assert server.client.get("/v1/users/u044").json()["interactions"] == 1


def test_items_with_equal_texts_get_codes_of_their_own(server):
    made = []
    for number in range(6):
        new = {"id": f"twin-{number}", "title": "Copperleaf wax seal kit"}
        made.append(server.client.post("/v1/items", json=new, headers=WRITE).json()["codes"])
    assert len({tuple(codes) for codes in made}) == 6
    assert len({tuple(codes[:-1]) for codes in made}) == 1
    for number in range(6):
        assert server.client.delete(f"/v1/items/twin-{number}", headers=WRITE).is_success


def test_an_item_of_the_run_can_be_taken_out(server):
    first = server.ids(user_id="u033", k=3)
    assert server.client.delete(f"/v1/items/{first[0]}", headers=WRITE).status_code == 204
    assert server.ids(user_id="u033", k=2) == first[1:]


def test_the_metrics_count_what_happened(server, history):
    server.ids(history=history, think=2)
    text = server.client.get("/metrics").text
    assert 'streamctl_recommend_seconds_count{method="stream_sft",think="2"}' in text
    assert 'streamctl_requests_total{route="/v1/recommend",status="200"}' in text
    for name in ("batch_size", "queue_length", "queue_seconds", "rejected", "expired", "items"):
        assert f"streamctl_{name}" in text


def test_the_run_report_has_stages_curves_and_code_usage(server):
    report = server.client.get("/v1/run").json()
    assert [stage["name"] for stage in report["stages"]][:2] == ["data", "tokenizer"]
    assert any(curve["stage"] == "sft" and curve["metric"] == "loss" for curve in report["curves"])
    assert len(report["codes"]["levels"]) == 3
    assert sum(report["codes"]["levels"][0]["counts"]) == 120


def test_users_are_listed_and_searched(server):
    listed = server.client.get("/v1/users", params={"limit": 5}).json()
    assert len(listed["users"]) == 5 and listed["total"] >= 150  # and those who came since
    found = server.client.get("/v1/users", params={"q": "u01"}).json()
    assert found["users"] and all(user.startswith("u01") for user in found["users"])
    assert server.client.get("/v1/users/nobody").status_code == 404


def test_without_keys_reading_works_from_loopback_only_and_writing_not_at_all(runs):
    server = Server(runs / "first").wait()
    try:
        client = httpx.Client(base_url=server.url)
        assert client.post("/v1/recommend", json={"user_id": "u017"}).status_code == 200
        assert client.post("/v1/items", json={"id": "a", "title": "A"}).status_code == 403
        # A web page that points its own name at 127.0.0.1 must not read through the browser.
        foreign = client.get("/v1/items", headers={"Host": "evil.example"})
        assert foreign.status_code == 421
    finally:
        server.kill()


def test_a_public_address_without_keys_is_refused(runs):
    server = Server(runs / "first", "--host", "0.0.0.0")
    assert server.process.wait(SLOW_S) == 1
    assert "no API key is set" in server.errors


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(runs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(runs / "first", "--port", taken.getsockname()[1])
        assert server.process.wait(SLOW_S) == 1
    assert "cannot listen there: Address already in use" in server.errors
    assert "loading" not in server.errors


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ('{"user_id": "u017", "think": 65}', "/think", "less than or equal to 64"),
        ('{"user_id": "u017", "thnik": 2}', "/thnik", "there is no such field"),
        ('{"user_id": "u017"', "/", "not JSON at character 18"),
    ],
)
def test_a_wrong_value_is_named_by_its_pointer_alone(server, body, field, says):
    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/v1/recommend", content=body, headers=headers)
    assert answer.status_code == 422
    [error] = answer.json()["errors"]
    assert error["field"] == field
    assert says in error["detail"]


def test_json_without_its_content_type_says_what_is_missing(server):
    answer = server.client.post("/v1/recommend", content='{"user_id": "u017"}')
    assert "Content-Type: application/json" in answer.json()["detail"]


def test_ids_with_slashes_are_read_and_removed_and_removed_ones_are_not_suggested(own):
    server = Server(own / "first", keys=own / "keys").wait()
    try:
        new = {"id": "shelf/oak 3", "title": "Oak shelf"}
        assert server.client.post("/v1/items", json=new, headers=WRITE).status_code == 201
        address = "/v1/items/shelf%2Foak%203"
        assert server.client.get(address).json()["title"] == "Oak shelf"
        assert server.client.delete(address, headers=WRITE).status_code == 204
        gone = server.client.get(address)
        assert gone.status_code == 404
        assert gone.json()["detail"].count("shelf/oak 3") == 1
    finally:
        server.kill()


def test_pages_of_a_named_origin_may_call_and_others_may_not(runs, tmp_path):
    origin, foreign = "https://shop.example", "https://evil.example"
    server = Server(runs / "first", "--store", tmp_path, "--cors", origin).wait()
    try:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "Content-Type",
        }
        for one, allowed in ((origin, origin), (foreign, None)):
            headers = {"Origin": one}
            answer = server.client.options("/v1/recommend", headers={**headers, **asked})
            assert answer.headers.get("access-control-allow-origin") == allowed
            answer = server.client.get("/v1/items", headers=headers)
            assert answer.headers.get("access-control-allow-origin") == allowed
    finally:
        server.kill()
