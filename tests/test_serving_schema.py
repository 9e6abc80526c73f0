"""The server keeps its own OpenAPI description: generated requests, valid and not.

STREAMCTL_SCHEMA_EXAMPLES raises the number of cases an operation (20 here);
STREAMCTL_SCHEMA_COUNTS names a file that gets a line for each operation: its cases by status.
`python benchmarks/openapi.py` is the long campaign.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving_run import KEYS, make_run
from test_serving_http import Server

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = int(os.environ.get("STREAMCTL_SCHEMA_EXAMPLES", "20"))
OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/recommend/batch"),
    ("GET", "/v1/items"),
    ("GET", "/v1/items/{id}"),
    ("GET", "/v1/users"),
    ("GET", "/v1/users/{id}"),
    ("GET", "/v1/run"),
    ("POST", "/v1/items"),
    ("DELETE", "/v1/items/{id}"),
    ("POST", "/v1/reload"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]
pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    make_run(folder / "run", evidence=True)
    (folder / "keys").write_text(f"read {KEYS['read']}\nwrite {KEYS['write']}\n")
    server = Server(folder / "run", "--deadline-ms", 60000, keys=folder / "keys").wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_called(schema):
    known = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert known == set(OPERATIONS)


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
    server, schema, method, path, kind
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
        answer = case.call(base_url=server.url, headers=headers, timeout=120)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    try:
        run()
    finally:
        if counts := os.environ.get("STREAMCTL_SCHEMA_COUNTS"):
            line = {"operation": f"{method} {path}", "kind": kind, "statuses": statuses}
            with Path(counts).open("a") as handle:
                handle.write(json.dumps(line) + "\n")
    assert server.process.poll() is None
