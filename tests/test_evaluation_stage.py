"""`eval`: which rows a run has, controls that are what they say, redone when its inputs change."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from test_baselines import N_ITEMS, N_USERS, tokenized_cycle, write_cycle

from streamctl import cli
from streamctl.baselines.train import train_baseline
from streamctl.config import (
    AnnotateConfig,
    BaselineConfig,
    DataConfig,
    EvalConfig,
    PretrainConfig,
    RefitConfig,
    RerankConfig,
    RlConfig,
    SftConfig,
    TokenizeConfig,
)
from streamctl.data import Split, load_data, prepare
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation import curve
from streamctl.evaluation import methods as methods_module
from streamctl.evaluation import stage as stage_module
from streamctl.evaluation.methods import Models, best_method, choose_rows, load_best
from streamctl.evaluation.refit import refit
from streamctl.evaluation.report import SAME, plot, table
from streamctl.evaluation.rerank import rerank
from streamctl.evaluation.stage import evaluate_run, read_result
from streamctl.ranking import evaluate
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.letter.annotate import label
from streamctl.training.material import Material, save_policy
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import sft

CONFIG = EvalConfig(beam=10, bootstrap=200)
KEYS = {
    *(f"recall@{k}" for k in (1, 5, 10, 20, 50)),
    *(f"ndcg@{k}" for k in (5, 10, 20)),
    *(f"{name}@10" for name in ("coverage", "mrr", "novelty", "diversity", "popularity_bias")),
}


def publish_policy(run: RunDir, name: str, config, parents) -> None:
    """The pretrained policy under another stage's name: rows need weights, not good ones."""
    material = Material.load(run)
    with run.begin(name, config, parents) as stage:
        save_policy(stage, material.policy(run.stage("pretrain"), torch.device("cpu")))
        stage.publish()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The circle with every stage that generative rows read."""
    run = tokenized_cycle(tmp_path_factory.mktemp("eval") / "run", codes=4)
    letter = {"thoughts": "vocabulary", "retrieve": "target"}
    pretrain(run, PretrainConfig(epochs=2, batch=64, lr=5e-3, **letter), device="cpu")
    annotate(run, AnnotateConfig(length=2, fit_epochs=0), device="cpu")
    parents = ["data", "tokenizer", "pretrain", "annotate"]
    publish_policy(run, "sft", SftConfig(), parents)
    publish_policy(run, "rl", RlConfig(), [*parents, "sft"])
    publish_policy(run, "baselines/no_thinking", SftConfig(), parents)
    return run


@pytest.fixture(scope="module")
def stage(run):
    return evaluate_run(run, CONFIG, device="cpu")


@pytest.fixture(scope="module")
def result(stage):
    return read_result(stage)


@pytest.fixture
def models(run):
    return Models(run, CONFIG, load_data(run)[1].test, "cpu")


def test_every_row_that_the_run_has_is_there(result):
    methods, controls = set(result["methods"]), set(result["controls"])
    assert methods == {"popularity", "stream_pt", "stream_sft", "stream_rl"}
    assert controls == {
        "no_thinking",
        "random_thinking",
        "random_thinking_rl",
        "oracle_thinking",
    }


def test_every_row_has_both_sets_of_figures_apart(result):
    for row in (*result["methods"].values(), *result["controls"].values()):
        assert row.keys() >= KEYS
        assert row["masked"].keys() >= KEYS
        assert row["interval"][0] <= row["ndcg@10"] <= row["interval"][1]
        assert row["ms_per_user"] > 0


def test_the_result_says_what_it_is_of(result, run):
    assert result["split"] == "test"
    assert result["users"] == N_USERS
    assert result["items"] == N_ITEMS
    assert result["ties"] == "kept"
    assert result["data_hash"] == run.stage("data").hash
    assert result["thinking"]["annotate"]["distinct_chains"] > 0
    assert isinstance(result["collapsed"], bool)


def test_stream_rows_come_with_paired_intervals(result):
    for name in ("stream_pt", "stream_sft", "stream_rl"):
        found = result["comparisons"][name]["no_thinking"]
        own = result["methods"][name]["ndcg@10"] - result["controls"]["no_thinking"]["ndcg@10"]
        assert found["difference"] == pytest.approx(own)
        assert found["low"] <= found["difference"] <= found["high"]
        assert found["masked"]["low"] <= found["masked"]["high"]
    assert "random_thinking" in result["comparisons"]["stream_sft"]


def test_a_row_that_misleads_without_a_note_has_one(result):
    assert "seen the answer" in result["controls"]["oracle_thinking"]["note"]


def test_artifacts_hold_no_timing(stage):
    assert "ms_per_user" not in (stage.path / "metrics.json").read_text()
    assert set(stage.manifest["artifacts"]) == {"metrics.json", "ranks.safetensors"}


def test_a_complete_evaluation_is_not_redone(run, stage):
    before = run.stage("eval").manifest
    assert evaluate_run(run, CONFIG, device="cpu").manifest == before


def test_it_is_redone_when_a_stage_appears_and_the_last_one_kept(tmp_path):
    run, config = write_cycle(tmp_path / "run"), EvalConfig(bootstrap=50)
    old = evaluate_run(run, config, device="cpu").hash
    train_baseline(run, BaselineConfig(name="gru4rec", dim=8, epochs=1), device="cpu")
    found = evaluate_run(run, config, device="cpu")
    assert "gru4rec" in read_result(found)["methods"]
    previous = json.loads((run.path / "eval.previous" / "manifest.json").read_text())
    assert previous["hash"] == old


def test_rows_and_a_winner_that_are_not_asked_for_stay(run, stage, tmp_path, monkeypatch):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    before = read_result(evaluate_run(copy, CONFIG, device="cpu"))
    train_baseline(copy, BaselineConfig(name="gru4rec", dim=8, epochs=1), device="cpu")
    titles, real = [], stage_module.evaluate

    def watched(*args, title, **options):
        titles.append(title)
        if title == "choose gru4rec" and len(titles) == 3:
            raise KeyboardInterrupt
        return real(*args, title=title, **options)

    monkeypatch.setattr(stage_module, "evaluate", watched)
    asked = replace(CONFIG, methods=("gru4rec",))
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(copy, asked, device="cpu")
    after = read_result(evaluate_run(copy, asked, device="cpu"))
    assert titles == ["eval gru4rec", "eval gru4rec masked", "choose gru4rec"] * 2
    assert set(after["methods"]) == {*before["methods"], "gru4rec"}
    for name, row in before["methods"].items():
        assert after["methods"][name]["ndcg@10"] == row["ndcg@10"]
    assert after["winner"]["method"] in {before["winner"]["method"], "gru4rec"}


def test_force_evaluates_what_is_asked_for_and_leaves_the_rest(run, tmp_path, monkeypatch):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    before = read_result(evaluate_run(copy, CONFIG, device="cpu"))
    titles, real = [], stage_module.evaluate

    def watched(*args, title, **options):
        titles.append(title)
        return real(*args, title=title, **options)

    monkeypatch.setattr(stage_module, "evaluate", watched)
    asked = replace(CONFIG, methods=("popularity",))
    after = read_result(evaluate_run(copy, asked, device="cpu", force=True))
    assert {title.split()[1] for title in titles} == {"popularity"}
    assert set(after["methods"]) == set(before["methods"])
    assert after["winner"] == before["winner"]


def test_rows_that_no_longer_hold_are_left_out_and_named(run, tmp_path, capsys):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    evaluate_run(copy, CONFIG, device="cpu")
    shutil.rmtree(copy.stage("rl").path)
    asked = replace(CONFIG, methods=("popularity",))
    after = read_result(evaluate_run(copy, asked, device="cpu"))
    assert "stream_rl" not in after["methods"] and "stream_sft" in after["methods"]
    said = " ".join(capsys.readouterr().err.split())
    assert "left out of the table: random_thinking_rl, stream_rl" in said


def test_a_damaged_evaluation_that_is_kept_stops_nothing(tmp_path):
    run, config = write_cycle(tmp_path / "run"), EvalConfig(bootstrap=50)
    evaluate_run(run, config, device="cpu")
    (run.path / "eval").rename(run.path / "eval.previous")
    (run.path / "eval.previous" / "manifest.json").write_text("{")
    assert "popularity" in read_result(evaluate_run(run, config, device="cpu"))["methods"]
    (run.path / "eval" / "manifest.json").write_text("{")
    with pytest.raises(StreamctlError, match=r"eval.* --force"):
        evaluate_run(run, config, device="cpu")
    again = evaluate_run(run, config, device="cpu", force=True)
    assert "popularity" in read_result(again)["methods"]


def test_how_diverse_an_answer_is_depends_on_the_tokenizer(tmp_path):
    run, config = write_cycle(tmp_path / "run"), EvalConfig(bootstrap=50)
    popular = read_result(evaluate_run(run, config, device="cpu"))["methods"]["popularity"]
    assert "diversity@10" not in popular
    tokenize(run, TokenizeConfig(encoder="tfidf", dim=8, method="rqkmeans", levels=3, codes=4))
    popular = read_result(evaluate_run(run, config, device="cpu"))["methods"]["popularity"]
    assert 0 <= popular["diversity@10"] <= 2


def test_before_an_evaluation_what_is_trained_answers_and_not_popularity(tmp_path):
    run = write_cycle(tmp_path / "run")
    train_baseline(run, BaselineConfig(name="gru4rec", dim=8, epochs=1), device="cpu")
    name, why = best_method(run)
    assert name == "gru4rec" and "streamctl eval" in why


def test_an_interrupted_evaluation_keeps_its_rows_and_ends_bit_identical(run, stage, monkeypatch):
    config = EvalConfig(beam=4, bootstrap=50, methods=("popularity", "stream_pt", "stream_sft"))
    whole = evaluate_run(run, config, device="cpu", force=True).hash
    titles, real = [], stage_module.evaluate

    def watched(*args, title, **options):
        if len(titles) == 3:
            raise KeyboardInterrupt
        titles.append(title)
        return real(*args, title=title, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage_module, "evaluate", watched)
        evaluate_run(run, config, device="cpu", force=True)
    assert titles == ["eval popularity", "eval popularity masked", "choose popularity"]
    titles.clear()

    def resumed(*args, title, **options):
        titles.append(title)
        return real(*args, title=title, **options)

    monkeypatch.setattr(stage_module, "evaluate", resumed)
    assert evaluate_run(run, config, device="cpu").hash == whole
    assert "eval popularity" not in titles, "a finished row was evaluated again"
    assert "eval stream_pt" in titles


def test_items_that_share_a_code_are_ordered_by_chance_and_only_one_is_credited(models):
    search = models.generative("pretrain", decoder="direct")
    policy, trie_of = search.policy, type(search.trie)
    tokens = policy.item_tokens.clone()
    tokens[1] = tokens[0]  # items 0 and 1 collide
    orders = set()
    for seed in range(12):
        policy.item_tokens = tokens
        recommender = replace(
            models.generative("pretrain", decoder="direct", seed=seed),
            trie=trie_of(tokens.numpy()), beam=N_ITEMS,
        )  # fmt: skip
        items = recommender.recommend(torch.tensor([[5, 6]]), N_ITEMS).items[0].tolist()
        assert sorted(items) == list(range(N_ITEMS))
        assert abs(items.index(0) - items.index(1)) == 1
        orders.add(items.index(0) < items.index(1))
    assert orders == {True, False}


def test_random_thoughts_are_a_users_own_and_legal(models):
    recommender = models.random("sft")
    history = torch.zeros(3, 2, dtype=torch.int64)
    given = recommender.thoughts(history, np.array([4, 5, 4]))
    low, high = models.policy("sft").config.tokens.think_range
    assert given.shape == (3, 8) and recommender.think == 2
    assert ((given >= low) & (given < high)).all()
    assert torch.equal(given[0], given[2])
    assert not torch.equal(given[0], given[1])


def test_oracle_thoughts_depend_on_the_target(models):
    recommender, examples = models.oracle("sft"), models.examples
    users = np.arange(40)
    history = torch.from_numpy(examples.histories(users))
    thoughts = recommender.thoughts(history, users)
    assert thoughts.shape == (40, 2)
    items = examples.items.copy()
    items[examples.end] = (items[examples.end] + 3) % N_ITEMS
    changed = replace(examples, items=items)
    np.testing.assert_array_equal(changed.histories(users), examples.histories(users))
    other = Models(models.run, CONFIG, changed, "cpu").oracle("sft")
    assert not torch.equal(thoughts, other.thoughts(history, users))


def test_the_oracle_knows_each_of_a_user_s_targets(models):
    log = load_data(models.run)[1].log
    cuts = log.offsets[:-1, None] + np.array([2, 3])
    examples = Split(replace(log, cuts=cuts), n_items=N_ITEMS).test
    assert len(examples) > 1.5 * log.n_users
    models = Models(models.run, CONFIG, examples, "cpu")
    rows = np.arange(len(examples))[::-1]
    history = torch.from_numpy(examples.histories(rows))
    given = models.oracle("sft").thoughts(history, examples.users[rows])
    targets, how = torch.from_numpy(examples.targets[rows]), models.annotation
    expected = label(models.policy("sft"), history, targets, how["length"], how["mode"])
    assert torch.equal(given, expected)


def test_users_and_targets_are_counted_apart_where_there_are_several(tmp_path):
    rows = [(f"u{u}", f"i{(u * 3 + k) % 7}", 10 * k + u) for u in range(10) for k in range(10)]
    lines = ["user_id,item_id,timestamp", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    run = RunDir(tmp_path / "run")
    prepare(run, DataConfig(source=str(tmp_path / "log.csv"), split="60%,80%"))
    found = read_result(
        evaluate_run(run, EvalConfig(methods=("popularity",), bootstrap=50), device="cpu")
    )
    assert (found["users"], found["targets"]) == (10, len(load_data(run)[1].test))
    assert found["targets"] >= 15
    assert "10 users with " in str(table(found).title)


def test_where_nobody_validates_there_is_a_table_and_no_winner(tmp_path):
    """The days of validation hold first interactions alone, which nobody can foresee."""
    early = [(f"u{u}", f"i{(u + k) % 7}", k) for u in range(8) for k in range(6)]
    new = [(f"n{u}", f"i{(u + k) % 7}", 100 * (k + 1)) for u in range(4) for k in range(6)]
    lines = ["user_id,item_id,timestamp", *(",".join(map(str, row)) for row in early + new)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    run = RunDir(tmp_path / "run")
    prepare(run, DataConfig(source=str(tmp_path / "log.csv"), split="50,150"))
    split = load_data(run)[1]
    assert not len(split.valid) and len(split.test)
    config = EvalConfig(methods=("popularity",), bootstrap=50)
    found = read_result(evaluate_run(run, config, device="cpu"))
    assert found["winner"] is None and found["methods"]["popularity"]["recall@10"] > 0


def test_a_target_of_one_user_is_no_news_to_the_table(result):
    assert result["users"] == result["targets"] and "targets" not in str(table(result).title)


def test_the_best_on_validation_answers_and_not_what_was_trained_last(run, tmp_path, capsys):
    """Its last stage is spoilt: every weight drawn anew."""
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(copy.path / "eval", ignore_errors=True)
    shutil.rmtree(copy.path / "rl")
    material = Material.load(copy)
    policy = material.policy(copy.stage("pretrain"), torch.device("cpu"))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.3)
    with copy.begin("rl", RlConfig(), ["data", "tokenizer", "annotate", "sft"]) as stage:
        save_policy(stage, policy)
        stage.publish()
    name, why = best_method(copy)
    assert name == "stream_rl" and "streamctl eval" in why
    found = read_result(evaluate_run(copy, CONFIG, device="cpu"))
    winner = found["winner"]
    name, why = best_method(copy)
    assert name == winner["method"] != "stream_rl" and winner["next"]["method"] in why
    assert winner["next"]["low"] <= winner["next"]["difference"] <= winner["next"]["high"]
    _, chosen, recommender = load_best(copy, "cpu")
    assert chosen == name and name in capsys.readouterr().err
    split = load_data(copy)[1]
    valid = evaluate(recommender, split.valid, n_items=N_ITEMS, masked=True)
    assert valid.metrics["ndcg@10"] == pytest.approx(winner["ndcg@10"])
    assert load_best(copy, "cpu", method="popularity")[1] == "popularity"
    with pytest.raises(UsageError, match="did you mean popularity"):
        load_best(copy, "cpu", method="popularty")
    for answer in (load_best, partial(refit, config=RefitConfig(method="oracle_thinking"))):
        options = {"method": "oracle_thinking"} if answer is load_best else {}
        with pytest.raises(UsageError, match="oracle_thinking is a control, and answers nobody"):
            answer(copy, device="cpu", **options)


def test_a_sample_of_users_and_some_rows_can_be_asked_for(run, tmp_path):
    config = EvalConfig(users=20, methods=("popularity",), bootstrap=50)
    copy = write_cycle(tmp_path / "run")
    found = read_result(evaluate_run(copy, config, device="cpu"))
    assert list(found["methods"]) == ["popularity"]
    assert found["users"] == 20
    assert not found["controls"]


def test_popularity_alone_equals_its_counts(tmp_path):
    copy = write_cycle(tmp_path / "run")
    found = read_result(evaluate_run(copy, EvalConfig(bootstrap=50), device="cpu"))
    split = load_data(copy)[1]
    order = np.argsort(-split.popularity(), kind="stable")
    place = np.argsort(order)[split.test.targets]
    assert found["methods"]["popularity"]["recall@5"] == pytest.approx((place < 5).mean())


def test_an_unknown_row_and_a_missing_stage_are_named(run, tmp_path):
    with pytest.raises(UsageError, match="did you mean"):
        choose_rows(run, ("stream_sfd",))
    copy = write_cycle(tmp_path / "run")
    with pytest.raises(StreamctlError, match=r"streamctl (tokenize|annotate|sft)"):
        evaluate_run(copy, EvalConfig(methods=("stream_sft",)), device="cpu")


def test_a_control_that_may_know_the_target_is_not_re_ranked(run):
    config = RerankConfig(methods=("popularity", "oracle_thinking"))
    with pytest.raises(UsageError, match=r"oracle_thinking is a control.*some of popularity, "):
        rerank(run, config, device="cpu")


def test_tiger_trained_alone_is_searched_no_wider_than_the_other_rows(models, monkeypatch):
    policy, trie = models.policy("pretrain"), models.material.trie
    alone = SimpleNamespace(policy=policy, trie=trie)
    monkeypatch.setattr(Models, "baseline", lambda *_: alone)
    tiger, other = models.tiger(), models.generative("pretrain", decoder="direct")
    assert (tiger.beam, tiger.narrow) == (other.beam, True)


def test_a_re_ranked_row_reads_as_many_items_as_its_ranker_was_fitted_with(models, monkeypatch):
    monkeypatch.setattr(methods_module.LambdaRank, "load", lambda _: None)
    manifest = SimpleNamespace(manifest={"config": {"depth": 100}}, file=lambda _: None)
    monkeypatch.setattr(models.run, "stage", lambda *_: manifest)
    monkeypatch.setattr(Models, "evidence", None)
    made = []
    row = SimpleNamespace(make=lambda models: made.append(models.narrow))
    monkeypatch.setattr(methods_module, "known_rows", lambda _: {"tiger": row})
    models.reranked(("tiger",))
    assert made == [False] and models.narrow


def test_the_table_shows_every_row_and_the_plot_is_written(result, tmp_path):
    shown = table(result)
    assert shown.row_count == len(result["methods"]) + len(result["controls"])
    assert SAME in shown.caption
    plot(result, tmp_path / "ndcg.png")
    assert (tmp_path / "ndcg.png").stat().st_size > 5000


def test_the_table_fits_a_terminal_of_eighty_columns(result):
    console, methods = Console(width=80), result["methods"]
    long = methods | {"stream_rl+sasrec_ce+bert4rec+rerank": methods["popularity"]}
    result = result | {"methods": long}
    with console.capture() as capture:
        console.print(table(result))
    assert "…" not in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 80


def test_collapsed_labels_are_an_error_under_strict(run, stage, monkeypatch, capsys):
    from streamctl.commands.eval import render

    real = read_result(stage)
    monkeypatch.setattr(stage_module, "read_result", lambda stage: real | {"collapsed": True})
    render(stage, False)
    assert "collapsed" in capsys.readouterr().out
    with pytest.raises(StreamctlError, match="collapsed"):
        render(stage, True, strict=True)


def test_the_evaluator_agrees_with_the_result(models, result):
    found = evaluate(models.thinking("sft"), models.examples, n_items=N_ITEMS, masked=True)
    assert found.metrics["ndcg@10"] == result["methods"]["stream_sft"]["masked"]["ndcg@10"]


def test_exact_search_is_the_yardstick_of_beams(run):
    found = curve.beam_losses(run, EvalConfig(users=40), device="cpu").json("losses.json")
    assert found["stage"] == "rl" and found["users"] == 40
    assert list(found["rows"]) == ["l = 0", "l = 2"]
    for row in found["rows"].values():
        assert row["exact"]["of_true_top10"] == row["exact"]["same_top10"] == 1.0
        # A beam wider than the whole catalogue loses nothing.
        assert row["beam 50"]["same_top10"] == 1.0
        assert row["beam 50"]["ndcg@10"] == pytest.approx(row["exact"]["ndcg@10"])
    columns, rows = curve.loss_rows(found)
    assert len(rows) == 6 and all(len(row) == len(columns) for row in rows)


def test_where_everything_trains_nothing_is_measured(run, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    final = RunDir(refit(copy, RefitConfig(method="stream_sft"), device="cpu").path)
    for measure in (curve.beam_losses, curve.think_curve):
        with pytest.raises(StreamctlError, match="nobody is held out"):
            measure(final, CONFIG, device="cpu")


def test_think_curve_has_every_length_and_its_controls(run, monkeypatch):
    monkeypatch.setattr(curve, "LENGTHS", {"vocabulary": (0, 1, 2)})
    monkeypatch.setattr(curve, "WIDER", (10,))
    stage = curve.think_curve(run, EvalConfig(users=20, beam=5), device="cpu")
    found = stage.json("points.json")
    kinds = {(point["kind"], point["length"], point["beam"]) for point in found["points"]}
    assert kinds == {
        *(("its own thought", length, 5) for length in (0, 1, 2)),
        *(("random thought", length, 5) for length in (1, 2)),
        ("no thought, wider", 0, 10),
    }
    assert all(point["ms_per_user"] > 0 for point in found["points"])
    assert stage.file("think-curve.png").stat().st_size > 10_000
    columns, rows = curve.curve_rows(found)
    assert len(rows) == 6 and all(len(row) == len(columns) for row in rows)


def test_a_policy_that_thinks_with_evidence_goes_through_all_stages_and_has_its_controls(
    run, tmp_path
):
    copy = RunDir(tmp_path / "run")
    for name in ("data", "tokenizer"):
        shutil.copytree(run.path / name, copy.path / name)
    pretrain(copy, PretrainConfig(epochs=1, batch=64, lr=5e-3), device="cpu")
    annotate(copy, AnnotateConfig(length=2, fit_epochs=1, positions=2), device="cpu")
    sft(copy, SftConfig(epochs=2, batch=64), device="cpu")
    tuning = RlConfig(steps=2, group=4, batch=16, think=3, updates=2, validate_every=2)
    rl(copy, tuning, device="cpu")
    labels, rows = (copy.stage("annotate").array(f"{n}.npy") for n in ("thoughts", "rows"))
    assert labels.shape == (len(rows), 2) and (labels >= 0).any()
    for name, kept in (("sft", "self"), ("rl", "best")):
        valid = copy.stage(name).json("report.json")["valid"]
        assert valid[kept]["ndcg@10"] >= valid["start"]["ndcg@10"], name
    names = ("stream_pt", "stream_sft", "stream_rl")
    controls = ("l0", "random_evidence", "weights_alone", "codes_alone")
    config = replace(CONFIG, methods=(*names, *controls), users=40)
    found = read_result(evaluate_run(copy, config, device="cpu"))
    assert (*found["methods"],) == names and (*found["controls"],) == controls
    figures = {name: row["masked"]["ndcg@20"] for name, row in found["controls"].items()}
    assert len(set(figures.values())) == 4, "each control is another recommender"
    before, after = (
        Material.load(copy).policy(copy.stage(name), torch.device("cpu")).state_dict()
        for name in ("pretrain", "sft")
    )
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    parts = {key.partition(".")[0] for key in changed}
    assert "weighing" in parts <= {"weighing", "thinker"}, "l0 is the decoder of pretraining"
    with pytest.raises(UsageError, match="l = 0 twin in the same policy"):
        sft(copy, SftConfig(), device="cpu", twin=True)


def test_before_any_training_the_next_step_is_to_train(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    write_cycle(folder)
    monkeypatch.setattr("sys.argv", ["streamctl", "eval", "--run", str(folder), "--device", "cpu"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert "Popularity" in out and "TIGER" not in out
    assert f"Next: streamctl run --run {folder}, " in out and "not in this run" not in err
    with pytest.raises(UsageError, match=r"unknown method 'foo'; this run has popularity\. Next: "):
        choose_rows(RunDir(folder), ("foo",))
