"""Reading evidence: what the reader is told, that it learns, and that it stays only if it helps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evidence import CONFIG, CPU, run  # noqa: F401

from streamctl.config import EvalConfig
from streamctl.data import load_data
from streamctl.decode.evidence import EvidenceThinker
from streamctl.decode.reader import Clues, Reader
from streamctl.errors import StreamctlError
from streamctl.evaluation.methods import Models
from streamctl.files import file_hash
from streamctl.runs import RunDir
from streamctl.training import evidence as stages
from streamctl.training.evidence import READER, evidence, load_thinker
from streamctl.training.reading import Lesson, gather, learn, smooth_ndcg, train

ITEMS, LOOK_UPS = 12, 2


def blank() -> Reader:
    torch.manual_seed(0)
    return Reader(LOOK_UPS, torch.randn(ITEMS, 4), torch.arange(ITEMS))


def lesson(users: int, seed: int) -> Lesson:
    """The second look-up's evidence is right, the first one's and the summed score are noise."""
    draws = torch.Generator().manual_seed(seed)
    items = torch.stack([torch.randperm(ITEMS, generator=draws) for _ in range(users)])
    summed = torch.randn(users, ITEMS, LOOK_UPS + 1, generator=draws)
    own = torch.randn(users, ITEMS, 7, generator=draws)
    found = torch.rand(users, ITEMS, LOOK_UPS, 2, generator=draws)
    hit = torch.zeros(users, ITEMS, dtype=torch.bool)
    hit[torch.arange(users), found[:, :, 1, 0].argmax(1)] = True
    return Lesson(Clues(items, summed, own, found), hit)


@pytest.fixture(scope="module")
def plain(run) -> EvidenceThinker:  # noqa: F811
    thinker = load_thinker(run, CPU, look_ups=CONFIG.look_ups)
    thinker.reader = None
    return thinker


@pytest.fixture(scope="module")
def asked(run, plain):  # noqa: F811
    valid = load_data(run)[1].valid
    history = torch.from_numpy(valid.histories(np.arange(len(valid))))
    return history, plain.think(plain.ranker.states(history), history, valid.users)


def test_the_smooth_ndcg_of_sharp_scores_is_the_ndcg():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]]) * 1000
    hit = torch.tensor([[True, False, False], [False, False, True]])
    expected = (1 + 1 / np.log2(3)) / 2
    assert smooth_ndcg(scores, hit).item() == pytest.approx(expected, abs=1e-4)


def test_before_training_the_reader_repeats_the_summed_scores():
    clues = lesson(5, 0).clues
    for count in range(LOOK_UPS + 1):
        torch.testing.assert_close(blank()(clues, count), clues.summed[:, :, count])


def test_the_reader_learns_which_look_up_to_trust(monkeypatch):
    monkeypatch.setattr("streamctl.training.reading.STEPS", 400)
    reader = train(blank(), lesson(2000, 0), seed=0)
    held_out = lesson(500, 1)
    with torch.no_grad():
        ranks = [held_out.ranks(reader(held_out.clues, count)) for count in range(LOOK_UPS + 1)]
    right = [(rank == 0).mean() for rank in ranks]
    assert right[0] < 0.3 and right[1] < 0.3
    assert right[2] > 0.6


def test_look_ups_that_were_not_asked_say_nothing():
    reader = train(blank(), lesson(500, 0), seed=0)
    clues = lesson(20, 1).clues
    other = replace(clues, found=clues.found.clone())
    other.found[:, :, 1] += 1
    torch.testing.assert_close(reader(clues, 1), reader(other, 1))
    assert not torch.equal(reader(clues, 2), reader(other, 2))
    short = replace(clues, found=clues.found[:, :, :1], summed=clues.summed[:, :, :2])
    torch.testing.assert_close(reader(short), reader(clues, 1))


def test_the_clues_are_those_of_the_history_and_the_catalogue(run, plain, asked):  # noqa: F811
    history, trace = asked
    texts = torch.from_numpy(run.stage("tokenizer").array("item_vectors.npy"))
    taken = torch.from_numpy(load_data(run)[1].popularity())
    reader = Reader(CONFIG.look_ups, texts, taken)
    clues, scores = plain.clues(reader, history, trace)
    torch.testing.assert_close(scores, plain.log_scores(history, trace))
    for count in range(CONFIG.look_ups + 1):
        expected = plain.log_scores(history, trace.first(count)).gather(1, clues.items)
        torch.testing.assert_close(clues.summed[:, :, count], expected)
    opinion = plain.ranker.opinion(trace.state, plain.vectors, history)
    unit = torch.nn.functional.normalize(texts, dim=1)
    for user in range(0, len(history), 7):
        had = history[user][history[user] >= 0]
        for place in (0, 3):
            item = int(clues.items[user, place])
            own = clues.own[user, place]
            assert own[0] == pytest.approx(float(opinion[user, item]), abs=1e-4)
            assert bool(own[1]) == (item in had.tolist())
            assert own[2] == pytest.approx(np.log1p(int(taken[item])), abs=1e-5)
            assert own[4] == pytest.approx(float(unit[item] @ unit[had[-1]]), abs=1e-5)
            taste = torch.nn.functional.normalize(unit[had].sum(0), dim=0)
            assert own[5] == pytest.approx(float(unit[item] @ taste), abs=1e-5)
            assert own[6] == pytest.approx(np.log(len(had)), abs=1e-6)
            for number, look_up in enumerate(trace.look_ups):
                took = plain.memory.taken[look_up.rows[user]]
                weights = look_up.weights[user].numpy() * (look_up.rows[user] >= 0)
                found = clues.found[user, place, number]
                assert found[0] == pytest.approx(weights[took[:, 0] == item].sum(), abs=1e-5)
                later = ((took[:, 1:] == item) * weights[:, None]).sum()
                assert found[1] == pytest.approx(later, abs=1e-5)


def test_items_that_are_not_read_come_after_those_that_are(plain, asked, monkeypatch, run):  # noqa: F811
    history, trace = asked
    monkeypatch.setattr("streamctl.decode.evidence.CANDIDATES", 5)
    texts = torch.from_numpy(run.stage("tokenizer").array("item_vectors.npy"))
    reader = Reader(CONFIG.look_ups, texts, torch.ones(len(texts)))
    torch.nn.init.normal_(reader.networks[-1].straight.weight)
    read = EvidenceThinker(
        plain.ranker, plain.memory, plain.settings, plain.look_alikes, reader=reader
    )
    before, after = plain.log_scores(history, trace), read.log_scores(history, trace)
    items = before.topk(5, 1).indices
    torch.testing.assert_close(after.topk(5, 1).indices.sort().values, items.sort().values)
    rest = before.argsort(1, descending=True)[:, 5:]
    torch.testing.assert_close(after.argsort(1, descending=True)[:, 5:], rest)


def test_a_reader_is_judged_by_users_that_it_was_not_trained_on(run, plain, monkeypatch):  # noqa: F811
    """Of each fold's reader, and of the one that is kept: whom it learned from."""
    split = load_data(run)[1]
    texts = run.stage("tokenizer").array("item_vectors.npy")
    learned, judged = [], []

    class Noted(Lesson):
        def rows(self, rows):
            return Noted(self.clues.rows(rows), self.hit[rows])

        def ranks(self, scores):
            judged.append(self.clues.own)
            return super().ranks(scores)

    def gathered(thinker, reader, examples):
        lesson = gather(thinker, reader, examples)
        # Every user's clues are marked by their number.
        mark = torch.arange(len(lesson.hit)).float()[:, None, None].expand(lesson.clues.own.shape)
        return Noted(replace(lesson.clues, own=mark), lesson.hit)

    def noted(reader, lesson, seed):
        learned.append(lesson.clues.own)
        return reader

    monkeypatch.setattr("streamctl.training.reading.gather", gathered)
    monkeypatch.setattr("streamctl.training.reading.train", noted)
    learn(plain, split.valid, texts, split.popularity(), 0)
    whom = [set(own[:, 0, 0].int().tolist()) for own in learned]
    everyone = set(range(len(split.valid)))
    *folds, kept = whom
    lengths = CONFIG.look_ups + 1
    held_out = [
        set(own[:, 0, 0].int().tolist()) for own in judged[: len(folds) * lengths : lengths]
    ]
    assert kept == everyone == set.union(*held_out)
    for trained, scored in zip(folds, held_out, strict=True):
        assert trained == everyone - scored and scored


