"""`recommend --input`: a file of users, whatever interrupts it and however many share it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_run import make_run

from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.serving import bulk
from streamctl.serving.bulk import recommend_file
from streamctl.serving.engine import Engine
from streamctl.serving.question import as_job
from streamctl.serving.schemas import Query
from streamctl.serving.store import Store

QUERY = Query(user_id="each", k=5)
pytestmark = pytest.mark.xdist_group("bulk")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bulk") / "run")


@pytest.fixture(scope="module")
def users(run, tmp_path_factory):
    """130 rows in row groups of 50: every user of the log but some, and two that nobody knows."""
    known = load_data(run)[1].log.user_ids
    ids = [*known[:100], "nobody", *known[:28], "nothing"]
    path = tmp_path_factory.mktemp("input") / "users.parquet"
    pq.write_table(pa.table({"age": range(len(ids)), "user_id": ids}), path, row_group_size=50)
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(bulk, "PART", 16)


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_every_row_gets_the_answer_that_it_would_get_alone(run, users, tmp_path, small_parts):
    output = tmp_path / "recs.parquet"
    summary = recommend_file(run, users, output, QUERY, device="cpu")
    assert summary["complete"] and (summary["rows"], summary["popular"]) == (130, 2)
    rows = rows_of(output)
    assert [row["user_id"] for row in rows] == pq.read_table(users)["user_id"].to_pylist()
    store = Store(run)
    engine = Engine(run, store, device="cpu")
    for row in rows[::9]:
        job = as_job(Query(user_id=row["user_id"], k=5), store, engine.about())
        [alone] = engine.answer([job.details], *job.group)
        assert store.indexes(row["items"]) == [item for item, _ in alone["items"]]
        assert row["problem"] is None and row["note"] is None and row["method"] == "stream_sft"
        assert row["scores"] == pytest.approx([score for _, score in alone["items"]], abs=1e-4)
    assert "nobody" in rows[100]["note"] and rows[100]["method"] == "popularity"
    assert rows[100]["items"] == rows[129]["items"] and len(rows[100]["items"]) == 5
    assert not output.with_name("recs.parquet.parts").exists()


def test_histories_may_be_given_and_count_before_users(run, tmp_path):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    catalog, split = load_data(run)
    items = catalog.ids
    histories = [items[:3], items[5:300], [], ["unheard-of"], None]
    users = ["stranger", "stranger", "stranger", "stranger", split.log.user_ids[0]]
    pq.write_table(pa.table({"history": histories, "user_id": users}), path)
    summary = recommend_file(run, path, output, QUERY, device="cpu")
    rows = rows_of(output)
    assert [bool(row["items"]) for row in rows] == [True, True, True, False, True]
    assert [row["note"] is None for row in rows] == [True, True, False, True, True]
    assert not set(rows[1]["items"]) & set(items[5:])
    assert "history/0" in rows[3]["problem"]
    assert (summary["problems"], summary["popular"]) == (1, 1)


def test_a_job_keeps_what_had_changed_when_it_began(run, users, tmp_path, small_parts, monkeypatch):
    output = tmp_path / "recs.parquet"
    store, save, best = Store(run, tmp_path / "store"), bulk.Bulk.save, []
    monkeypatch.setattr(bulk, "Store", lambda run, **live: Store(run, tmp_path / "store", **live))

    def save_and_change(job, number, table):
        save(job, number, table)
        if number == 0:
            best.extend(table["items"][0].as_py()[:1])
            store.remove(best[0])

    monkeypatch.setattr(bulk.Bulk, "save", save_and_change)
    recommend_file(run, users, output, QUERY, device="cpu")
    assert any(best[0] in row["items"] for row in rows_of(output)[16:])
    monkeypatch.setattr(bulk.Bulk, "save", save)
    recommend_file(run, users, output, QUERY, device="cpu")
    assert not any(best[0] in row["items"] for row in rows_of(output))


def test_rows_with_nulls_are_told_which_value_is_missing(run, tmp_path):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    known = pq.read_table(run.path / "data" / "items.parquet")["item_id"][0].as_py()
    histories = [None, [known, None], [None], [known]]
    table = {"history": pa.array(histories, pa.list_(pa.string())), "user_id": [None] * 4}
    pq.write_table(pa.table(table), path)
    assert recommend_file(run, path, output, QUERY, device="cpu")["problems"] == 3
    problems = [row["problem"] for row in rows_of(output)]
    assert problems == ["user_id: is null", "history/1: is null", "history/0: is null", None]


def test_a_killed_job_goes_on_where_it_was_and_ends_the_same(run, users, tmp_path, small_parts):
    whole, output = tmp_path / "whole.parquet", tmp_path / "recs.parquet"
    recommend_file(run, users, whole, QUERY, device="cpu")
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from streamctl.runs import RunDir; from streamctl.serving import bulk\n"
        "from streamctl.serving.schemas import Query\n"
        "bulk.PART = 16\n"
        "save, saved = bulk.Bulk.save, []\n"
        "def save_and_die(*given):\n"
        "    saved.append(save(*given))\n"
        "    if len(saved) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "bulk.Bulk.save = save_and_die\n"
        "run, source, output = map(Path, sys.argv[1:])\n"
        "query = Query(user_id='each', k=5)\n"
        "bulk.recommend_file(RunDir(run), source, output, query, device='cpu')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, run.path, users, output])
    assert killed.returncode == -signal.SIGKILL
    parts = output.with_name("recs.parquet.parts")
    assert not output.exists() and len(list(parts.glob("part-*"))) == 3
    summary = recommend_file(run, users, output, QUERY, device="cpu")
    assert summary["rows"] == 130 - 3 * 16
    assert pq.read_table(output).equals(pq.read_table(whole))


def test_a_complete_job_is_left_alone_and_another_question_is_a_new_job(run, users, tmp_path):
    output = tmp_path / "recs.parquet"
    recommend_file(run, users, output, QUERY, device="cpu")
    before = output.stat().st_mtime_ns
    assert recommend_file(run, users, output, QUERY, device="cpu")["rows"] == 0
    assert output.stat().st_mtime_ns == before
    recommend_file(run, users, output, Query(user_id="each", k=2), device="cpu")
    assert {len(row["items"]) for row in rows_of(output) if not row["problem"]} == {2}


def test_two_torchrun_workers_write_what_one_does(run, users, tmp_path):
    whole, output = tmp_path / "whole.parquet", tmp_path / "recs.parquet"
    recommend_file(run, users, whole, QUERY, device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m"]
    words = [
        "streamctl",
        "--",
        "recommend",
        "--run",
        run.path,
        "--input",
        users,
        "--output",
        output,
    ]
    done = subprocess.run(
        [*command, *map(str, words), "-k", "5", "--json", "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["rows"], first["world_size"], first["complete"]) == (130, 2, True)
    assert pq.read_table(output).equals(pq.read_table(whole))


@pytest.mark.parametrize("damage", ["text", "columns", "type", "cut"])
def test_an_input_that_cannot_be_read_is_named(run, tmp_path, damage):
    path = tmp_path / "users.parquet"
    if damage == "text":
        path.write_text("user_id\nu001\n")
    elif damage == "columns":
        pq.write_table(pa.table({"customer": ["u001"]}), path)
    elif damage == "type":
        pq.write_table(pa.table({"history": ["u001"]}), path)
    else:
        pq.write_table(pa.table({"user_id": [f"u{n:03}" for n in range(150)]}), path)
        content = bytearray(path.read_bytes())
        content[4:300] = bytes(296)
        path.write_bytes(content)
    with pytest.raises(StreamctlError, match=r"users\.parquet"):
        recommend_file(run, path, tmp_path / "recs.parquet", QUERY, device="cpu")
