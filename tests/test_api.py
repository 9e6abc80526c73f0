"""The Python API: tables in and out, by ids, with one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from serving_run import make_run
from typer.testing import CliRunner

import streamctl as sc
from streamctl import cli
from streamctl.baselines.train import train_baseline
from streamctl.commands.recommend import show
from streamctl.config import BaselineConfig
from streamctl.data import load_data
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import load_method
from streamctl.recommender import shortened
from streamctl.retrieval.transitions import pair_weights
from streamctl.runs import RunDir
from streamctl.serving.question import as_job
from streamctl.serving.schemas import Query
from streamctl.serving.store import Refused, Store
from streamctl.tokenizer import vectors

SERVING = ("fastapi", "starlette", "uvicorn", "prometheus_client", "httptools", "uvloop")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("api") / "run")


@pytest.fixture(scope="module")
def rec(run):
    return sc.load(run.path, device="cpu")


@pytest.fixture(scope="module")
def log():
    """A log and items of pandas: 12 users with 6 items each."""
    rows = [
        (f"u{user}", f"i{(user + step) % 9}", pd.Timestamp("2024-01-01") + pd.Timedelta(days=step))
        for user in range(12)
        for step in range(6)
    ]
    items = pd.DataFrame({"item_id": [f"i{n}" for n in range(9)], "title": "tea"})
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]), items


def hashes(run: sc.Run) -> dict[str, str]:
    return RunDir(run.path).stage("data").manifest["artifacts"]


def test_pandas_polars_arrow_and_files_make_the_same_data(log, tmp_path):
    frame, items = log
    frame.to_csv(tmp_path / "log.csv", index=False)
    items.to_csv(tmp_path / "goods.csv", index=False)
    made = [
        (frame, items),
        (frame.assign(user_id=frame["user_id"].astype("category")), items),
        (pl.from_pandas(frame).with_columns(pl.col("item_id").cast(pl.Categorical)), items),
        (pa.Table.from_pandas(frame), pl.from_pandas(items)),
        (tmp_path / "log.csv", tmp_path / "goods.csv"),
    ]
    runs = [
        sc.prepare(*tables, tmp_path / str(place), min_user=3, min_item=1)
        for place, tables in enumerate(made)
    ]
    assert runs[0].statistics["users"] == 12
    names = ("interactions.parquet", "users.parquet", "items.parquet")
    first = hashes(runs[0])
    assert all(hashes(run)[name] == first[name] for run in runs for name in names)


def test_whole_numbers_are_ids_as_in_files(tmp_path, log):
    frame = log[0].assign(item_id=log[0]["item_id"].str[1:].astype(int))
    run = sc.prepare(frame, None, tmp_path / "run", min_item=1)
    assert load_data(RunDir(run.path))[0].index("7") >= 0


def table(**columns):
    base = {"user_id": ["a"] * 6, "item_id": list("uvwxyz"), "timestamp": range(6)}
    return pd.DataFrame(base | columns)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([("a", "x", 1)], {}, "interactions: not a table but a list; give a pandas"),
        (pd.Series([1, 2]), {}, "interactions: not a table that Arrow can read"),
        (table(item_id=[1, "x", 2, 3, 4, 5]), {}, "interactions: not a table that Arrow can read"),
        (pd.DataFrame(), {}, "interactions: a table without columns"),
        (table().head(0), {}, "interactions: the table holds no interactions"),
        (table().rename(columns={"item_id": "itm_id"}), {}, 'Next: columns={"item": "NAME"}'),
        (table(item_id=["u", None, *"wxyz"]), {}, "interactions, row 2: item_id is empty"),
        (table(timestamp=["soon"] * 6), {}, "interactions, row 1: timestamp is 'soon'"),
        (table(timestamp=[[1]] * 6), {}, 'not times. Next: columns={"time": "NAME"}'),
        (table(), {"columns": {"usr": "user_id"}}, "did you mean user?"),
        (table(), {"columns": {"user": "who"}}, "no column who"),
        (table(), {"min_users": 3}, "unknown key 'min_users'"),
        (table(), {"seed": "now"}, "data.seed is 'now', which is not of type int"),
        ("nowhere.csv", {}, "nowhere.csv: no such file or folder"),
    ],
)
def test_a_table_that_cannot_be_used_gets_one_line(tmp_path, given, options, message):
    with pytest.raises(sc.StreamctlError) as error:
        sc.prepare(given, run=tmp_path / "run", **options)
    told = str(error.value)
    assert message in told
    assert "\n" not in told and "--" not in told and str(tmp_path) not in told


def test_items_of_the_wrong_kind_get_one_line(tmp_path, log):
    for items, message in ((pd.DataFrame({"name": ["x"]}), "items, row 1: no item id column"),
                           (log[1].head(0), "items: the table holds no items"),
                           (7, "items: not a table but a int")):  # fmt: skip
        with pytest.raises(sc.StreamctlError, match=message):
            sc.prepare(log[0], items, tmp_path / "run")


def test_another_table_needs_force(tmp_path, log):
    options = {"run": tmp_path / "run", "min_user": 3, "min_item": 1}
    sc.prepare(*log, **options)
    sc.prepare(*log, **options)
    with pytest.raises(sc.StreamctlError, match=r"changed since.*force=True"):
        sc.prepare(log[0].head(60), log[1], **options)
    assert sc.prepare(log[0].head(60), log[1], **options, force=True).statistics["users"] == 10


def test_a_mistake_in_fit_is_told_before_anything_is_trained(tmp_path, log):
    data = sc.prepare(*log, tmp_path / "run", min_user=3, min_item=1)
    for options, message in (({"pretrian": {"epochs": 2}}, "did you mean pretrain"),
                             ({"pretrain": {"epoch": 2}}, "did you mean epochs"),
                             ({"pretrain": 2}, "a stage with a table"),
                             ({"size": "huge"}, "tiny, small, paper")):  # fmt: skip
        with pytest.raises(sc.StreamctlError, match=message):
            sc.fit(data, **options)
    assert not (tmp_path / "run" / "tokenizer").exists()
    with pytest.raises(sc.StreamctlError, match="no such run"):
        sc.load(tmp_path / "none")
    with pytest.raises(sc.StreamctlError, match="unknown method 'stream_slt'"):
        sc.load(data, "stream_slt")


def test_answers_are_those_of_the_method_in_ids(run, rec):
    catalog, split = load_data(run)
    user = split.log.user_ids[3]
    seen = split.log.of(3).astype(np.int64)
    history = torch.from_numpy(seen[-split.history :])[None]
    found = load_method(run, "stream_sft", "cpu").recommend(
        history, 7, users=np.array([3]), think=4, exclude=[seen]
    )
    told = rec.recommend(user=user, k=7, think=4)
    assert told.column_names == ["item_id", "title", "score"]
    assert told["item_id"].to_pylist() == [catalog.ids[item] for item in found.items[0]]
    assert told["score"].to_pylist() == pytest.approx(found.scores[0].tolist())
    assert told.schema.metadata == {b"method": b"stream_sft"} and rec.method == "stream_sft"
    assert rec.history(user)["item_id"].to_pylist() == [catalog.ids[item] for item in seen]
    assert told.to_pandas()["title"].notna().all()


def test_seen_excluded_and_allowed_items(rec):
    ids = rec.recommend(["i001"], k=5)["item_id"].to_pylist()
    assert "i001" not in ids
    assert (
        ids[0] not in rec.recommend(["i001"], exclude=[ids[0], "sold out"])["item_id"].to_pylist()
    )
    only = rec.recommend(["i001"], k=1000, allow=["i001", *ids[2:4]])["item_id"].to_pylist()
    assert sorted(only) == sorted(ids[2:4])
    kept = rec.recommend(["i001"], k=1000, keep_seen=True)["item_id"].to_pylist()
    assert "i001" in kept and len(kept) == 120 == len(set(kept))


def test_ids_that_can_be_read_once_count_for_every_row(rec):
    users = pa.table({"user_id": rec.users[:3]})
    items = rec.recommend(user=rec.users[0], k=4)["item_id"].to_pylist()
    for key in ("exclude", "allow"):
        listed = rec.recommend_many(users, k=4, **{key: items})
        assert rec.recommend_many(users, k=4, **{key: iter(items)}).equals(listed)
    first = rec.recommend_many(users, k=4, exclude=iter(items))["items"].to_pylist()[0]
    assert not set(first) & set(items)


def test_histories_are_any_list_of_ids(rec):
    wanted = rec.recommend(["i001", "i005"]).to_pydict()
    for history in (("i001", "i005"), np.array(["i001", "i005"]), pd.Series(["i001", "i005"]),
                    pl.Series(["i001", "i005"]), pa.array(["i001", "i005"])):  # fmt: skip
        assert rec.recommend(history).to_pydict() == wanted


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "give a history"),
        ({"history": "i001"}, "history is 'i001'; give a list of ids"),
        ({"history": ["i001", None]}, "history: id 2 is empty"),
        ({"history": ["i001", "i9999"]}, "item 'i9999' is not in the catalogue"),
        ({"history": ["i001"], "allow": ["nothing"]}, "item 'nothing' is not in the catalogue"),
        ({"history": ["i001"], "k": 0}, "k is 0; it must be 1 to 1,000"),
        ({"history": ["i001"], "k": 1001}, "k is 1001"),
        ({"history": ["i001"], "k": None}, "k is None"),
        ({"history": ["i001"], "think": -1}, "think is -1; it must be 0 to 64"),
        ({"history": ["i001"], "think": 2.5}, "think is 2.5"),
    ],
)
def test_a_wrong_question_gets_one_line(rec, question, message):
    with pytest.raises(sc.StreamctlError) as error:
        rec.recommend(**question)
    assert message in str(error.value)


def test_a_history_of_no_items_gets_the_popular_ones(rec, run, capsys):
    told = rec.recommend([], k=4)
    counts = load_data(run)[1].popularity()
    assert told.schema.metadata[b"method"] == b"popularity"
    best = [load_data(run)[0].index(item) for item in told["item_id"].to_pylist()]
    assert counts[best].tolist() == sorted(counts, reverse=True)[:4]
    assert told.schema.metadata[b"note"] == b"popular items: the history is empty"
    assert "popular items: the history is empty" in capsys.readouterr().err
    assert rec.recommend(user="nobody", k=4).equals(told)
    assert len(rec.history("nobody")) == 0 == len(rec.explain(user="nobody"))


def test_a_table_of_users_is_answered_as_each_would_be_alone(rec):
    users = rec.users[:3]
    given = pl.DataFrame({
        "user_id": [*users, "nobody", None, None],
        "history": [None, ["i001", "i002"], None, None, [], ["i003", "unknown"]],
        "age": [1, 2, 3, 4, 5, 6],
    })  # fmt: skip
    told = rec.recommend_many(given, k=3)
    assert told.column_names == [
        "user_id",
        "history",
        "items",
        "scores",
        "method",
        "note",
        "problem",
    ]
    rows = told.to_pylist()
    alone = [rec.recommend(user=users[0], k=3), rec.recommend(["i001", "i002"], user=users[1], k=3),
             rec.recommend(user=users[2], k=3)]  # fmt: skip
    for row, one in zip(rows, alone, strict=False):
        assert row["items"] == one["item_id"].to_pylist() and row["problem"] is None
        assert row["scores"] == pytest.approx(one["score"].to_pylist(), rel=1e-4)
    assert [row["method"] for row in rows] == ["stream_sft"] * 3 + ["popularity"] * 2 + [None]
    assert [row["note"] for row in rows] == [
        None, None, None, "popular items: nothing is known of user 'nobody'",
        "popular items: the history is empty", None,
    ]  # fmt: skip
    assert rows[3]["problem"] is None and "unknown" in rows[5]["problem"]
    assert len(rec.recommend_many(given.head(0))) == 0
    with pytest.raises(sc.StreamctlError, match="no column user_id or history"):
        rec.recommend_many(given.select("age"))


def test_a_thought_is_told_in_words(rec):
    told = rec.explain(["i001", "i005", "i007"], k=4, think=6)
    assert told.column_names == ["item_id", "title", "hop", "weight", "reason", "ranking"]
    rows = told.to_pylist()
    assert len(rows) == 5 and rows[-1]["item_id"] is None and "more" in rows[-1]["reason"]
    weights = [row["weight"] for row in rows[:4]]
    assert weights == sorted(weights, reverse=True) and sum(
        row["weight"] for row in rows
    ) == pytest.approx(1, abs=1e-3)
    assert all(row["title"] in row["reason"] and "{" not in row["reason"] for row in rows[:4])
    answer = rec.recommend(["i001", "i005", "i007"], think=6)["item_id"].to_pylist()
    assert rows[-1]["ranking"] == answer


def test_a_title_is_cut_to_at_least_one_character(rec):
    assert shortened("abcdef", 3) == "ab…"
    with pytest.raises(UsageError, match="shorten is 0"):
        rec.explain(user=rec.users[0], shorten=0)


def test_a_method_that_does_not_think_is_explained_by_what_others_did(run):
    popular = sc.load(run.path, "popularity")
    rows = popular.explain(["i001", "i005"], k=100).to_pylist()
    best = popular.recommend(["i001", "i005"], k=100)["item_id"].to_pylist()
    assert rows and [row["item_id"] for row in rows] == [
        item for item in best if item in {row["item_id"] for row in rows}
    ]
    assert all(row["weight"] is None and row["title"] in row["reason"] for row in rows)
    assert len(popular.explain([])) == 0


def test_similar_items_are_those_of_like_texts_and_those_that_come_next(run, rec):
    catalog, split = load_data(run)
    place = catalog.index("i007")
    rows = rec.similar("i007", k=4).to_pylist()
    alike, after = rows[:4], rows[4:]
    cosines = vectors(run) @ vectors(run)[place]
    cosines[place] = -1
    assert [row["hop"] for row in rows] == ["alike"] * 4 + ["next"] * len(after)
    assert [row["score"] for row in alike] == pytest.approx(np.sort(cosines)[::-1][:4], abs=1e-5)
    items, offsets = split.training_sequences()
    counts, weights = np.zeros(split.n_items), pair_weights()
    for sequence in np.split(items, offsets[1:-1]):
        for first in np.flatnonzero(sequence == place):
            for step, other in enumerate(sequence[first + 1 : first + len(weights)], 1):
                counts[other] += weights[step]
    shares = np.sort(counts / counts.sum())[::-1][:4]
    assert [row["score"] for row in after] == pytest.approx(shares[: len(after)].tolist())
    assert after and counts[catalog.index(after[0]["item_id"])] == counts.max()
    with pytest.raises(sc.StreamctlError, match="not in the catalogue"):
        rec.similar("i9999")


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, streamctl;"
        "heavy = {'torch', 'numpy', 'pyarrow', 'duckdb', 'numba', 'streamctl.api'};"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("many", [False, True])
def test_recommend_needs_nothing_of_what_serving_needs(run, rec, tmp_path, many):
    words = ["recommend", "--run", str(run.path), "--device", "cpu", "--json"]
    if many:
        pq.write_table(pa.table({"user_id": rec.users[:2]}), tmp_path / "users.parquet")
        words += ["--input", str(tmp_path / "users.parquet"), "--output", str(tmp_path / "out")]
    else:
        words += ["--history", "i001,i005", "-k", "3"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({SERVING!r})); sys.argv[1:] = {words!r};"
        "from streamctl.cli import main; main()"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    if many:
        assert pq.read_table(tmp_path / "out")["items"].null_count == 0
        return
    told = json.loads(answer.stdout)
    assert told["items"] == rec.recommend(["i001", "i005"], k=3).to_pylist()
    assert [row["item_id"] for row in told["history"]] == ["i001", "i005"] and told["thought"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """A run of popularity alone; ids are numbers, and one item's id holds a comma."""
    path = tmp_path_factory.mktemp("numbers") / "run"
    rows = [(f"{user:02}", item, step) for user in range(8)
            for step, item in enumerate(["1", "2.0", " 7", "a,b", "3"])]  # fmt: skip
    names = ("user_id", "item_id", "timestamp")
    log = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    sc.prepare(pa.table(log), run=path, ids="number", min_user=3, min_item=1)
    train_baseline(RunDir(path), BaselineConfig(name="popularity"))
    return path


