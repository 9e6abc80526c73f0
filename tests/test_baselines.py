"""Every baseline keeps one contract, learns, and resumes; the losses are what they say."""

from __future__ import annotations

import dataclasses
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from streamctl.baselines import objectives
from streamctl.baselines.base import last_states, shifted_targets
from streamctl.baselines.registry import BASELINES, baseline_class
from streamctl.baselines.train import settle, train_baseline, whole_sequences
from streamctl.config import BaselineConfig, DataConfig, PretrainConfig, TokenizeConfig
from streamctl.data import Catalog, InteractionLog, Split, load_data
from streamctl.errors import StreamctlError, UsageError
from streamctl.ranking import evaluate, rank_scores
from streamctl.runs import RunDir
from streamctl.training.pretrain import pretrain

N_ITEMS, N_USERS = 24, 160


def cycle_log(seed: int = 0) -> InteractionLog:
    """Users who walk around a circle of items: the next item is always the number plus one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 9, N_USERS)
    starts = rng.integers(0, N_ITEMS, N_USERS)
    walks = [(start + np.arange(n)) % N_ITEMS for start, n in zip(starts, lengths, strict=True)]
    return InteractionLog(
        items=np.concatenate(walks).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        user_ids=[f"u{number}" for number in range(N_USERS)],
    )


def write_cycle(path) -> RunDir:
    """A run whose data stage is the circle, and whose items have texts to tokenize."""
    run = RunDir(path)
    names = ["red", "green", "blue", "white"]
    things = ["cup", "lamp", "chair", "rope", "bell", "book"]
    texts = [f"{names[i % 4]} {things[i // 4]}" for i in range(N_ITEMS)]
    with run.begin("data", DataConfig()) as stage:
        Catalog([f"i{number}" for number in range(N_ITEMS)], texts, texts).save(stage)
        cycle_log().save(stage)
        stage.publish()
    return run


@pytest.fixture(scope="session")
def cycle(tmp_path_factory):
    return write_cycle(tmp_path_factory.mktemp("cycle") / "run")


def tokenized_cycle(path, codes: int = 8) -> RunDir:
    """The circle with a tokenizer stage."""
    from streamctl.tokenizer.stage import tokenize

    run, few = write_cycle(path), {"levels": 3, "codes": codes, "neighbours": 5}
    tokenize(run, TokenizeConfig(encoder="tfidf", dim=8, method="rqkmeans", **few))
    return run


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory):
    return tokenized_cycle(tmp_path_factory.mktemp("tokenized") / "run")


class BaselineContract:
    """What every baseline keeps. A new one passes by setting `name`, and `settings` if it is slow.

    Attributes:
        name: its name in the registry.
        settings: configuration that learns the circle in a few seconds.
        reaches: recall@1 on the circle's test items that it must reach.
    """

    name: str
    settings: ClassVar[dict] = {}
    reaches: float = 0.9

    @pytest.fixture(scope="class")
    def run(self, cycle):
        return cycle

    @pytest.fixture(scope="class")
    def config(self):
        quick = {"epochs": 20, "batch": 32, "lr": 5e-3, "dropout": 0.1, "dim": 32}
        own = baseline_class(self.name).defaults
        chosen = {key: value for key, value in quick.items() if key in own} | self.settings
        return BaselineConfig(name=self.name, **chosen)

    @pytest.fixture(scope="class")
    def stage(self, run, config):
        return train_baseline(run, config, device="cpu")

    @pytest.fixture(scope="class")
    def model(self, stage):
        return baseline_class(self.name).load(stage)

    @pytest.fixture(scope="class")
    def split(self, run):
        return load_data(run)[1]

    def test_it_learns_the_circle(self, model, split):
        found = evaluate(model, split.test, n_items=N_ITEMS, masked=True)
        assert found.metrics["recall@1"] >= self.reaches

    def test_a_ranking_holds_every_item_once(self, model, split):
        history = torch.from_numpy(split.test.histories(np.arange(5)))
        ranking = model.recommend(history, N_ITEMS, users=np.arange(5))
        expected = torch.arange(N_ITEMS).expand(5, -1)
        assert torch.equal(ranking.items.cpu().sort(1).values, expected)
        assert (ranking.scores.diff(dim=1) <= 0).all()

    def test_excluded_items_are_not_recommended(self, model, split):
        seen = split.test.seen(np.arange(5))
        history = torch.from_numpy(split.test.histories(np.arange(5)))
        ranking = model.recommend(history, 10, users=np.arange(5), exclude=seen)
        for items, banned in zip(ranking.items.cpu().numpy(), seen, strict=True):
            assert not np.isin(items, banned).any()

    def test_padding_does_not_change_a_ranking(self, model, split):
        history = torch.from_numpy(split.test.histories(np.array([3])))
        padded = F.pad(history, (0, 4), value=-1)
        one, other = (model.recommend(h, 5, users=np.array([3])) for h in (history, padded))
        assert torch.equal(one.items, other.items)
        assert torch.allclose(one.scores, other.scores, atol=1e-4)

    def test_a_stranger_gets_a_ranking_too(self, model):
        ranking = model.recommend(torch.tensor([[3, 4, 5]]), 10)
        assert (ranking.items >= 0).all()

    def test_an_interrupted_training_ends_bit_identical(self, run, config, monkeypatch, tmp_path):
        cls = baseline_class(self.name)
        if not cls.losses:
            pytest.skip("nothing is trained")
        short = dataclasses.replace(config, epochs=2)
        whole = train_baseline(_copy_run(run, tmp_path / "whole"), short, device="cpu")
        cut = _copy_run(run, tmp_path / "cut")
        steps, loss = 0, cls.training_loss

        def failing(model, batch):
            nonlocal steps
            steps += 1
            if batch.epoch == 1 and steps % 3 == 0:
                raise KeyboardInterrupt
            return loss(model, batch)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cls, "training_loss", failing)
            train_baseline(cut, short, device="cpu")
        assert not cut.stage(f"baselines/{self.name}").complete
        assert train_baseline(cut, short, device="cpu").hash == whole.hash

    def test_a_complete_stage_is_left_alone(self, run, config, stage):
        before = stage.manifest
        assert train_baseline(run, config, device="cpu").manifest == before


def _copy_run(run: RunDir, folder) -> RunDir:
    """The run's data and tokenizer alone."""
    for name in ("data", "tokenizer"):
        if run.stage(name).complete:
            shutil.copytree(run.stage(name).path, folder / name)
    return RunDir(folder)


