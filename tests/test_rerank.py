"""Baselines without a network, and a ranker behind any method: taught and judged apart."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamctl.baselines.train import train_baseline
from streamctl.config import BaselineConfig, EvalConfig, RefitConfig, RerankConfig, TokenizeConfig
from streamctl.data import load_data, synthesize
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import answering, best_method, load_best, load_method
from streamctl.evaluation.refit import refit
from streamctl.evaluation.rerank import FOLDS, deciders, folds, ranks_by_folds, rerank
from streamctl.evaluation.stage import evaluate_run, read_result
from streamctl.ranking import evaluate, gains
from streamctl.rerank import features
from streamctl.rerank.lambdarank import Groups, LambdaRank
from streamctl.retrieval.transitions import pair_weights
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize

COUNTING = ("transitions", "knn", "ranker")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    pytest.importorskip("lightgbm")
    run = RunDir(tmp_path_factory.mktemp("rerank") / "run")
    synthesize(run, users=400, items=150, seed=0)
    settings = {"encoder": "tfidf", "dim": 16, "method": "rqkmeans", "levels": 2, "codes": 16}
    tokenize(run, TokenizeConfig(**settings, neighbours=10))
    for name in COUNTING:
        train_baseline(run, BaselineConfig(name=name), device="cpu")
    return run


@pytest.fixture(scope="module")
def reranked(run):
    """Behind popularity, which any ranker improves, and behind two methods together."""
    (alone,) = rerank(run, RerankConfig(methods=("popularity",), trees=60), device="cpu")
    (both,) = rerank(run, RerankConfig(methods=("transitions", "knn"), trees=60), device="cpu")
    return alone, both


@pytest.fixture(scope="module")
def result(run, reranked):
    return read_result(evaluate_run(run, EvalConfig(bootstrap=200), device="cpu"))


@pytest.mark.parametrize("name", COUNTING)
def test_counting_is_above_popularity_and_ranks_the_whole_catalogue(run, result, name):
    rows = result["methods"]
    assert rows[name]["masked"]["ndcg@10"] > 1.5 * rows["popularity"]["masked"]["ndcg@10"]
    split = load_data(run)[1]
    method = load_method(run, name, "cpu")
    history = torch.from_numpy(split.test.histories(np.arange(3)))
    ranking = method.recommend(history, split.n_items, users=np.arange(3))
    for row in ranking.items.tolist():
        assert sorted(row) == list(range(split.n_items))


@pytest.mark.parametrize("name", COUNTING)
def test_without_evidence_items_come_in_the_order_of_their_counts(run, name):
    """Item 0, where padding stands, has no other place than its own."""
    method, split = load_method(run, name, "cpu"), load_data(run)[1]
    rare = split.popularity().argmin()
    gathered = method.evidence.gather

    def nothing(histories, users=None):
        pieces = gathered(histories, users)
        pieces.items[:] = -1
        return pieces

    method.evidence = SimpleNamespace(gather=nothing, n_items=split.n_items)
    found = method.recommend(torch.tensor([[int(rare)]]), split.n_items).items[0].numpy()
    assert (np.diff(split.popularity()[found]) <= 0).all()


@pytest.mark.parametrize("name", COUNTING)
def test_what_a_user_did_in_training_is_no_evidence_for_that_user(run, name):
    """Alone in the log, a user's own sequence is all there is to follow its first item."""
    method = load_method(run, name, "cpu")
    split = load_data(run)[1]
    user = 7
    sequence = split.log.of(user)[:2].astype(np.int64)
    history = torch.from_numpy(sequence[None, :1])
    as_stranger = method.recommend(history, 20).scores
    as_self = method.recommend(history, 20, users=np.array([user])).scores
    assert not torch.equal(as_stranger, as_self)


def test_transitions_follow_the_counts(run):
    split = load_data(run)[1]
    items, offsets = split.training_sequences()
    weights, counts = pair_weights(), np.zeros((split.n_items, split.n_items))
    for user in range(len(offsets) - 1):
        sequence = items[offsets[user] : offsets[user + 1]]
        for place, first in enumerate(sequence):
            for distance, second in enumerate(sequence[place + 1 : place + len(weights)], 1):
                counts[first, second] += weights[distance]
    np.fill_diagonal(counts, 0)  # the user has it
    item = int(counts.sum(1).argmax())
    top = load_method(run, "transitions", "cpu").recommend(torch.tensor([[item]]), 5).items[0]
    assert counts[item, top].tolist() == np.sort(counts[item])[::-1][:5].tolist()


def test_a_reranker_that_surely_helps_is_kept_and_shown_beside_its_method(reranked, result):
    report = reranked[0].json("report.json")
    assert report["kept"] and report["gain"]["low"] > 0
    assert report["ndcg@10"]["after"] > report["ndcg@10"]["before"]
    rows = result["methods"]
    better, worse = (
        rows[name]["masked"]["ndcg@10"] for name in ("popularity+rerank", "popularity")
    )
    assert better > worse
    assert "transitions+knn+rerank" in rows


