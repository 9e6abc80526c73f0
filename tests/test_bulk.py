"""Files of users, answered or counted, whatever interrupts it and however many share the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_run import make_run

import streamctl as sc
from streamctl import bulk
from streamctl.bulk import count_transitions, recommend_files
from streamctl.config import TokenizeConfig, resolve
from streamctl.data import load_data
from streamctl.errors import StreamctlError, UsageError
from streamctl.retrieval.transitions import UNIT, Transitions
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize

QUESTION = {"k": 5, "device": "cpu"}
pytestmark = pytest.mark.xdist_group("bulk")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bulk") / "run")


@pytest.fixture(scope="module")
def users(run, tmp_path_factory):
    """130 rows in row groups of 50: users of the log, and two that nobody knows."""
    known = load_data(run)[1].log.user_ids
    ids = [*known[:100], "nobody", *known[:28], "nothing"]
    path = tmp_path_factory.mktemp("input") / "users.parquet"
    pq.write_table(pa.table({"age": range(len(ids)), "user_id": ids}), path, row_group_size=50)
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(bulk, "PART", 16)


@pytest.fixture(scope="module")
def whole(run, users, tmp_path_factory):
    """The answers to all users, in one go."""
    path = tmp_path_factory.mktemp("whole") / "whole.parquet"
    recommend_files(run, users, path, **QUESTION)
    return pq.read_table(path)


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def folder_of(users: Path, folder: Path) -> Path:
    """The same rows as three files in two folders."""
    table = pq.read_table(users)
    for name, first, last in (("a", 0, 40), ("b", 40, 90), ("more/c", 90, 130)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(first, last - first), folder / f"{name}.parquet")
    return folder


def test_every_row_gets_the_answer_that_it_would_get_alone(run, users, tmp_path, small_parts):
    output = tmp_path / "recs.parquet"
    summary = recommend_files(run, users, output, **QUESTION)
    assert summary["complete"] and (summary["rows"], summary["popular"]) == (130, 2)
    rows = rows_of(output)
    assert [row["user_id"] for row in rows] == pq.read_table(users)["user_id"].to_pylist()
    recommender = sc.load(run.path, device="cpu")
    for row in rows[::9]:
        alone = recommender.recommend(user=row["user_id"], k=5)
        assert row["items"] == alone["item_id"].to_pylist()
        assert row["scores"] == pytest.approx(alone["score"].to_pylist(), abs=1e-4)
        assert row["problem"] is None and row["method"] == "stream_sft"
    assert rows[100]["method"] == rows[129]["method"] == "popularity"
    assert rows[100]["items"] == rows[129]["items"] and len(rows[100]["items"]) == 5
    assert not output.with_name("recs.parquet.parts").exists()


def test_histories_may_be_given_and_count_before_users(run, tmp_path):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    catalog, split = load_data(run)
    items = catalog.ids
    histories = [items[:3], items[5:100], [], ["unheard-of"], None]
    users = ["stranger", "stranger", "stranger", "stranger", split.log.user_ids[0]]
    pq.write_table(pa.table({"history": histories, "user_id": users}), path)
    summary = recommend_files(run, path, output, **QUESTION)
    rows = rows_of(output)
    assert [bool(row["items"]) for row in rows] == [True, True, True, False, True]
    assert not set(rows[1]["items"]) & set(items[5:100])
    assert "unheard-of" in rows[3]["problem"]
    assert (summary["problems"], summary["popular"], summary["answered"]) == (1, 1, 4)


@pytest.mark.parametrize(
    ("written", "value", "kind"),
    [
        ("1", 1.0, pa.float64()),
        ("12345670000", 12345670000.0, pa.float64()),
        ("12345670000", Decimal("12345670000.000"), pa.decimal128(20, 3)),
        ("1.5", Decimal("1.500"), pa.decimal128(20, 3)),
        ("1" * 33, Decimal("1" * 33), pa.decimal128(38, 3)),
        ("7", 7, pa.int32()),
        ("007", "007", pa.string()),
        (" a b ", " a b ", pa.large_string()),
    ],
)
def test_ids_of_any_type_are_read_as_in_every_file(run, tmp_path, written, value, kind):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    pq.write_table(pa.table({"history": pa.array([[value]], pa.list_(kind))}), path)
    recommend_files(run, path, output, **QUESTION)
    assert f"'{written}'" in rows_of(output)[0]["problem"]


def test_rows_with_nulls_are_told_what_is_missing(run, tmp_path):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    known = load_data(run)[0].ids[0]
    histories = [None, [known, None], [None], [known]]
    table = {"history": pa.array(histories, pa.list_(pa.string())), "user_id": [None] * 4}
    pq.write_table(pa.table(table), path)
    assert recommend_files(run, path, output, **QUESTION)["problems"] == 3
    first, second, third, last = (row["problem"] for row in rows_of(output))
    assert "history" in first and "id 2 is empty" in second and "id 1 is empty" in third
    assert last is None


def test_a_killed_job_goes_on_where_it_was_and_ends_the_same(
    run, users, whole, tmp_path, small_parts
):
    output = tmp_path / "recs.parquet"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from streamctl import bulk; from streamctl.runs import RunDir\n"
        "bulk.PART, answer, made = 16, bulk.Job.answer, []\n"
        "def answer_and_die(*given):\n"
        "    made.append(answer(*given))\n"
        "    if len(made) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return made[-1]\n"
        "bulk.Job.answer = answer_and_die\n"
        "run, source, output = map(Path, sys.argv[1:])\n"
        "bulk.recommend_files(RunDir(run), source, output, k=5, device='cpu')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, run.path, users, output])
    assert killed.returncode == -signal.SIGKILL
    parts = output.with_name("recs.parquet.parts")
    assert not output.exists() and len(list(parts.glob("part-*"))) == 3
    summary = recommend_files(run, users, output, **QUESTION)
    assert summary["rows"] == 130 - 3 * 16
    assert pq.read_table(output).equals(whole)


def test_a_complete_job_is_left_alone_and_another_question_is_a_new_job(run, users, tmp_path):
    output = tmp_path / "recs.parquet"
    recommend_files(run, users, output, **QUESTION)
    before = output.stat().st_mtime_ns
    again = recommend_files(run, users, output, **QUESTION)
    assert again["rows"] == 0 and again["complete"]
    assert output.stat().st_mtime_ns == before
    recommend_files(run, users, output, k=2, device="cpu")
    assert {len(row["items"]) for row in rows_of(output) if not row["problem"]} == {2}
    recommend_files(run, users, output, k=2, method="popularity", device="cpu")
    assert {row["method"] for row in rows_of(output)} == {"popularity"}
    with pytest.raises(UsageError, match="unknown method 'popular'; did you mean popularity"):
        recommend_files(run, users, output, method="popular", device="cpu")
    with pytest.raises(StreamctlError, match=r"none\.parquet: no such file\. Next: --input"):
        recommend_files(run, tmp_path / "none.parquet", output, **QUESTION)


def test_a_folder_is_answered_file_by_file_and_only_what_is_new(run, users, whole, tmp_path):
    source, output = folder_of(users, tmp_path / "users"), tmp_path / "recs"
    summary = recommend_files(run, source, output, **QUESTION)
    assert summary["complete"] and summary["rows"] == 130
    names = ("a", "b", "more/c")
    answers = [pq.read_table(output / f"{name}.parquet") for name in names]
    assert pa.concat_tables(answers).equals(whole)
    shutil.copy(source / "a.parquet", source / "d.parquet")
    assert recommend_files(run, source, output, **QUESTION)["rows"] == 40
    (output / "b.parquet").unlink()
    assert recommend_files(run, source, output, **QUESTION)["rows"] == 50
    with pytest.raises(UsageError, match="inside the input"):
        recommend_files(run, source, source / "recs", **QUESTION)
    with pytest.raises(UsageError, match=r"recs\.csv: it is written as parquet.*recs\.parquet"):
        recommend_files(run, users, tmp_path / "recs.csv", **QUESTION)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(StreamctlError, match=r"no \.parquet file"):
        recommend_files(run, tmp_path / "nothing", output, **QUESTION)


def test_ids_that_are_numbers_are_read_as_in_logs(tmp_path):
    rows = [(user, (user + step) % 9, step) for user in range(12) for step in range(6)]
    log = dict(
        zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True)
    )
    sc.prepare(pa.table(log), None, tmp_path / "run", min_item=1)
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"history": [[1, 2], None], "user_id": [None, 3]}), path)
    run = bulk.RunDir(tmp_path / "run")
    recommend_files(run, path, tmp_path / "recs", method="popularity", **QUESTION)
    first, second = rows_of(tmp_path / "recs")
    assert not {"1", "2"} & set(first["items"]) and len(first["items"]) == 5
    assert not {*"345678"} & set(second["items"]) and second["problem"] is None


def test_two_torchrun_workers_write_what_one_does(run, users, whole, tmp_path):
    output = tmp_path / "recs.parquet"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "streamctl", "--", "recommend", "-k", "5", "--json"]
    paths = ["--run", run.path, "--input", users, "--output", output, "--device", "cpu"]
    done = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STREAMCTL_COMPILE": "wait"},  # as `whole` was
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["rows"], first["world_size"], first["complete"]) == (130, 2, True)
    assert pq.read_table(output).equals(whole)


def write_damaged(path: Path) -> None:
    """Users in a file whose pages cannot be read, though its end can."""
    pq.write_table(pa.table({"user_id": [f"u{n:03}" for n in range(150)]}), path)
    content = bytearray(path.read_bytes())
    content[4:300] = bytes(296)
    path.write_bytes(content)


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
        write_damaged(path)
    with pytest.raises(StreamctlError, match=r"users\.parquet"):
        recommend_files(run, path, tmp_path / "recs.parquet", **QUESTION)


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """90 users' items in the files of a folder, and the same as counted at once takes them."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    lists = [rng.integers(0, 12, rng.integers(0, 25)).tolist() for _ in range(90)]
    (folder / "more").mkdir()
    for name, part in (("a", lists[:40]), ("b", lists[40:43]), ("more/c", lists[43:])):
        ids = [None, *([f"i{item:02}" for item in row] for row in part)]
        ids[1].append(None)
        table = pa.table({"history": pa.array(ids, pa.list_(pa.string()))})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    offsets = np.cumsum([0, *map(len, lists)])
    return folder, (np.concatenate(lists).astype(np.int32), offsets)


