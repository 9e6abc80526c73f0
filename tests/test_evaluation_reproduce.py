"""`reproduce`: a run and a receipt a seed, nothing done twice, means and intervals over seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_baselines import write_cycle

from streamctl.commands.reproduce import _show
from streamctl.config import RerankConfig, TokenizeConfig
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation import reproduce as module
from streamctl.evaluation.receipts import (
    COLUMNS,
    LAST,
    PUBLISHED,
    _table_row,
    save_receipts,
    write_table,
)
from streamctl.evaluation.reproduce import Plan, check_receipt, reproduce
from streamctl.evaluation.rerank import rerank
from streamctl.ranking import bootstrap_mean, bootstrap_seeds
from streamctl.runs import RunDir

METHODS = ("popularity", "transitions", "gru4rec", "tiger")
SETS = (
    "baseline.epochs=2", "gru4rec.dim=8", "eval.beam=4", "eval.bootstrap=50", "rerank.trees=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from streamctl.tokenizer.stage import tokenize

    pytest.importorskip("lightgbm")
    run = write_cycle(tmp_path_factory.mktemp("reproduce") / "run")
    config = TokenizeConfig(encoder="tfidf", dim=8, method="rqkmeans", levels=3, codes=4)
    tokenize(run, config)
    return run


@pytest.fixture(scope="module")
def plan():
    return Plan(METHODS, (0, 1), "tiny", SETS, device="cpu")


@pytest.fixture(scope="module")
def table(run, plan):
    return reproduce(run, plan)


def test_the_table_has_a_row_a_method_bare_and_re_ranked(table):
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row["seeds"] == 2
        assert {*COLUMNS, "ndcg@10_masked", "rerank_ndcg@10", "rerank_ndcg@10_masked"} <= set(row)
        assert all(row[key] is not None for key in (*COLUMNS, "rerank_ndcg@10", "train_s"))
    assert "vs_tiger" not in rows["tiger"]
    for key in ("vs_tiger", "vs_transitions", "rerank_vs_tiger+rerank"):
        low, high = rows["gru4rec"][key]
        assert low <= high


def test_methods_re_ranked_together_have_a_row_without_bare_figures():
    metrics = dict.fromkeys(COLUMNS, 0.2)
    entry = {**metrics, "masked": metrics, "train_s": 3.0, "ms_per_user": 1.0, "prefixes": 9}
    entries = {"a": [entry], "a+b+rerank": [entry | {"ndcg@10": 0.3}]}
    masked = {name: {0: np.array([0.0, 1.0, 0.5])} for name in entries}
    row = _table_row("a+b", entries, masked, None, None)
    assert row["ndcg@10"] is None and row["rerank_ndcg@10"] == 0.3 and row["train_s"] == 3
    assert (row["seeds"], row["rerank_seeds"]) == (1, 1)
    assert "ndcg@10_masked_95" not in row and "rerank_ndcg@10_masked_95" in row


def test_a_seeds_receipt_says_how_everything_was_made(run, table):
    for seed in (0, 1):
        path = run.path / "reproduce" / "receipts" / f"seed-{seed}.json"
        receipt = json.loads(path.read_text())
        assert receipt["data_hash"] == run.stage("data").hash and receipt["versions"]["torch"]
        made = receipt["stages"]["baselines/gru4rec"]
        assert (made["config"]["dim"], made["config"]["epochs"], made["seed"]) == (8, 2, seed)
        with np.load(path.with_suffix(".npz")) as ranks:
            assert {"gru4rec", "gru4rec/masked", "gru4rec+rerank/masked"} <= set(ranks)


def test_what_is_there_is_not_made_again_and_a_new_method_costs_itself_alone(
    run, plan, table, monkeypatch, tmp_path
):
    from streamctl.evaluation import stage

    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    asked, real = [], stage.evaluate

    def watched(*arguments, title, **options):
        asked.append(title)
        return real(*arguments, title=title, **options)

    monkeypatch.setattr(stage, "evaluate", watched)
    assert reproduce(copy, plan)["rows"] == table["rows"] and not asked
    more = Plan((*METHODS, "knn"), (0,), "tiny", SETS, device="cpu")
    rows = {row["method"]: row for row in reproduce(copy, more)["rows"]}
    assert rows["knn"]["seeds"] == 1 and rows["gru4rec"]["seeds"] == 2
    assert asked and all("knn" in title for title in asked)


def test_what_was_made_from_a_model_that_changed_is_made_again(run, plan, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    job = RunDir(copy.path / "reproduce" / "seed-0")
    rerank(job, RerankConfig(methods=("transitions", "gru4rec"), trees=20), device="cpu")
    before = job.stage("rerank/gru4rec").hash, job.stage("rerank/transitions").hash
    shutil.rmtree(job.stage("baselines/gru4rec").path)
    sets = (*SETS, "gru4rec.epochs=1")
    reproduce(copy, Plan(("gru4rec",), (0,), "tiny", sets, device="cpu"))
    for name in ("rerank/gru4rec", "rerank/transitions+gru4rec", "eval"):
        assert not job.stage(name).outdated
    assert job.stage("rerank/gru4rec").hash != before[0]
    assert job.stage("rerank/transitions").hash == before[1]


def test_another_setting_is_refused_with_the_command_that_changes_it(run, table):
    other = Plan(("gru4rec",), (0,), "tiny", ("gru4rec.dim=16",), device="cpu")
    with pytest.raises(StreamctlError, match="complete with other settings") as error:
        reproduce(run, other)
    assert "baseline gru4rec" in error.value.run and "seed-0" in error.value.run


def test_a_receipt_is_repeated_to_the_last_figure_and_a_changed_one_is_not(run, table, tmp_path):
    source = run.path / "reproduce" / "receipts" / "seed-1.json"
    receipt = json.loads(source.read_text())
    keep = ("popularity", "transitions", "transitions+rerank")
    receipt["rows"] = {name: receipt["rows"][name] for name in keep}
    stages = ("tokenizer", "baselines/transitions", "rerank/transitions")
    receipt["stages"]["eval"]["config"]["methods"] = list(keep)
    receipt["stages"] = {name: receipt["stages"][name] for name in (*stages, "eval")}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(receipt))
    found = check_receipt(run, path, device="cpu")
    assert not found["differences"] and found["figures"] > 40
    assert [name for name in found["stages"] if name != "eval"] == []
    receipt["rows"]["transitions"]["ndcg@10"] += 1e-9
    path.write_text(json.dumps(receipt))
    assert [each["metric"] for each in check_receipt(run, path)["differences"]] == ["ndcg@10"]
    receipt["data_hash"] = "0"
    path.write_text(json.dumps(receipt))
    with pytest.raises(StreamctlError, match="other data"):
        check_receipt(run, path)


def test_ranks_of_another_receipt_are_noticed(run, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    receipts = copy.path / "reproduce" / "receipts"
    shutil.copy(receipts / "seed-0.npz", receipts / "seed-1.npz")
    with pytest.raises(StreamctlError, match="not the ranks of seed-1"):
        write_table(copy)


def test_masked_ranks_are_compared_with_their_receipt_too(run, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    path = copy.path / "reproduce" / "receipts" / "seed-1.npz"
    with np.load(path) as file:
        ranks = dict(file)
    ranks["transitions/masked"][:] = LAST
    np.savez(path, **ranks)
    with pytest.raises(StreamctlError, match="not the ranks of seed-1"):
        write_table(copy)


def test_a_mean_over_seeds_of_other_settings_is_warned_of(run, table, tmp_path, capsys):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    path = copy.path / "reproduce" / "receipts" / "seed-1.json"
    receipt = json.loads(path.read_text())
    receipt["stages"]["baselines/gru4rec"]["config"]["epochs"] = 9
    path.write_text(json.dumps(receipt))
    write_table(copy)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1
    assert (
        "baselines/gru4rec has other settings in seed-1.json than in seed-0.json (epochs)" in said
    )


def test_a_setting_of_a_method_that_is_not_trained_is_told_of(run, capsys):
    Plan(("popularity",), sets=("tiger.epochs=3", "baseline.epochs=2")).check()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1 and "tiger is not one of the methods" in said


def test_the_letters_rows_come_last_with_the_figures_in_print(run, table, tmp_path, monkeypatch):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    receipts = copy.path / "reproduce" / "receipts"
    receipt = json.loads((receipts / "seed-0.json").read_text())
    receipt["rows"] = {"letter_stream_rl": receipt["rows"]["tiger"]}
    (receipts / "letter-0.json").write_text(json.dumps(receipt))
    with np.load(receipts / "seed-0.npz") as ranks:
        own = {f"letter_stream_rl{end}": ranks[f"tiger{end}"] for end in ("", "/masked")}
    np.savez(receipts / "letter-0.npz", **own)
    figures = (0.1, 0.2, 0.3, 0.4)
    monkeypatch.setitem(PUBLISHED, table["data"], {"stream_rl": figures})
    rows = write_table(copy)["rows"]
    assert rows[-1]["method"] == "letter_stream_rl"
    assert tuple(rows[-1]["published"].values()) == figures
    assert rows[0]["vs_letter_stream_rl"]
    receipt["users"] += 1
    (receipts / "letter-0.json").write_text(json.dumps(receipt))
    with pytest.raises(StreamctlError, match="different data or users"):
        write_table(copy)


def test_receipts_are_saved_with_their_table(run, table, tmp_path):
    save_receipts(run, tmp_path)
    assert json.loads((tmp_path / "table-run.json").read_text())["rows"] == table["rows"]
    assert len(list((tmp_path / "run").iterdir())) == 4


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(("gru4rek",)), "did you mean gru4rec"),
        (Plan(("tiger",), sets=("sasrec_cd.dim=2",)), "did you mean sasrec_c"),
        (Plan(("tiger",), sets=("baseline.dimm=2",)), "no baseline has such a setting"),
        (Plan(("popularity",), sets=("popularity.foo=1",)), "foo"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_done(run, plan, message):
    with pytest.raises(UsageError, match=message):
        reproduce(run, plan)


def test_the_budget_stops_before_the_next_stage(run, tmp_path, monkeypatch):
    copy = write_cycle(tmp_path / "run")
    shutil.copytree(run.stage("tokenizer").path, copy.path / "tokenizer")
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    found = reproduce(copy, Plan(("gru4rec",), (0,), "tiny", SETS, budget=0.1, device="cpu"))
    assert found["rows"] == []
    assert not RunDir(copy.path / "reproduce" / "seed-0").stage("baselines/gru4rec").complete


def test_seeds_that_differ_widen_the_interval():
    random = np.random.default_rng(0)
    users = random.normal(size=500)
    seeds = [[users, users, users], [users - 1, users, users + 1]]
    same, apart = bootstrap_seeds(np.array(seeds))
    alone = bootstrap_mean(users)
    assert same.high - same.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert apart.high - apart.low > 3 * (alone.high - alone.low)
    assert apart.mean == pytest.approx(users.mean())


def test_the_printed_table_fits_80_columns_and_says_less_than_its_json(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    file = Path(__file__).parents[1] / "benchmarks" / "results" / "table-scientific.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    _show(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    printed: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("│"):
            cell, rest = line.strip("│").split("│", 1)
            name = cell.strip()
            if name.startswith("+"):  # goes on the name above
                printed[-1] = (printed[-1][0] + name, printed[-1][1])
            else:
                printed.append((name, rest))
    assert [name for name, _ in printed] == [row["method"] for row in table["rows"]]
    for row, (_, rest) in zip(table["rows"], printed, strict=True):
        figure = row["rerank_ndcg@10_masked"] if "+" in row["method"] else row["ndcg@10_masked"]
        assert f"{figure:.4f}" in rest