def test_the_same_seed_trains_the_same_reader(run, plain):  # noqa: F811
    split = load_data(run)[1]
    texts = run.stage("tokenizer").array("item_vectors.npy")
    reading, again = (learn(plain, split.valid, texts, split.popularity(), 0) for _ in range(2))
    np.testing.assert_array_equal(reading.gained, again.gained)
    shape = CONFIG.look_ups + 1, len(split.valid)
    assert reading.gained.shape == reading.summed.shape == shape
    for name, tensor in reading.reader.state_dict().items():
        assert torch.equal(tensor, again.reader.state_dict()[name]), name


def judged_as(run, folder, monkeypatch, gained, summed) -> RunDir:  # noqa: F811
    """A copy of the run whose thought was chosen again, its reader found to be worth so much."""
    other = RunDir(folder)
    for name in ("data", "tokenizer", "evidence"):
        shutil.copytree(run.path / name, other.path / name)
    honest = learn

    def told(*args):
        return replace(honest(*args), gained=gained, summed=summed)

    monkeypatch.setattr(stages, "learn", told)
    evidence(other, CONFIG, device="cpu", force=True)
    return other


@pytest.mark.parametrize("helps", [True, False])
def test_the_stage_keeps_a_reader_only_if_it_surely_helps(run, tmp_path, monkeypatch, helps):  # noqa: F811
    users = len(load_data(run)[1].valid)
    gained = np.tile([[0.1], [0.3], [0.2]], users) if helps else np.zeros((3, users))
    gained += np.random.default_rng(0).normal(0, 1e-3, gained.shape)
    summed = np.full_like(gained, 0.1)
    other = judged_as(run, tmp_path / "run", monkeypatch, gained, summed)
    stage = other.stage("evidence")
    report, thinker = stage.json("report.json"), load_thinker(other, CPU)
    assert (stage.path / READER).exists() == helps == (thinker.reader is not None)
    expected = gained if helps else summed
    for count in range(3):
        shown = report["valid"][f"{count} look-ups"]["ndcg@10"]
        assert shown == pytest.approx(expected[count].mean())
    if helps:
        assert report["look_ups"] == thinker.look_ups == 1


def test_a_kept_reader_ranks_no_validation_user_and_one_of_another_shape_is_refused(
    run,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    users = len(load_data(run)[1].valid)
    gained = np.tile([[0.1], [0.3], [0.2]], users)
    other = judged_as(run, tmp_path / "run", monkeypatch, gained, gained * 0)
    for split, reads in (("test", True), ("valid", False)):
        models = Models(other, EvalConfig(split=split), load_data(run)[1].valid, "cpu")
        assert (models.evidence().reader is not None) == reads
    stage = other.stage("evidence")
    tensors, manifest = load_file(stage.file(READER)), stage.manifest
    tensors["of_before"] = tensors.pop("own_mean")
    save_file(tensors, stage.file(READER))
    manifest["artifacts"][READER] = file_hash(stage.file(READER))
    del manifest["seal"]
    (stage.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StreamctlError, match=r"not those of this version.*evidence .*--force"):
        load_thinker(other, CPU)
