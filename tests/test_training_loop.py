"""The loop that every stage trains with: order, schedule, best epoch, exact resume."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from streamctl.config import BaselineConfig
from streamctl.errors import StreamctlError
from streamctl.runs import RunDir
from streamctl.training import loop


class Rows:
    """Examples of a toy task: the target is the last item of the history."""

    def __init__(self, count=150, items=12):
        random = np.random.default_rng(0)
        self.lengths = random.integers(1, 5, count)
        self.table = random.integers(0, items, (count, 5))
        self.targets = self.table[np.arange(count), self.lengths - 1]
        self.users = np.arange(count)

    def __len__(self):
        return len(self.lengths)

    def histories(self, index):
        longest = self.lengths[index].max()
        assert (self.lengths[index] == longest).all()
        return self.table[index, :longest]


class Toy(nn.Module):
    def __init__(self, items=12):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(items, 8)
        self.dropout = nn.Dropout(0.2)
        self.output = nn.Linear(8, items, bias=False)
        self.unused = nn.Linear(2, 2)
        self.unused.weight.requires_grad_(False)

    def forward(self, history):
        return self.output(self.dropout(self.embedding(history)).mean(1))


SETTINGS = {"batch": 16, "lr": 0.05, "weight_decay": 0.1, "warmup": 0.1, "seed": 3}


def train(path, *, stop_at=None, scores=None, epochs=4, patience=0, **options):
    """Train the toy; raise KeyboardInterrupt in step `stop_at`. Returns (weights, result)."""
    module, calls = Toy(), []

    def loss(batch):
        if torch.is_grad_enabled():  # else the loss before training
            calls.append(len(batch))
        if stop_at is not None and len(calls) == stop_at:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(module(batch.history), batch.target), {"one": 1.0}

    def validate():
        log = path / "toy/metrics.jsonl"  # one line an epoch that is over
        epoch = len(log.read_text().splitlines()) if log.exists() else 0
        return {"ndcg@10": float((scores or range(100))[epoch])}

    with RunDir(path).begin("toy", BaselineConfig()) as stage:
        config = BaselineConfig(epochs=epochs, patience=patience, **SETTINGS)
        result = loop.fit(
            stage, module, config, loss=loss, examples=Rows(), validate=validate, device="cpu",
            **options,
        )  # fmt: skip
    return {name: t.clone() for name, t in module.state_dict().items()}, result


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_an_epoch_holds_every_row_once_in_batches_of_one_length():
    lengths = np.random.default_rng(1).integers(1, 21, 1000)
    rows = loop.batches(lengths, 32, seed=7, epoch=2)
    assert sorted(np.concatenate(rows)) == list(range(1000))
    assert all(len(set(lengths[index])) == 1 and len(index) <= 32 for index in rows)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(1).integers(1, 21, 300)
    orders = [
        np.concatenate(loop.batches(lengths, 32, seed, epoch)).tolist()
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


def test_the_learning_rate_climbs_to_its_peak_and_falls_to_zero():
    rates = [loop.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_training_lowers_the_loss_and_logs_each_epoch(tmp_path):
    _, result = train(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "toy/metrics.jsonl").open()]
    assert [record["epoch"] for record in records] == [0, 1, 2, 3] and result.epochs == 4
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[0]["one"] == pytest.approx(1.0) and records[0]["sequences_per_s"] > 0


@pytest.mark.parametrize("stop_at", [1, 7, 13, 30])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, stop_at, every):
    whole, _ = train(tmp_path / "whole")
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", every)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=5)
    again, result = train(tmp_path / "cut")
    assert same(whole, again) and result.epochs == 4
    lines = [(tmp_path / name / "toy/metrics.jsonl").read_text() for name in ("whole", "cut")]
    losses = [[json.loads(row)["loss"] for row in text.splitlines()] for text in lines]
    assert losses[0] == losses[1]


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path):
    peak, result = train(tmp_path / "a", scores=[1, 5, 4, 3, 2, 9], epochs=6, patience=2)
    assert (result.best_epoch, result.epochs, result.best) == (1, 4, {"ndcg@10": 5.0})
    longer, result = train(tmp_path / "b", scores=[1, 5, 4, 3, 2, 1], epochs=6)
    assert (result.best_epoch, result.epochs) == (1, 6)
    assert same(peak, longer)


def test_the_start_is_a_candidate_and_is_kept_where_nothing_is_better(tmp_path):
    began = Toy().state_dict()
    kept, result = train(tmp_path / "a", scores=[7, 5, 6, 4, 3], start=True, patience=3)
    assert (result.best_epoch, result.epochs) == (-1, 3) and result.start == {"ndcg@10": 7.0}
    assert same(kept, began)
    kept, result = train(tmp_path / "b", scores=[3, 9, 4, 4], start=True, safe=lambda *_: False)
    assert result.best_epoch == -1 and same(kept, began), "weights that are not safe are kept"


@pytest.mark.parametrize("stop_at", [None, 9, 20])
def test_steps_instead_of_epochs_are_validated_in_parts_and_resume(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    parts = {"steps": 14, "validate_every": 4, "repeats": 2}
    whole, result = train(tmp_path / "whole", **parts)
    assert [found["step"] for found in result.validations] == [4, 8, 12, 14]
    assert (result.steps, result.epochs, result.best_epoch) == (14, 4, 3)
    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", stop_at=stop_at, **parts)
        assert same(whole, train(tmp_path / "cut", **parts)[0])


def test_a_finished_fit_is_not_trained_again(tmp_path):
    first, _ = train(tmp_path)
    again, result = train(tmp_path, stop_at=1)
    assert same(first, again) and result.epochs == 4


def test_a_frozen_weight_stays(tmp_path):
    trained, _ = train(tmp_path)
    assert torch.equal(trained["unused.weight"], Toy().unused.weight)


def test_a_loss_that_is_not_finite_is_one_clear_error(tmp_path):
    module = Toy()
    with (
        RunDir(tmp_path).begin("toy", BaselineConfig()) as stage,
        pytest.raises(
            StreamctlError, match=r"training diverged.*epoch 1 is nan.*baseline.lr=0.005"
        ),
    ):
        loop.fit(
            stage, module, BaselineConfig(**SETTINGS), epochs=1, patience=0,
            loss=lambda batch: (module(batch.history).sum() * float("nan"), {}),
            examples=Rows(), validate=None, device="cpu",
        )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from streamctl.config import TokenizeConfig
    from streamctl.data import synthesize
    from streamctl.tokenizer.stage import tokenize

    run = RunDir(tmp_path_factory.mktemp("tiny") / "run")
    synthesize(run, users=80, items=60, seed=1)
    tokenize(run, TokenizeConfig(encoder="tfidf", method="rqkmeans", dim=8, levels=2, codes=8))
    return run


@pytest.mark.parametrize(
    ("stage", "lr"), [("gru4rec", 10.0), ("caser", 10.0), ("sasrec_ce", 1.0), ("pretrain", 1.0)]
)
def test_training_that_ends_far_worse_than_it_began_is_no_stage_and_names_the_setting(
    tiny, stage, lr
):
    from streamctl.baselines.train import train_baseline
    from streamctl.config import PretrainConfig
    from streamctl.training.pretrain import pretrain

    section = "pretrain" if stage == "pretrain" else "baseline"
    with pytest.raises(StreamctlError, match=rf"diverged.*{section}\.lr={lr / 10:g}"):
        if stage == "pretrain":
            pretrain(tiny, PretrainConfig(lr=lr, epochs=1), device="cpu")
        else:
            train_baseline(tiny, BaselineConfig(name=stage, lr=lr, epochs=1), device="cpu")


def test_a_training_that_diverged_after_its_best_epoch_keeps_that(tmp_path):
    state = loop._Trainer.__new__(loop._Trainer)
    state.result = loop.FitResult({"ndcg@10": 1.0}, 0, 2, losses=[2.0, 1.5, 99.0])
    state.check()
    state.result.best_epoch = -1  # the start itself
    state.check()
    state.result.best_epoch = 1
    state.rate, state.stage = 1.0, RunDir(tmp_path).stage("toy")
    state.stage.config = BaselineConfig()
    with pytest.raises(StreamctlError, match=r"began with 2.*is 99"):
        state.check()


def test_a_first_batch_of_an_easy_length_is_no_sign_of_divergence(tmp_path):
    module, first = Toy(), []

    def loss(batch):
        first.append(batch.history.shape[1])
        value = nn.functional.cross_entropy(module(batch.history), batch.target)
        return value + (0 if first[0] == first[-1] else 20), {}

    with RunDir(tmp_path).begin("toy", BaselineConfig()) as stage:
        result = loop.fit(
            stage, module, BaselineConfig(epochs=2, **SETTINGS), loss=loss, examples=Rows(),
            validate=None, device="cpu",
        )  # fmt: skip
    assert result.losses[0] > 5 and result.losses[1] > 5


def test_no_examples_is_one_clear_error(tmp_path):
    with (
        RunDir(tmp_path).begin("toy", BaselineConfig()) as stage,
        pytest.raises(StreamctlError, match="nothing to train on"),
    ):
        loop.fit(
            stage, Toy(), BaselineConfig(**SETTINGS), loss=lambda batch: None, examples=Rows(0),
            epochs=1, validate=None, device="cpu",
        )  # fmt: skip


def test_tensorboard_events_only_when_asked(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    train(tmp_path / "quiet", epochs=1)
    monkeypatch.setenv(loop.TENSORBOARD, "1")
    train(tmp_path / "asked", epochs=1)
    assert not (tmp_path / "quiet/toy/tensorboard").exists()
    assert list((tmp_path / "asked/toy/tensorboard").glob("events*"))