def test_ids_read_as_numbers_are_found_in_any_writing(counted, tmp_path):
    rec = sc.load(counted, "popularity")
    plain = rec.recommend(["7"], k=9, user="3")
    assert rec.recommend(["007"], k=9, user="0003").equals(plain)
    assert rec.recommend([], k=9, exclude=["01"])["item_id"].to_pylist().count("1") == 0
    assert rec.history("03").equals(rec.history("3")) and len(rec.history("3")) == 5
    store = Store(RunDir(counted), tmp_path)
    assert store.known(["007", "2"], "") == store.known(["7", "02.0"], "")
    assert store.user("03") == store.user("3") == store.user("3.0")
    store.take("0099", ["007"])
    assert store.user("99") == store.indexes(["7"])


def test_an_unknown_id_of_a_list_with_commas_is_told_how_to_give_such_ids(counted, capsys):
    told = CliRunner().invoke(
        cli.build_app(),
        ["recommend", "--run", str(counted), "--method", "popularity", "--history", "a,b"],
    )
    assert "give --history once for each id" in str(told.exception)
    for given in (["a,b", "7"], ["7", "a,b"]):
        words = [word for item in given for word in ("--history", item)]
        line = ["recommend", "--run", str(counted), "--method", "popularity", *words]
        assert CliRunner().invoke(cli.build_app(), line).exit_code == 0