def assert_counted_at_once(path: Path, sequences: tuple[np.ndarray, np.ndarray], keep: int) -> None:
    """A table of counts holds the arrays of `Transitions.count`, to the bit."""
    whole, table = Transitions.count(*sequences, 12, keep), pq.read_table(path)
    first = np.repeat(np.arange(12), whole.followers.sizes)
    expected = (first, *whole.followers.columns, whole.totals[first])
    for name, values in zip(table.column_names, expected, strict=True):
        if name in ("item", "next"):
            assert table[name].to_pylist() == [f"i{item:02}" for item in values]
        else:
            np.testing.assert_array_equal(table[name].to_numpy() * UNIT, values)


@pytest.mark.parametrize("keep", [5, 1024])
def test_counts_of_parts_sum_to_those_of_all_users_at_once(histories, tmp_path, small_parts, keep):
    folder, sequences = histories
    output = tmp_path / "counts.parquet"
    summary = count_transitions(folder, output, keep=keep)
    assert (summary["rows"], summary["complete"]) == (93, True)
    assert_counted_at_once(output, sequences, keep)
    assert not (tmp_path / "counts.parquet.parts").exists()
    assert count_transitions(folder, output, keep=keep)["rows"] == 0

    single = tmp_path / "log.parquet"
    names = ("a", "b", "more/c")
    tables = [pq.read_table(folder / f"{name}.parquet") for name in names]
    pq.write_table(pa.concat_tables(tables), single)
    assert count_transitions(single, output, keep=keep)["rows"] == 93
    assert_counted_at_once(output, sequences, keep)