class TestPopularity(BaselineContract):
    name = "popularity"
    reaches = 0.0

    def test_items_come_in_the_order_of_their_training_counts(self, model, split):
        items = model.recommend(torch.tensor([[1]]), N_ITEMS).items[0].numpy()
        assert (np.diff(split.popularity()[items]) <= 0).all()

    def test_scores_are_counts_of_new_items_too(self, run, config, split):
        model = baseline_class(self.name)(config, split)
        model.add_items(np.zeros((2, 1)))
        model.append_all([(0, [N_ITEMS + 1])])
        found = model.recommend(torch.tensor([[1]]), N_ITEMS + 3, exclude=[np.array([0])])
        items, scores = found.items[0].numpy(), found.scores[0].numpy()
        counts = np.append(split.popularity(), [0, 1])
        assert (scores[:-2] == counts[items[:-2]]).all() and items[-3] == N_ITEMS
        assert items[-2:].tolist() == [-1, -1] and np.isneginf(scores[-2:]).all()


class TestTransitions(BaselineContract):
    name = "transitions"
    reaches = 0.5

    @pytest.fixture(scope="class")
    def run(self, tokenized):
        return tokenized


class TestKNN(TestTransitions):
    name = "knn"


class TestRanker(TestTransitions):
    name = "ranker"


class TestSASRecCE(BaselineContract):
    name = "sasrec_ce"


class TestSASRecBCE(BaselineContract):
    name = "sasrec_bce"
    settings: ClassVar[dict] = {"epochs": 50}
    reaches = 0.4  # one negative a position learns slower


class TestGRU4Rec(BaselineContract):
    name = "gru4rec"