def test_a_re_ranked_method_is_not_re_ranked_again(run, reranked):
    with pytest.raises(UsageError, match=r"re-ranked already.*some of popularity, transitions"):
        rerank(run, RerankConfig(methods=("popularity+rerank",)), device="cpu")
    with pytest.raises(UsageError, match=r"with commas.*--methods knn,popularity"):
        rerank(run, RerankConfig(methods=("knn+popularity",)), device="cpu")
    with pytest.raises(UsageError, match=r"--methods transitions,knn,popularity$"):
        names = ("transitions+rerank", "knn+popularity")
        rerank(run, RerankConfig(methods=names), device="cpu")


def test_nobody_judges_a_ranker_that_they_taught(run, reranked):
    """In-sample figures are far above those by folds, which are near the test's."""
    split = load_data(run)[1]
    by_folds = gains(ranks_by_folds(reranked[0])["after"].numpy(), 10).mean()
    method = load_method(run, "popularity+rerank", "cpu")
    options = {"n_items": split.n_items, "masked": True}
    in_sample = evaluate(method, split.valid, **options).metrics["ndcg@10"]
    assert in_sample > by_folds + 0.02
    assert abs(evaluate(method, split.test, **options).metrics["ndcg@10"] - by_folds) < 0.06


def test_a_ranker_is_judged_by_those_who_choose_however_many_more_taught_it(
    run, reranked, tmp_path, monkeypatch, capsys
):
    """Where 40 validation users choose, one that 100 or all taught may win, one of 20 may not."""
    monkeypatch.setattr("streamctl.evaluation.rerank.DECIDERS", 40)
    other = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(other.stage("rerank/transitions+knn").path)
    shutil.rmtree(other.stage("eval").path, ignore_errors=True)
    for users, judged in ((100, True), (0, True), (20, False)):
        config = RerankConfig(methods=("popularity",), trees=60, users=users)
        rerank(other, config, device="cpu", force=True)
        methods = ("popularity", "popularity+rerank")
        found = evaluate_run(other, EvalConfig(methods=methods, bootstrap=100), device="cpu")
        winner = found.manifest["winner"]
        assert (winner["next"] is not None) == judged
        if judged:  # by their own ranks, not by those of the first or of all who taught
            ranks = ranks_by_folds(other.stage("rerank/popularity"))
            chose = np.isin(ranks["ends"].numpy(), deciders(load_data(other)[1].valid).end)
            expected = gains(ranks["after"].numpy()[chose], 10).mean()
            assert winner["method"] == "popularity+rerank"
            assert winner["ndcg@10"] == pytest.approx(expected)
        assert ("learned from fewer" in capsys.readouterr().err) != judged


def test_a_user_with_several_targets_is_in_one_fold():
    users = np.random.default_rng(0).integers(0, 50, 300)
    found = folds(users, seed=1)
    for user in np.unique(users):
        assert len(set(found[users == user].tolist())) == 1
    assert set(found.tolist()) == set(range(FOLDS))


def test_the_winner_may_be_a_reranked_method_by_its_folds(run, result):
    name, why = best_method(run)
    assert name == result["winner"]["method"] and "best on validation" in why
    scores = {
        other: result["methods"][other]["masked"]["ndcg@10"] for other in ("popularity", "knn")
    }
    assert result["winner"]["ndcg@10"] > min(scores.values())


def test_excluded_and_not_allowed_items_stay_out(run, reranked):
    method = load_method(run, "transitions+knn+rerank", "cpu")
    history = torch.tensor([[3, 5], [8, 1]])
    free = method.recommend(history, 6).items.numpy()
    barred = [free[0, :3], free[1, :1]]
    allowed = [None, np.array([2, 4, int(free[1, 2])])]
    found = method.recommend(history, 6, exclude=barred, allow=allowed).items.numpy()
    assert not np.isin(found[0], barred[0]).any()
    assert set(found[1].tolist()) <= {-1, *allowed[1].tolist()}
    assert found[1].max() >= 0


def test_features_of_a_candidate_are_those_of_its_lists(run):
    method = load_method(run, "popularity", "cpu")
    evidence = load_method(run, "ranker", "cpu").evidence
    found = features.candidates([method], evidence, torch.tensor([[3, 5, 3]]), 4)
    names = features.feature_names(["popularity"])
    assert found.features.shape[2] == len(names)
    columns = dict(zip(names, np.moveaxis(found.features[0], 1, 0), strict=True))
    proposed = np.isin(found.items[0], found.rankings[0].items[0].numpy())
    assert (columns["presence of popularity"] == proposed).all() and proposed.sum() == 4
    assert sorted(columns["1/rank of popularity"][proposed]) == pytest.approx(
        [1 / 4, 1 / 3, 1 / 2, 1]
    )
    had = {item: times for item, times in zip(found.items[0], columns["times had"], strict=True)}
    assert all(times == {3: 2, 5: 1}.get(int(item), 0) for item, times in had.items() if item >= 0)
    assert len(set(found.items[0].tolist()) - {-1}) == (found.items[0] >= 0).sum()


