"""`update`: a newer log goes on from an older run's codes and weights."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.update import make_data, older
from streamctl import config as configs
from streamctl.baselines.train import train_baseline
from streamctl.data import load_data, synthesize
from streamctl.errors import StreamctlError, UsageError
from streamctl.evaluation.methods import load_method
from streamctl.evaluation.rerank import rerank
from streamctl.evaluation.update import update
from streamctl.ranking import evaluate
from streamctl.runs import RunDir
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.sft import sft

QUICK = ("pretrain.epochs=2", "sft.epochs=1", "baseline.epochs=1")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("update") / "shop")
    synthesize(run, users=150, items=80, seed=0)
    return run


@pytest.fixture(scope="module")
def old(shop, tmp_path_factory) -> RunDir:
    """What there was of the shop, and items but the last eight: SFT with evidence, TIGER, counts,
    a method of single items, a re-ranker."""
    log = load_data(shop)[1].log
    rows = older(shop, 0.8) & (log.items < 72)
    run = make_data(shop, tmp_path_factory.mktemp("update") / "old", rows)
    codes = {"encoder": "tfidf", "dim": 16, "method": "rqkmeans", "levels": 3, "codes": 8}
    tokenize(run, configs.TokenizeConfig(**codes, neighbours=10))
    pretrain(run, configs.PretrainConfig(size="tiny", epochs=4), device="cpu")
    annotate(run, configs.AnnotateConfig(fit_epochs=0), device="cpu")
    sft(run, configs.SftConfig(epochs=2), device="cpu")
    quick = {"tiger": {"epochs": 1}, "gru4rec": {"epochs": 1, "dim": 8}, "transitions": {}}
    for name, settings in quick.items():
        train_baseline(run, configs.BaselineConfig(name=name, **settings), device="cpu")
    rerank(run, configs.RerankConfig(methods=("transitions",), trees=10), device="cpu")
    return run


@pytest.fixture(scope="module")
def newer(shop, old, tmp_path_factory) -> tuple[RunDir, list[str]]:
    """The whole shop: more users and items, and what `update` made of them."""
    run = RunDir(tmp_path_factory.mktemp("update") / "newer")
    shutil.copytree(shop.path, run.path)
    return run, update(old, run, sets=QUICK, device="cpu")


def test_every_stage_that_does_not_know_single_items_is_made(newer):
    run, made = newer
    wanted = {"tokenizer", "pretrain", "annotate", "sft", "baselines/transitions"}
    assert wanted | {"baselines/tiger", "rerank/transitions"} == set(made)
    for name in made:
        run.require(name)


def test_items_of_both_logs_keep_their_codes_and_new_ones_get_free_ones(old, newer):
    before, after = load_data(old)[0], load_data(newer[0])[0]
    codes, newer_codes = (SemanticIds.load(run.stage("tokenizer")) for run in (old, newer[0]))
    both = [item for item in after.ids if item in set(before.ids)]
    assert 0 < len(both) < len(after.ids)
    for item in both:
        old_codes = codes.codes[before.ids.index(item)]
        assert (old_codes == newer_codes.codes[after.ids.index(item)]).all()
    # A new item shares its codes only where every last code under its prefix is taken.
    rows, counts = np.unique(newer_codes.codes, axis=0, return_counts=True)
    for row in rows[counts > 1]:
        assert (rows[:, :-1] == row[:-1]).all(1).sum() == newer_codes.sizes[-1]
    assert len(rows) > 0.8 * len(after.ids)


def test_weights_begin_as_the_older_ones_and_train_on(old, newer):
    run = newer[0]
    made = run.stage("pretrain").manifest
    assert made["warm"] == old.stage("sft").hash and made["epochs"] == 2
    assert made["config"]["hops"] == old.stage("pretrain").manifest["hops"]
    before = old.stage("pretrain").manifest["valid"]["direct"]["ndcg@10"]
    assert made["start"]["ndcg@10"] > 0.5 * before > 0.05
    assert made["valid"]["direct"]["ndcg@10"] >= made["start"]["ndcg@10"]
    weights = [load_file(one.path / "pretrain/model.safetensors") for one in (old, run)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The weighing goes on on the scale that it has learned on.
    scales = [
        load_file(one.path / "sft/thinker.safetensors")["weighing.scale"] for one in (old, run)
    ]
    assert torch.equal(*scales)
    valid = run.stage("sft").manifest["valid"]
    assert valid["self"]["ndcg@10"] >= valid["start"]["ndcg@10"] > 0.05


def test_it_ranks_the_newer_log_as_well_as_what_is_above_popularity(newer):
    split = load_data(newer[0])[1]
    figures = [
        evaluate(load_method(newer[0], name, "cpu"), split.test, n_items=split.n_items, masked=True)
        for name in ("stream_sft", "popularity")
    ]
    assert figures[0].metrics["ndcg@10"] > 1.5 * figures[1].metrics["ndcg@10"]


def test_an_update_that_was_interrupted_goes_on(old, newer, tmp_path):
    run = RunDir(shutil.copytree(newer[0].path, tmp_path / "run"))
    shutil.rmtree(run.path / "sft")
    pretrained = run.path / "pretrain/manifest.json"
    made_at = os.stat(pretrained).st_mtime_ns
    assert update(old, run, sets=QUICK, device="cpu") == newer[1]
    assert os.stat(pretrained).st_mtime_ns == made_at
    assert run.stage("sft").hash == newer[0].stage("sft").hash


def test_what_does_not_fit_is_refused(shop, old, tmp_path):
    with pytest.raises(StreamctlError, match="cannot go on from itself"):
        update(old, old)
    run = RunDir(shutil.copytree(shop.path, tmp_path / "run"))
    with pytest.raises(UsageError, match=r"do not fit these settings \(layers 2 -> 4"):
        update(old, run, sets=("pretrain.size=paper",), device="cpu")
    with pytest.raises(UsageError, match="unknown key"):
        update(old, RunDir(tmp_path / "other"), sets=("pretrain.epoch=2",))
