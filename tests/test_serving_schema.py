"""The server keeps its own OpenAPI description: generated requests, valid and not.

STREAMCTL_SCHEMA_EXAMPLES raises the number of cases an operation (20 here), and
STREAMCTL_SCHEMA_RECEIPT names a file that gets how they were answered.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving_process import Server
from serving_run import KEYS, make_run

from streamctl.provenance import provenance

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = int(os.environ.get("STREAMCTL_SCHEMA_EXAMPLES", "20"))
OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/recommend/batch"),
    ("GET", "/v1/items"),
    ("GET", "/v1/items/{id}"),
    ("GET", "/v1/items/{id}/similar"),
    ("GET", "/v1/users"),
    ("GET", "/v1/users/{id}"),
    ("GET", "/v1/run"),
    ("POST", "/v1/items"),
    ("POST", "/v1/interactions"),
    ("DELETE", "/v1/items/{id}"),
    ("DELETE", "/v1/users/{id}"),
    ("POST", "/v1/reload"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]
pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    make_run(folder / "run")
    (folder / "keys").write_text(f"read {KEYS['read']}\nwrite {KEYS['write']}\n")
    server = Server(folder / "run", keys=folder / "keys").wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_called(schema):
    known = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert known == set(OPERATIONS)


@pytest.fixture(scope="module")
def known(server):
    """Ids of some items and users."""
    items = server.client.get("/v1/items", params={"limit": 100}).json()["items"]
    users = server.client.get("/v1/users", params={"limit": 100}).json()["users"]
    return [item["id"] for item in items], users


@pytest.fixture(scope="module")
def counts(request):
    """Gets the cases of each operation by status."""
    began, operations = time.time(), []
    yield operations
    if receipt := os.environ.get("STREAMCTL_SCHEMA_RECEIPT"):
        statuses = sum((one["statuses"] for one in operations), Counter())
        told = {"name": "openapi", **provenance(), "passed": not request.session.testsfailed}
        told |= {"cases": statuses.total(), "statuses": dict(sorted(statuses.items()))}
        told["server_errors"] = sum(n for status, n in statuses.items() if status >= 500)
        told |= {"operations": operations, "wall_s": round(time.time() - began, 1)}
        Path(receipt).write_text(json.dumps(told, indent=1) + "\n")


def familiar(case, known: tuple[list[str], list[str]]) -> None:
    """Put known items, users and fields in the places of invented ones; the rest stays.

    That a query has a history or a user, and not both, is more than JSON schema says here. A
    deadline of a millisecond is answered with 504, which is right: none is kept.
    """
    items, users = known
    if isinstance(case.path_parameters, dict) and "id" in case.path_parameters:
        ids = users if "/users/" in case.path else items
        case.path_parameters["id"] = ids[len(case.path_parameters["id"]) % len(ids)]
    body = case.body if isinstance(case.body, dict) else {}
    if case.path == "/v1/interactions" and body.get("items"):
        body["items"] = [items[n % len(items)] for n, _ in enumerate(body["items"])]
    for query in body.get("requests", [body]) if case.path.startswith("/v1/recommend") else ():
        size = len(json.dumps(query))
        for name in ("history", "allow", "deny"):
            if query.get(name):
                query[name] = [items[(size + n) % len(items)] for n in range(len(query[name]))]
        query["deadline_ms"] = None
        if query.get("history"):
            query["user_id"] = None
        else:
            query |= {"history": None, "user_id": users[size % len(users)]}
        query["method"] = ("auto", "stream_pt", "popularity")[size % 3]
        if query.get("filter"):
            query["filter"] = {"brand": next(iter(query["filter"].values()))}


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        (*operation, kind)
        for kind in ("positive", "negative")
        for operation in OPERATIONS
        if kind == "positive" or operation[1] not in ("/healthz", "/readyz")  # nothing to get wrong
    ],
)
def test_no_request_breaks_the_server_and_every_answer_is_described(
    server, schema, known, counts, method, path, kind
):
    from schemathesis import GenerationMode, checks

    operation = schema[path][method]
    cases = operation.as_strategy(generation_mode=GenerationMode(kind))
    wanted = [checks.not_a_server_error, checks.status_code_conformance]
    wanted += [checks.content_type_conformance, checks.response_schema_conformance]
    headers = {"Authorization": f"Bearer {KEYS['write']}"}
    few = 5 if path in ("/v1/reload", "/v1/run", "/metrics") else EXAMPLES
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=few,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case):
        # Every second valid request speaks of things that are there: the model has work to do.
        if kind == "positive" and method != "DELETE" and statuses.total() % 2:
            familiar(case, known)
        answer = case.call(base_url=server.url, headers=headers, timeout=120)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    try:
        run()
    finally:
        counts.append({"operation": f"{method} {path}", "kind": kind, "statuses": statuses})
    assert server.process.poll() is None
    if kind == "positive" and path.startswith("/v1/recommend"):
        assert statuses[200] > EXAMPLES / 10