def test_trees_are_a_function_of_groups_and_seed_and_survive_the_disk(tmp_path):
    pytest.importorskip("lightgbm")
    random = np.random.default_rng(0)
    items = np.tile(np.arange(20), (200, 1))
    values = random.normal(size=(200, 20, 3)).astype(np.float32)
    targets = values[..., 1].argmax(1)
    groups = Groups.of(items, values, targets)
    one, other = (LambdaRank.fit(groups, trees=20, lr=0.1, seed=4) for _ in range(2))
    assert (one.scores(items, values) == other.scores(items, values)).all()
    assert (one.scores(items, values).argmax(1) == targets).mean() > 0.8
    assert one.gains().argmax() == 1
    one.save(tmp_path / "trees.txt")
    again = LambdaRank.load(tmp_path / "trees.txt")
    np.testing.assert_allclose(again.scores(items, values), one.scores(items, values), rtol=1e-6)


def test_refit_counts_what_was_held_out_and_nothing_can_evaluate_it(run, result, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    stage = refit(copy, RefitConfig(method="transitions"), device="cpu")
    assert stage.complete and stage.manifest["method"] == "transitions"
    folder, name, why = answering(copy)
    assert (folder.path, name) == (stage.path, "transitions") and "everything" in why
    split = load_data(copy)[1]
    before = load_method(copy, "transitions", "cpu")
    after = load_best(copy, "cpu")[2]
    # What the log's users took last follows what they had before: it is counted now.
    user = 11
    *_, had, took = split.log.of(user).tolist()
    history = torch.tensor([[had]])

    def share(method) -> float:
        ranking = method.recommend(history, split.n_items)
        place = ranking.items[0].tolist().index(took)
        return float(ranking.scores[0, place])

    assert share(after) > share(before)
    # A user's own latest items are no evidence for that user.
    mine = after.recommend(history, 5, users=np.array([user])).scores
    assert not torch.equal(mine, after.recommend(history, 5).scores)
    with pytest.raises(StreamctlError, match="nobody is held out"):
        evaluate_run(folder, EvalConfig(), device="cpu")
    for config in (RefitConfig(), RefitConfig(method="transitions")):
        with pytest.raises(StreamctlError, match="everything trains here already"):
            refit(folder, config, device="cpu")
    again = read_result(evaluate_run(copy, EvalConfig(bootstrap=200), device="cpu"))
    assert again["methods"]["transitions"] == result["methods"]["transitions"]
    assert answering(copy, "knn")[0].path == copy.path


def test_what_was_refitted_before_another_method_won_answers_no_more(run, result, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    evaluate_run(copy, EvalConfig(methods=("popularity",), bootstrap=50), device="cpu", force=True)
    refit(copy, RefitConfig(), device="cpu")
    assert answering(copy)[1:] == ("popularity", "refitted on everything")
    evaluate_run(copy, EvalConfig(bootstrap=50), device="cpu", force=True)
    folder, name, why = answering(copy)
    assert folder.path == copy.path and name == result["winner"]["method"] != "popularity"
    assert "refit" in why and "popularity" in why
    refit(copy, RefitConfig(method="popularity"), device="cpu")  # now it is asked for
    assert answering(copy)[1:] == ("popularity", "refitted on everything")


def test_refit_takes_a_ranker_as_it_is_and_trains_item_vectors_again(run, tmp_path):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    quick = {"epochs": 2, "dim": 8, "patience": 0}
    train_baseline(copy, BaselineConfig(name="gru4rec", **quick), device="cpu")
    trees = (copy.path / "baselines/ranker/trees.txt").read_bytes()
    kept = refit(copy, RefitConfig(method="ranker"), device="cpu")
    assert (kept.path / "baselines/ranker/trees.txt").read_bytes() == trees
    anew = RunDir(refit(copy, RefitConfig(method="gru4rec"), device="cpu", force=True).path)
    made = anew.stage("baselines/gru4rec").manifest
    assert made["epochs"] == copy.stage("baselines/gru4rec").manifest["best_epoch"] + 1
    assert made["hash"] != copy.stage("baselines/gru4rec").hash
    assert load_best(copy, "cpu")[1] == "gru4rec"
    # Its parents change: it is out of date, and the run answers by what is there.
    train_baseline(copy, BaselineConfig(name="gru4rec", seed=1, **quick), device="cpu", force=True)
    folder, _, why = answering(copy)
    assert folder.path == copy.path and "of an earlier baselines/gru4rec" in why
    assert "--method gru4rec --force" in why
    why = answering(copy, "gru4rec")[2]
    assert why.startswith("you chose it") and "--method gru4rec --force" in why
