"""`reproduce`: a receipt a job, nothing done twice, a table with means, spreads and intervals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_baselines import write_cycle

from streamctl.config import BaselineConfig, TokenizeConfig
from streamctl.data import load_data
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation import reproduce as module
from streamctl.evaluation.jobs import Plan, job_path
from streamctl.evaluation.reproduce import (
    COLUMNS,
    ranks_path,
    receipt_path,
    reproduce,
    save_receipts,
)
from streamctl.ranking import ranking_metrics
from streamctl.runs import RunDir

METHODS = ("popularity", "sasrec_bce", "sasrec_ce", "tiger")
SETS = ("baseline.epochs=2", "eval.beam=4", "eval.bootstrap=50", "eval.users=40")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from streamctl.tokenizer.stage import tokenize

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


def test_the_table_has_a_row_a_method_with_the_documented_keys(table):
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row["seeds"] == 2
        assert {*COLUMNS, "ndcg@10_masked", "ms_per_user"} <= row.keys()
        low, high = row["ndcg@10_spread"]
        assert low <= row["ndcg@10"] <= high
    assert rows["tiger"]["vs_tiger"] is None
    assert rows["tiger"]["vs_sasrec_ce"][0] <= rows["tiger"]["vs_sasrec_ce"][1]
    assert rows["sasrec_bce"]["vs_tiger"] is not None


def test_every_job_has_a_receipt_that_says_how(run, table):
    for name in METHODS:
        for seed in (0, 1):
            receipt = json.loads(receipt_path(run, name, seed).read_text())
            assert receipt["data_hash"] == run.stage("data").hash
            assert receipt["rows"][name]["masked"]["ndcg@10"] >= 0
            assert receipt["versions"]["torch"]
    receipt = json.loads(receipt_path(run, "sasrec_bce", 1).read_text())
    assert receipt["stages"]["baselines/sasrec"]["config"]["loss"] == "bce"
    assert receipt["stages"]["baselines/sasrec"]["config"]["seed"] == 1


def test_what_has_a_receipt_is_not_done_again(run, plan, table, monkeypatch):
    monkeypatch.setattr(module, "run_job", lambda *_: pytest.fail("a finished job ran again"))
    assert reproduce(run, plan)["rows"] == table["rows"]


def test_receipts_outlive_settings_of_other_stages_and_sizes_they_do_not_have(
    run, plan, table, monkeypatch
):
    monkeypatch.setattr(module, "run_job", lambda *_: pytest.fail("a finished job ran again"))
    classic = tuple(name for name in METHODS if name != "tiger")
    other = Plan(classic, (0, 1), "paper", (*SETS, "rl.steps=3"), device="cpu")
    assert len(reproduce(run, other)["rows"]) == len(classic)


def test_the_ranks_beside_a_receipt_are_those_of_its_evaluation(run, table):
    for name in METHODS:
        job, receipt = job_path(run, name, 1), receipt_path(run, name, 1)
        entry = json.loads(receipt.read_text())["rows"][name]
        exact = load_file(job.stage("eval").file("ranks.safetensors"))[entry["row"]]
        with np.load(ranks_path(receipt)) as kept:
            assert set(kept) == {name, f"{name}/masked"}
            assert len(kept[name]) == 40 < load_data(run)[1].log.n_users
            assert (kept[name] == np.minimum(exact, 255)).all()
            assert ranking_metrics(kept[name])["ndcg@10"] == entry["ndcg@10"]


def test_jobs_of_several_seeds_rank_the_same_users(run, table):
    users = [
        load_file(job_path(run, "popularity", seed).stage("eval").file("ranks.safetensors"))[
            "users"
        ]
        for seed in (0, 1)
    ]
    assert (users[0] == users[1]).all()


def test_a_finished_job_of_another_plan_is_refused_and_nothing_is_lost(run, plan, table):
    before = {path: path.read_bytes() for path in (run.path / "reproduce").rglob("*.json")}
    told = (
        r"sasrec_bce, seed 0 was made by another plan \(baseline.epochs 2 then, 200 now\)"
        r".*--force"
    )
    other = Plan(("sasrec_bce",), (0,), "tiny", SETS[1:], device="cpu")
    with pytest.raises(StreamctlError, match=told):
        reproduce(run, other)
    with pytest.raises(StreamctlError, match=r"tiger, seed 1 .*baseline.size tiny then, small now"):
        reproduce(run, Plan(("tiger",), (1,), "small", SETS, device="cpu"))
    assert {path: path.read_bytes() for path in before} == before


def test_force_does_it_again_and_keeps_the_old_one(run, plan, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    old = receipt_path(copy, "popularity", 0).read_text()
    ranks = ranks_path(receipt_path(copy, "popularity", 0)).read_bytes()
    other = Plan(("popularity",), (0,), "tiny", ("eval.users=20",), device="cpu")
    reproduce(copy, other, force=True)
    previous = copy.path / "reproduce" / "popularity-0.previous"
    assert (previous / "receipt.json").read_text() == old
    assert (previous / "receipt.npz").read_bytes() == ranks
    assert json.loads(receipt_path(copy, "popularity", 0).read_text())["users"] == 20


def test_a_receipt_without_ranks_has_figures_and_no_intervals(run, plan, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    assert table_rows(copy, plan)["sasrec_bce"]["vs_sasrec_ce"] is not None
    for seed in (0, 1):
        ranks_path(receipt_path(copy, "sasrec_ce", seed)).unlink()
    rows = table_rows(copy, plan)
    assert rows["sasrec_bce"]["vs_sasrec_ce"] is rows["sasrec_ce"]["vs_tiger"] is None
    assert rows["sasrec_ce"]["ndcg@10"] == next(
        row["ndcg@10"] for row in table["rows"] if row["method"] == "sasrec_ce"
    )


def test_an_interval_is_of_all_the_seeds_that_its_row_is_of(run, plan, table, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    ranks_path(receipt_path(copy, "sasrec_ce", 1)).unlink()
    rows = table_rows(copy, plan)
    assert rows["sasrec_bce"]["vs_sasrec_ce"] is rows["sasrec_ce"]["vs_tiger"] is None
    assert rows["sasrec_bce"]["vs_tiger"] is not None


def test_ranks_of_a_finished_job_are_found_again(run, plan, table, tmp_path, capsys):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    for seed in (0, 1):
        ranks_path(receipt_path(copy, "tiger", seed)).unlink()
    shutil.rmtree(job_path(copy, "tiger", 1).path)
    reproduce(copy, plan)
    kept = [ranks_path(receipt_path(copy, "tiger", seed)).is_file() for seed in (0, 1)]
    assert kept == [True, False]
    assert "tiger-1.json is without its users' ranks" in capsys.readouterr().err


def test_a_default_that_has_changed_makes_another_plan(run, plan, table, monkeypatch):
    from streamctl.baselines.sasrec import SASRec

    monkeypatch.setitem(SASRec.defaults, "dropout", 0.9)
    with pytest.raises(StreamctlError, match=r"sasrec_bce, seed 0 .*baseline.dropout .* 0.9 now"):
        reproduce(run, plan)


def test_receipts_of_another_plan_are_named_and_stop_nothing(run, plan, table, tmp_path, capsys):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    other = Plan(("popularity",), (0,), "tiny", (*SETS, "baseline.dim=8"), device="cpu")
    rows = {row["method"] for row in reproduce(copy, other)["rows"]}
    assert rows == {"popularity"}  # tiger has no such setting, and SASRec had another value
    assert "sasrec_ce-0, sasrec_ce-1, tiger-0, tiger-1" in " ".join(capsys.readouterr().err.split())


def test_settings_of_a_method_that_has_none_of_its_own_are_refused(run):
    with pytest.raises(UsageError, match="no stage or baseline 'stream'"):
        reproduce(run, Plan(("popularity",), sets=("stream.lr=1e-4",)))


def test_saved_receipts_brought_back_make_the_same_table_without_any_job(
    run, plan, table, tmp_path
):
    save_receipts(run, plan, tmp_path)
    receipts, saved = run.path / "reproduce" / "receipts", tmp_path / run.path.name
    copy = RunDir(tmp_path / "copy")
    for stage in ("data", "tokenizer"):
        shutil.copytree(run.path / stage, copy.path / stage)
    shutil.copytree(saved, copy.path / "reproduce" / "receipts")
    assert {path.name for path in saved.iterdir()} == {path.name for path in receipts.iterdir()}
    assert reproduce(copy, plan)["rows"] == table["rows"]


@pytest.mark.parametrize("damage", [b"", b"PK not a zip", "other users", "other ranks", "holes"])
def test_ranks_that_are_not_the_receipts_are_named(run, plan, table, tmp_path, damage):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    path = ranks_path(receipt_path(copy, "tiger", 0))
    if damage == "other users":
        np.savez_compressed(path, tiger=np.zeros(39, np.uint8))
    elif damage == "other ranks":
        np.savez_compressed(path, tiger=np.full(40, 7, np.uint8))
    elif damage == "holes":
        content = bytearray(path.read_bytes())
        content[70:90] = bytes(20)  # in the first array
        path.write_bytes(content)
    else:
        path.write_bytes(damage)
    with pytest.raises(StreamctlError, match=r"not the ranks of tiger, seed 0"):
        module.write_table(copy, plan)


def table_rows(run, plan):
    return {row["method"]: row for row in module.write_table(run, plan)["rows"]}


def test_settings_of_one_method_are_its_own():
    plan = Plan(("sasrec_ce",), sets=("sasrec_ce.dropout=0.5", "baseline.dim=32"))
    own, other = (
        plan.resolve(BaselineConfig, 0, method=name, name="sasrec")
        for name in ("sasrec_ce", "sasrec_bce")
    )
    assert (own.dropout, own.dim) == (0.5, 32)
    assert (other.dropout, other.dim) == (None, 32)


def test_a_job_that_starts_from_another_names_it(run, plan):
    with pytest.raises(StreamctlError, match=r"stream_plain_rl starts from data of stream"):
        reproduce(run, Plan(("stream_plain_rl",), (0,), "tiny", SETS, device="cpu"))


def test_table_and_receipts_are_copied_out(run, plan, table, tmp_path):
    reproduce(run, plan)
    save_receipts(run, plan, tmp_path)
    assert json.loads((tmp_path / "table-run.json").read_text())["rows"] == table["rows"]
    assert len(list((tmp_path / "run").glob("*.json"))) == 2 * len(METHODS)


def test_an_unknown_method_is_named(run):
    with pytest.raises(UsageError, match="did you mean sasrec_ce"):
        reproduce(run, Plan(("sasrec_cee",)))


def test_the_budget_stops_before_the_next_job(run, plan, table, monkeypatch):
    receipt_path(run, "popularity", 0).unlink()
    monkeypatch.setattr(module, "run_job", lambda *_: pytest.fail("a job began beyond the budget"))
    clock = iter([0.0, 1e6, 2e6])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    spent = Plan(METHODS, (0, 1), "tiny", SETS, budget=0.1, device="cpu")
    found = reproduce(run, spent)
    assert {row["method"]: row["seeds"] for row in found["rows"]}["popularity"] == 1


def test_a_thinker_is_compared_with_the_same_model_without_its_thought():
    figures = dict.fromkeys((*COLUMNS, "ms_per_user", "train_s"), 0.5)
    entry = figures | {"masked": {"ndcg@10": 0.5}}
    gained = {"stream_sft": [np.full(50, 0.5)], "no_thinking": [np.full(50, 0.2)]}
    entries = {name: [entry] for name in gained}
    rows = {name: module._row(name, entries, gained, None) for name in gained}
    assert rows["stream_sft"]["vs_twin"] == pytest.approx([0.3, 0.3])
    assert rows["no_thinking"]["vs_twin"] is None


def test_a_setting_of_no_stage_and_no_method_is_refused_before_anything_is_done(run, plan, table):
    before = {path: path.read_bytes() for path in (run.path / "reproduce").rglob("*.json")}
    other = Plan(("sasrec_bce",), (0,), "tiny", ("sasrec_bcee.epochs=2",), device="cpu")
    with pytest.raises(
        UsageError, match="no stage or baseline 'sasrec_bcee'; did you mean sasrec_b"
    ):
        reproduce(run, other, force=True)
    assert {path: path.read_bytes() for path in before} == before
