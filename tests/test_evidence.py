"""Thinking by evidence: nothing leaks, look-ups change the ranking, resume is exact."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_baselines import N_ITEMS, write_cycle
from test_memory import rows

from streamctl.config import EvalConfig, EvidenceConfig, TokenizeConfig
from streamctl.data import load_data
from streamctl.decode.evidence import (
    EvidenceSettings,
    EvidenceThinker,
    Memo,
    Question,
    repeats,
)
from streamctl.decode.questions import VIEWS, Asker, LookAlikes
from streamctl.errors import StreamctlError
from streamctl.evaluation.metrics import gains
from streamctl.evaluation.stage import evaluate_run, read_result
from streamctl.files import file_hash
from streamctl.retrieval.memory import Memory
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize
from streamctl.training import thought
from streamctl.training.evidence import evidence, load_thinker, look_alikes
from streamctl.training.material import Material

CONFIG = EvidenceConfig(epochs=6, batch=32, lr=5e-3, neighbours=8, look_ups=2, patience=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    run = write_cycle(tmp_path_factory.mktemp("evidence") / "run")
    settings = {"encoder": "tfidf", "dim": 8, "method": "rqkmeans", "levels": 3, "codes": 8}
    tokenize(run, TokenizeConfig(**settings, neighbours=5))
    evidence(run, CONFIG, device="cpu")
    return run


@pytest.fixture(scope="module")
def thinker(run) -> EvidenceThinker:
    return load_thinker(run, CPU, look_ups=CONFIG.look_ups)


@pytest.fixture(scope="module")
def chooser(run, thinker) -> thought.Chooser:
    return thought.Chooser(
        thinker.ranker, thinker.memory, look_alikes(Material.load(run)), load_data(run)[1].valid,
        neighbours=CONFIG.neighbours, look_ups=CONFIG.look_ups,
    )  # fmt: skip


def test_a_thought_is_as_long_as_gains_most_surely():
    none, sure, lucky = np.zeros(100), np.full(100, 0.1), np.repeat([1.0, 0.0], [12, 88])
    assert thought.best_length(np.array([none, sure, 2 * sure])) == 2
    assert thought.best_length(np.array([none, sure, lucky])) == 1  # a mean of 0.12, by a few
    assert thought.best_length(np.array([sure, none, none])) == 1  # one at least is asked


def test_the_thought_that_was_chosen_is_the_one_that_is_asked(run):
    report = run.stage("evidence").json("report.json")
    assert load_thinker(run, CPU).look_ups == report["look_ups"]
    assert 1 <= report["look_ups"] <= CONFIG.look_ups
    assert len(report["settings"]["questions"]) == CONFIG.look_ups
    for step, question in zip(report["tried"], report["settings"]["questions"], strict=True):
        assert step[question["view"]] == max(step.values())


def test_another_thought_for_the_same_settings_of_training_trains_no_more(run, tmp_path):
    other = RunDir(tmp_path / "run")
    for name in ("data", "tokenizer", "evidence"):
        shutil.copytree(run.path / name, other.path / name)
    began = run.stage("evidence").manifest["wall_s"]
    evidence(other, replace(CONFIG, look_ups=1), device="cpu", force=True)
    first, second = run.stage("evidence"), other.stage("evidence")
    assert len(second.json("report.json")["settings"]["questions"]) == 1
    assert second.manifest["wall_s"] > began
    for name in ("model.safetensors", "metrics.jsonl", "keys.npy"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    evidence(other, replace(CONFIG, look_ups=1, epochs=1), device="cpu", force=True)
    assert (
        second.file("model.safetensors").read_bytes()
        != first.file("model.safetensors").read_bytes()
    )


def test_the_choice_sees_the_ranks_that_the_thinker_gives(run, thinker, chooser):
    split = load_data(run)[1]
    settings, report = thought.choose(chooser)
    for count in range(CONFIG.look_ups + 1):
        own = EvidenceThinker(
            thinker.ranker, thinker.memory, settings, thinker.look_alikes, look_ups=count
        )
        history = torch.from_numpy(split.valid.histories(np.arange(len(split.valid))))
        trace = own.think(own.ranker.states(history), history, split.valid.users)
        scores = own.log_scores(history, trace)
        wanted = torch.from_numpy(split.valid.targets[:, None])
        ranks = (scores > scores.gather(1, wanted)).sum(1).numpy()
        expected = gains(ranks, 10).mean()
        assert report["valid"][f"{count} look-ups"]["ndcg@10"] == pytest.approx(expected, abs=1e-3)


def test_every_view_asks_something_else_and_finds_nobody_twice():
    keys, taken, users, recent = rows(400)
    memory = Memory(keys, taken, users, recent)
    alike = (np.arange(20)[:, None] + np.arange(1, 4)) % 20
    asker = Asker(
        memory, LookAlikes(alike), torch.from_numpy(keys[:9] + 0.1), recent[:9], users[:9]
    )
    evidence = torch.eye(20)[:9]
    known, seen = np.empty((9, 0), np.int64), set()
    for name in VIEWS:
        first = asker.ask(name, 5, evidence=evidence)
        seen.add(str(first.rows))
        assert (users[first.rows] != users[:9, None]).all()
        found = asker.ask(name, 5, known, evidence)
        for old, new in zip(known, found.rows, strict=True):
            assert not set(old) & set(new), name
        known = np.concatenate([known, found.rows], 1)
    assert len(seen) == len(VIEWS)


def test_a_question_follows_what_was_found(thinker):
    history = np.array([[2, 3]])
    state = thinker.ranker.states(torch.from_numpy(history))
    asker = Asker(thinker.memory, thinker.look_alikes, state, history[:, ::-1], None)
    evidence = torch.zeros(1, N_ITEMS)
    evidence[0, 17] = 1.0
    alone, led = asker.ask("follow", 200), asker.ask("follow", 200, evidence=evidence)
    had17 = [(thinker.memory.recent[x.rows[0]] == 17).any() for x in (alone, led)]
    assert had17 == [False, True]


def test_the_memory_holds_training_prefixes_and_no_held_out_item(run, thinker):
    split, memory = load_data(run)[1], thinker.memory
    assert len(memory) == len(split.train)
    offsets, items = split.log.offsets, split.log.items
    for row in range(0, len(memory), 7):
        user = memory.users[row]
        training = items[offsets[user] : offsets[user + 1] - 2].tolist()
        joined = memory.recent[row][::-1].tolist() + memory.taken[row].tolist()
        joined = [item for item in joined if item >= 0]
        text = ",".join(map(str, training))
        assert ",".join(map(str, joined)) in text


def test_thoughts_never_come_from_the_users_own_rows(run, thinker):
    test = load_data(run)[1].test
    index = np.flatnonzero(test.lengths == 5)[:20]
    start = thinker.ranker.states(torch.from_numpy(test.histories(index)))
    history = torch.from_numpy(test.histories(index))
    trace = thinker.think(start, history, test.users[index])
    for look_up in trace.look_ups:
        assert (thinker.memory.users[look_up.rows] != test.users[index, None]).all()
    first, second = (look_up.rows for look_up in trace.look_ups)
    assert not any((set(a) & set(b)) - {-1} for a, b in zip(first, second, strict=True))


def test_the_score_is_what_the_formula_says(thinker):
    questions = Question("state", 8, 0.2, 0.5, 30.0), Question("state", 5, 0.4, 0.0, 7.0)
    settings = EvidenceSettings(questions, repeat=-2.0)
    own = EvidenceThinker(thinker.ranker, thinker.memory, settings)
    history = torch.tensor([[0, 1, 2]])
    trace = own.think(own.ranker.states(history), history)
    scores = own.log_scores(history, trace)[0].double()
    state = trace.state[0].double()
    total = torch.zeros(N_ITEMS, dtype=torch.float64)
    for question, look_up in zip(questions, trace.look_ups, strict=True):
        assert look_up.rows.shape == (1, question.neighbours)
        for row in look_up.rows[0]:
            key = torch.from_numpy(own.memory.keys[row]).double()
            cosine = key @ state / state.norm()
            weight = torch.exp((cosine - 1) / question.temperature)
            for after, item in enumerate(own.memory.taken[row]):
                if item >= 0:
                    total[item] += question.weight * weight * question.decay**after
    expected = torch.log_softmax(own.vectors.double() @ state, 0) + torch.log(1 + total)
    expected[[0, 1, 2]] -= 2.0
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_a_thoughts_beginning_is_the_shorter_thought(thinker):
    history, users = torch.tensor([[5, 6, 7], [1, 2, 3]]), np.array([3, 4])
    start = thinker.ranker.states(history)
    whole = thinker.think(start, history, users)
    thinker.look_ups, count = 1, thinker.look_ups
    short = thinker.think(start, history, users)
    thinker.look_ups = count
    expected, found = (thinker.log_scores(history, x) for x in (short, whole.first(1)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(thinker.log_scores(history[1:], whole.row(1).first(1)), expected[1:])


def test_repeats_are_weighed_once_and_padding_is_no_item():
    history = torch.tensor([[1, 1, 3], [0, -1, -1]])
    scores = repeats(torch.zeros(2, 4), history, -2.0)
    assert scores.tolist() == [[0, -2, 0, -2], [-2, 0, 0, 0]]


def test_shared_look_ups_change_no_answer_and_are_still_paid_for(run):
    memo = Memo()
    history, users = torch.tensor([[5, 6, 7], [1, 2, 3]]), np.array([3, 4])
    for count in (2, 1, 2):
        alone, sharing = (load_thinker(run, CPU, look_ups=count) for _ in range(2))
        sharing.memo = memo
        expected, found = (x.rank(history, 5, users=users) for x in (alone, sharing))
        assert torch.equal(expected.items, found.items)
    assert memo.saved_s > 0
    other = sharing.rank(history, 5, users=users[::-1].copy())
    assert torch.equal(other.items, alone.rank(history, 5, users=users[::-1].copy()).items)


def test_padding_on_the_right_changes_no_state(thinker):
    plain = thinker.ranker.states(torch.tensor([[3, 4]]))
    padded = thinker.ranker.states(torch.tensor([[3, 4, -1, -1]]))
    torch.testing.assert_close(plain, padded)


def test_a_look_up_changes_the_ranking_and_says_why(run, thinker):
    history = torch.tensor([[5, 6, 7]])
    strong = EvidenceThinker(
        thinker.ranker, thinker.memory, EvidenceSettings((Question(neighbours=8, weight=1e3),))
    )
    quiet = load_thinker(run, CPU, look_ups=0)
    assert not torch.equal(strong.rank(history, 10).items, quiet.rank(history, 10).items)
    look_up = strong.think(strong.ranker.states(history), history).look_ups[0]
    reasons = strong.reasons(look_up, 0)
    assert len(reasons) == 3
    for had, took in reasons:
        assert (had[0] + 1) % N_ITEMS == took  # on the circle the next item is the number plus one


def test_the_state_learns_the_circle(thinker):
    ranking = thinker.rank(torch.tensor([[5, 6, 7], [20, 21, 22]]), 1)
    assert ranking.items[:, 0].tolist() == [8, 23]


def test_random_evidence_is_fixed_for_a_user_whatever_the_batch(run):
    drawn = load_thinker(run, CPU, look_ups=2, random=3)
    start = torch.randn(4, drawn.vectors.shape[1])
    users, history = np.array([4, 9, 1, 30]), torch.tensor([[1], [2], [3], [4]])
    together = drawn.think(start, history, users).look_ups[0].rows
    alone = drawn.think(start[1:2], history[1:2], users[1:2]).look_ups[0].rows
    np.testing.assert_array_equal(together[1:2], alone)
    assert len({tuple(row) for row in together}) == 4


def test_random_evidence_asks_what_the_thinker_asks_and_weighs_alike(thinker):
    settings = EvidenceSettings((Question(neighbours=8), Question("follow", neighbours=8)))
    users, history = np.array([4, 9]), torch.tensor([[5, 6, 7], [20, 21, 22]])
    start = thinker.ranker.states(history)
    own, drawn = (
        EvidenceThinker(thinker.ranker, thinker.memory, settings, random=random).think(
            start, history, users
        )
        for random in (None, 3)
    )
    for found, instead in zip(own.look_ups, drawn.look_ups, strict=True):
        assert torch.equal(found.weights, instead.weights)
        assert (found.rows != instead.rows).mean() > 0.8


def test_weights_of_another_version_are_trained_anew(run, tmp_path):
    other = RunDir(tmp_path / "run")
    for name in ("data", "tokenizer", "evidence"):
        shutil.copytree(run.path / name, other.path / name)
    stage = other.stage("evidence")
    weights = stage.file("model.safetensors")
    save_file({f"old.{name}": one for name, one in load_file(weights).items()}, weights)
    manifest = stage.manifest
    manifest["artifacts"]["model.safetensors"] = file_hash(weights)
    del manifest["seal"]
    (stage.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StreamctlError, match=r"not those of this version.*evidence .*--force"):
        load_thinker(other, CPU)
    evidence(other, CONFIG, device="cpu", force=True)
    anew = other.require("evidence").file("model.safetensors")
    assert anew.read_bytes() == run.stage("evidence").file("model.safetensors").read_bytes()


def test_damaged_weights_are_not_taken_over(run, tmp_path):
    other = RunDir(tmp_path / "run")
    for name in ("data", "tokenizer", "evidence"):
        shutil.copytree(run.path / name, other.path / name)
    weights = other.stage("evidence").path / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-3] ^= 0x40
    weights.write_bytes(damaged)
    evidence(other, replace(CONFIG, look_ups=1), device="cpu", force=True)
    anew = other.require("evidence").file("model.safetensors")
    assert anew.read_bytes() == run.stage("evidence").file("model.safetensors").read_bytes()


def test_a_stage_that_was_interrupted_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    from streamctl.training import loop

    other = RunDir(tmp_path / "run")
    for name in ("data", "tokenizer"):
        shutil.copytree(run.path / name, other.path / name)
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", 0.0)
    calls, original = 0, loop._step

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        evidence(other, CONFIG, device="cpu")
    monkeypatch.setattr(loop, "_step", original)
    evidence(other, CONFIG, device="cpu")
    for name in ("model.safetensors", "keys.npy", "report.json"):
        first, second = ((r.path / "evidence" / name).read_bytes() for r in (run, other))
        assert first == second, name


def test_the_evaluation_has_the_thinker_and_its_controls(run):
    result = read_result(evaluate_run(run, EvalConfig(bootstrap=200), device="cpu"))
    assert "stream_evidence" in result["methods"]
    counts = {f"evidence_l{count}" for count in range(CONFIG.look_ups + 1)}
    controls = {name for name in result["controls"] if "evidence" in name}
    assert controls == counts | {"random_evidence", "wide_evidence"}
    assert (run.stage("eval").path / "look-ups.png").stat().st_size > 5000
    assert {"evidence_l0", "random_evidence", "wide_evidence"} <= result["comparisons"][
        "stream_evidence"
    ].keys()


def test_recommend_prints_the_look_ups(run, streamctl):
    shown = streamctl("recommend", "--run", run.path, "--evidence", "--user", "u3", "-k", "3")
    assert shown.returncode == 0, shown.stderr
    assert "Look-up 1" in shown.stdout
    assert "took" in shown.stdout
