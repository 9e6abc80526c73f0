"""`reproduce`: a receipt a job, nothing done twice, a table with means, spreads and intervals."""

from __future__ import annotations

import json

import pytest
from test_baselines import write_cycle

from streamctl.config import BaselineConfig, TokenizeConfig
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation import reproduce as module
from streamctl.evaluation.jobs import Plan
from streamctl.evaluation.reproduce import COLUMNS, receipt_path, reproduce, save_receipts

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