class TestBERT4Rec(BaselineContract):
    name = "bert4rec"
    settings: ClassVar[dict] = {"epochs": 40}
    reaches = 0.6  # it learns at hidden places only


class TestCaser(BaselineContract):
    name = "caser"

    def test_a_user_who_trains_nothing_has_the_zero_vector(self):
        items, offsets = np.arange(12, dtype=np.int32) % 5, np.array([0, 4, 8, 12])
        cuts = np.array([[0, 1], [5, 6], [11, 12]])
        split = Split(InteractionLog(items, offsets, ["a", "b", "c"], cuts=cuts), n_items=5)
        config = BaselineConfig(name="caser", dim=4, dropout=0.0, loss="ce", repeat=False)
        model = baseline_class("caser")(config, split)
        assert (model.users.weight != 0).any(1).tolist() == [False, False, True]
        history = torch.tensor([[1, 2]])
        strangers = [model.recommend(history, 3, users=np.array([user])) for user in (-1, 3)]
        assert torch.equal(*(ranking.scores for ranking in strangers))  # 3 came while it serves


class TestTiger(BaselineContract):
    name = "tiger"
    settings: ClassVar[dict] = {"epochs": 12, "batch": 64, "lr": 6e-3}
    reaches = 0.5  # a few epochs only

    @pytest.fixture(scope="class")
    def run(self, tokenized):
        return tokenized


def test_every_registered_baseline_keeps_the_contract():
    direct = BaselineContract.__subclasses__()
    tested = {cls.name for cls in (*direct, *TestTransitions.__subclasses__())}
    assert tested == set(BASELINES)


@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-5), (True, 0.03)])
def test_the_in_place_cross_entropy_equals_autograd(monkeypatch, low, tolerance):
    monkeypatch.setattr(objectives, "_LOGITS", 17 * 512)  # more rows than one chunk
    monkeypatch.setattr(objectives, "_in_bf16", lambda weight: low)
    torch.manual_seed(0)
    hidden = torch.randn(1100, 6, requires_grad=True)
    weight = torch.randn(17, 6, requires_grad=True)
    bias = torch.randn(17, requires_grad=True)
    targets = torch.randint(17, (1100,))
    for used in (bias, None):
        wanted = (hidden, weight) if used is None else (hidden, weight, bias)
        ours = objectives.catalogue_cross_entropy(hidden, weight, targets, used)
        grads = torch.autograd.grad(3 * ours, wanted)
        logits = hidden @ weight.T if used is None else hidden @ weight.T + used
        plain = F.cross_entropy(logits, targets)
        assert ours.item() == pytest.approx(plain.item(), abs=tolerance)
        for one, other in zip(grads, torch.autograd.grad(3 * plain, wanted), strict=True):
            assert torch.allclose(one, other, atol=tolerance * other.abs().max())


def test_sampled_bce_by_hand():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.5], [-2.0], [1.0]])
    loss = objectives.sampled_bce(hidden, weight, torch.tensor([0]), torch.tensor([[1, 2]]))
    by_hand = -np.log(1 / (1 + np.exp(-0.5)))
    by_hand += -np.log(1 - 1 / (1 + np.exp(2.0))) - np.log(1 - 1 / (1 + np.exp(-1.0)))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_negatives_are_never_the_users_own_and_reach_every_other_item():
    taken = torch.tensor([[0, 1, 2], [3, 4, 4]])
    generator = torch.Generator().manual_seed(0)
    drawn = objectives.sample_negatives(taken, 400, 6, generator)
    assert set(drawn[0].tolist()) == {3, 4, 5}
    assert set(drawn[1].tolist()) == {0, 1, 2, 5}
    with pytest.raises(ValueError, match="no negatives"):
        objectives.sample_negatives(taken, 1, 3, generator)


def test_whole_sequences_predict_every_training_target_once():
    log = cycle_log()
    split = Split(log, history=3, n_items=N_ITEMS)
    rows = whole_sequences(split.train, 3)
    found = [
        (int(user), place)
        for user, start, end in zip(rows.users, rows.start, rows.end, strict=True)
        for place in range(start + 1, end + 1)
    ]
    wanted = list(zip(split.train.users.tolist(), split.train.end.tolist(), strict=True))
    assert sorted(found) == sorted(wanted)