def test_an_id_with_other_leading_zeros_is_told(tmp_path):
    rows = [(f"00{u}", f"00{(u + n) % 6}", n) for u in range(6) for n in range(5)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    data = sc.prepare(table, run=tmp_path / "run", min_user=3, min_item=1)
    rec = sc.load(data, "popularity")
    with pytest.raises(StreamctlError, match=r"'4' is not in the catalogue; did you mean 004[?]"):
        rec.recommend(["4"])
    note = rec.recommend(user="4").schema.metadata[b"note"].decode()
    assert note == "popular items: nothing is known of user '4'; did you mean 004?"
    with pytest.raises(Refused, match=r"no such item: 4; did you mean 004[?]"):
        Store(RunDir(data.path), tmp_path).known(["4"], "")


def test_a_user_in_the_wrong_case_gets_the_note_and_no_empty_history(run, rec):
    asked = ["recommend", "--run", str(run.path), "--user", rec.users[3].upper()]
    told = CliRunner().invoke(cli.build_app(), asked)
    assert f"did you mean {rec.users[3]}?" in told.stderr
    title, *table = told.stdout.splitlines()
    assert title.strip() == "Recommended (popularity of run)"
    assert not {"History", "thought"} & set(told.stdout.split())
    counts = [line.split()[-2] for line in table if line.startswith("│")]
    assert len(counts) == 10 and all(count.isdigit() for count in counts)


def test_a_thought_in_the_terminal_has_every_weight_and_short_titles(capsys):
    step = {"reason": "a", "first": "t", "ranking": ["i1", "i2"]}
    show({
        "run": "r", "method": "m", "note": None, "before": [{"item_id": "i2"}],
        "history": [{"item_id": "i0", "title": "t"}], "items": [],
        "thought": [step | {"weight": 0.046}, step | {"weight": 0.002}, step | {"weight": None}],
    })  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:9:2] == ["  1. a (5%)", "  2. a (<1%)", "  3. a"]
    assert lines[4].strip() == "top item now: t; 1 item entered the top 2"
    assert shortened("t" * 51, 50) == "t" * 49 + "…" and shortened("t" * 50, 50) == "t" * 50


def test_an_unknown_user_is_told_alike_by_every_door(counted, tmp_path):
    note = "popular items: nothing is known of user 'u-none'"
    rec = sc.load(counted, "popularity")
    assert rec.recommend(user="u-none").schema.metadata[b"note"].decode() == note
    many = rec.recommend_many(pa.table({"user_id": ["u-none"]}))
    assert many["note"].to_pylist() == [note]
    line = ["recommend", "--run", str(counted), "--method", "popularity", "--user", "u-none"]
    told = CliRunner().invoke(cli.build_app(), [*line, "--json"])
    answer = json.loads(told.stdout)
    assert (answer["note"], answer["method"], answer["history"]) == (note, "popularity", [])
    about = {"method": "popularity", "methods": ["popularity"]}
    job = as_job(Query(user_id="u-none"), Store(RunDir(counted), tmp_path), about)
    assert job.details["note"] == note