def test_counts_of_a_job_that_stopped_go_on(histories, tmp_path, monkeypatch):
    count, made = bulk._count, []

    def stop(part: bulk.Part):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part)
        return count(part)

    monkeypatch.setattr(bulk, "_count", stop)
    with pytest.raises(KeyboardInterrupt):
        count_transitions(histories[0], tmp_path / "counts.parquet")
    monkeypatch.setattr(bulk, "_count", count)
    rest = count_transitions(histories[0], tmp_path / "counts.parquet")["rows"]
    assert rest == 93 - sum(part.end - part.first for part in made)
    assert_counted_at_once(tmp_path / "counts.parquet", histories[1], 1024)


def test_counts_need_lists_and_may_be_empty(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u1"], "history": ["i1"]}), path)
    with pytest.raises(StreamctlError, match="not lists of item ids"):
        count_transitions(path, tmp_path / "counts.parquet")
    pq.write_table(pa.table({"history": pa.array([None, []], pa.list_(pa.int64()))}), path)
    count_transitions(path, tmp_path / "counts.parquet")
    found = pq.read_table(tmp_path / "counts.parquet")
    assert (found.column_names, len(found)) == (["item", "next", "count", "total"], 0)


def test_an_input_where_the_parts_would_be_removed_is_refused_and_stays(run, tmp_path):
    folder = tmp_path / "log.parts"
    folder.mkdir()
    path = folder / "users.parquet"
    pq.write_table(pa.table({"history": [["i01", "i02"]]}), path)
    for source in (folder, path):
        with pytest.raises(UsageError, match=r"the parts of --output .* are kept and removed"):
            count_transitions(source, tmp_path / "log")
    with pytest.raises(UsageError, match="are kept and removed"):
        recommend_files(run, path, tmp_path / "log", method="popularity", **QUESTION)
    assert list(folder.iterdir()) == [path] and not (tmp_path / "log").exists()
    assert recommend_files(run, folder, tmp_path, method="popularity", **QUESTION)["complete"]


def test_an_output_that_is_the_input_is_refused_and_the_input_stays(run, users, tmp_path):
    path = Path(shutil.copy(users, tmp_path / "users.parquet"))
    before = path.read_bytes()
    for make in (count_transitions, partial(recommend_files, run, method="popularity", k=5)):
        with pytest.raises(UsageError, match="take the place of the input"):
            make(path, path)
    (tmp_path / "a" / "a").mkdir(parents=True)
    inner = Path(shutil.copy(users, tmp_path / "a" / "a" / "users.parquet"))
    shutil.copy(users, tmp_path / "a")
    with pytest.raises(UsageError, match=r"take the place of the input .*a/users\.parquet"):
        recommend_files(run, tmp_path / "a", tmp_path, method="popularity", k=5)
    assert path.read_bytes() == inner.read_bytes() == before


def test_answers_that_compare_vectors_are_made_anew_with_them(run, users, tmp_path, small_parts):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    ask = partial(recommend_files, copy, users, tmp_path / "out.parquet", method="popularity")
    assert ask(diversity=0.5)["rows"] == 130 and ask(diversity=0.5)["rows"] == 0
    config = resolve(TokenizeConfig, base=copy.stage("tokenizer").manifest["config"], seed=5)
    tokenize(copy, config, device="cpu", force=True)
    assert ask(diversity=0.5)["rows"] == 130


def test_a_file_that_is_not_an_earlier_output_is_never_replaced(run, users, tmp_path):
    mine = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"mine": [1]}), mine)
    answer = partial(recommend_files, run, method="popularity", k=5)
    for make in (count_transitions, answer):
        with pytest.raises(UsageError, match=r"mine\.parquet is there already"):
            make(users, mine)
    folder = folder_of(users, tmp_path / "in")
    (tmp_path / "out").mkdir()
    shutil.copy(mine, tmp_path / "out" / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet is there already"):
        answer(folder, tmp_path / "out")
    assert rows_of(mine) == rows_of(tmp_path / "out" / "b.parquet") == [{"mine": 1}]
    with pytest.raises(UsageError, match="is a folder, and this makes a file"):
        answer(users, tmp_path / "out")
    with pytest.raises(UsageError, match="is a file, and this makes a folder"):
        answer(folder, mine)
    assert answer(users, tmp_path / "answers")["rows"] == 130
    assert answer(users, tmp_path / "answers", keep_seen=True)["rows"] == 130  # its own


def test_files_of_others_beside_the_parts_stay(histories, tmp_path):
    folder = tmp_path / "counts.parquet.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    pq.write_table(pa.table({"mine": [1]}), folder / "mine.parquet")
    (folder / "empty").mkdir()
    count_transitions(histories[0], folder / "other.parquet")
    count_transitions(histories[0], tmp_path / "counts.parquet")
    names = {"notes.txt", "mine.parquet", "empty", "other.parquet"}
    assert {path.name for path in folder.iterdir()} == names


def test_counts_below_a_folder_named_like_a_column_are_the_same(histories, tmp_path):
    output = tmp_path / "item=q" / "counts.parquet"
    output.parent.mkdir()
    count_transitions(histories[0], output)
    assert_counted_at_once(output, histories[1], 1024)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'streamctl[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=1 << 27)
    yield ray
    ray.shutdown()


def test_on_ray_no_row_is_lost_or_there_twice_when_a_worker_is_killed(
    run, users, whole, tmp_path, cluster, monkeypatch
):
    source, output = folder_of(users, tmp_path / "users"), tmp_path / "recs"
    mark = tmp_path / "killed"
    answer = bulk.Job.answer

    def answer_or_die(job: bulk.Job, part: bulk.Part):
        if part.source.name == "b.parquet" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(job, part)

    monkeypatch.setattr(bulk.Job, "answer", answer_or_die)
    summary = recommend_files(run, source, output, on_ray=True, **QUESTION)
    assert mark.exists() and summary["complete"] and summary["rows"] == 130
    answers = [pq.read_table(output / f"{name}.parquet") for name in ("a", "b", "more/c")]
    assert pa.concat_tables(answers).equals(whole)


def test_on_ray_no_count_is_lost_or_there_twice_when_a_worker_is_killed(
    histories, tmp_path, cluster, monkeypatch
):
    mark, count = tmp_path / "killed", bulk._count

    def count_or_die(part: bulk.Part):
        if part.source.name == "b.parquet" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return count(part)

    monkeypatch.setattr(bulk, "_count", count_or_die)
    summary = count_transitions(histories[0], tmp_path / "counts.parquet", on_ray=True)
    assert mark.exists() and summary["complete"] and summary["rows"] == 93
    assert_counted_at_once(tmp_path / "counts.parquet", histories[1], 1024)


def test_on_ray_an_error_is_told_as_it_would_be_here(run, tmp_path, cluster):
    path = tmp_path / "users.parquet"
    write_damaged(path)
    with pytest.raises(StreamctlError, match=r"users\.parquet: cannot be read"):
        recommend_files(run, path, tmp_path / "recs.parquet", on_ray=True, **QUESTION)