def test_targets_of_a_sequence_are_what_follows_each_position():
    history, target = torch.tensor([[4, 5, 6]]), torch.tensor([7])
    assert shifted_targets(history, target).tolist() == [[5, 6, 7]]


def test_the_last_state_is_that_of_the_last_real_item():
    states = torch.arange(6.0).reshape(2, 3, 1)
    history = torch.tensor([[1, 2, -1], [1, 2, 3]])
    assert last_states(states, history).tolist() == [[1.0], [5.0]]


def test_too_few_items_left_are_marked():
    ranking = rank_scores(torch.tensor([[0.1, 0.2, 0.3]]), 3, [np.array([0, 2])])
    assert ranking.items.tolist() == [[1, -1, -1]]


def test_open_settings_take_the_methods_own(cycle):
    config = settle(cycle, BaselineConfig(name="sasrec_ce", dropout=0.25))
    own = baseline_class("sasrec_ce").defaults
    assert config == dataclasses.replace(
        BaselineConfig(name="sasrec_ce", loss="ce"), **(own | {"dropout": 0.25})
    )


@pytest.mark.parametrize("name", ["sasrec_ce", "gru4rec", "bert4rec", "caser"])
def test_a_learned_bias_tells_whether_users_come_back_to_what_they_had(name, tmp_path):
    """Where nobody takes an item twice it becomes negative, and the seen fall behind."""
    run = write_cycle(tmp_path / "run")
    quick = {"epochs": 6, "batch": 32, "lr": 2e-2, "dropout": 0.1, "dim": 16}
    config = BaselineConfig(name=name, repeat=True, **quick)
    model = baseline_class(name).load(train_baseline(run, config, device="cpu"))
    bonus = model.bonus.item()
    assert bonus < -0.1
    history = torch.tensor([[3, 4, 5, -1]])
    ranking = model.recommend(history, N_ITEMS)
    plain = model.score(history)[0]
    for item, score in zip(ranking.items[0].tolist(), ranking.scores[0].tolist(), strict=True):
        assert score == pytest.approx(plain[item].item() + bonus * (item in (3, 4, 5)), abs=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BaselineConfig(name="sasrec_cd"), "did you mean sasrec_ce"),
        (BaselineConfig(name="caser", loss="bce", repeat=True), "repeat needs"),
        (BaselineConfig(name="gru4rec", loss="bce"), "takes ce"),
        (BaselineConfig(name="gru4rec", heads=2), "no setting 'heads'"),
        (BaselineConfig(name="popularity", epochs=2), "no setting 'epochs'"),
    ],
)
def test_a_setting_the_method_does_not_have_is_refused(cycle, config, message):
    with pytest.raises(UsageError, match=message):
        train_baseline(cycle, config)


def test_tiger_needs_a_tokenizer(cycle):
    with pytest.raises(StreamctlError, match="streamctl tokenize"):
        train_baseline(cycle, BaselineConfig(name="tiger"))


def test_positions_limits_what_tiger_and_pretrain_learn_of_each_user(
    tokenized, tmp_path, monkeypatch
):
    run = RunDir(shutil.copytree(tokenized.path, tmp_path / "run"))
    seen = []

    def caught(*_, examples, **__):
        seen.append(examples)
        raise StopIteration

    monkeypatch.setattr("streamctl.training.pretrain.fit", caught)
    monkeypatch.setattr("streamctl.baselines.train.fit", caught)
    train = load_data(run)[1].train
    for hold in (0, 1):
        with pytest.raises(StopIteration):
            pretrain(run, PretrainConfig(positions=2, hold=hold), force=True)
        with pytest.raises(StopIteration):
            config = BaselineConfig(name="tiger", positions=2 + hold)
            train_baseline(run, config, force=True)
        held, every = (set(zip(found.users, found.end, strict=True)) for found in seen[-2:])
        last = {user: train.end[train.users == user].max() for user in set(train.users)}
        assert held == {(user, end) for user, end in every if end <= last[user] - hold}
        assert min(last[user] - end for user, end in every) == 0
        assert max(last[user] - end for user, end in every) == 1 + hold
