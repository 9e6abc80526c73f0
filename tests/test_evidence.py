"""Thinking by evidence: nothing leaks, look-ups change the ranking, resume is exact."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from test_baselines import N_ITEMS, write_cycle

from streamctl.config import EvalConfig, EvidenceConfig, TokenizeConfig
from streamctl.data import load_data
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker, repeats
from streamctl.evaluation.stage import evaluate_run, read_result
from streamctl.retrieval.memory import STRANGER, Memory
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize
from streamctl.training.evidence import evidence, load_thinker

CONFIG = EvidenceConfig(epochs=6, batch=32, lr=5e-3, neighbours=8, look_ups=2, patience=0)
CPU = torch.device("cpu")


def rows(count: int, width: int = 6, seed: int = 0, users: int = 10) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(count, width)).astype(np.float32)
    items = rng.integers(0, 20, (count, 5)).astype(np.int32)
    return keys, items[:, :4], rng.integers(0, users, count), items


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


def test_as_many_look_ups_as_ranked_best_on_validation(run):
    report = run.stage("evidence").json("report.json")
    found = [report["valid"][f"{count} look-ups"]["ndcg@10"] for count in (1, 2)]
    assert load_thinker(run, CPU).look_ups == report["look_ups"] == 1 + int(np.argmax(found))


def test_a_search_is_the_exact_cosine_order_without_the_users_own_rows():
    keys, taken, users, recent = rows(300)
    memory = Memory(keys, taken, users, recent)
    queries, askers = keys[:20] + 0.1, users[:20]
    found = memory.search(queries, 7, users=askers)
    length = np.linalg.norm(keys.astype(float), axis=1)
    cosine = queries.astype(float) @ keys.T / length / np.linalg.norm(queries, axis=1)[:, None]
    cosine[askers[:, None] == users] = -np.inf
    expected = np.argsort(-cosine, axis=1)[:, :7]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, expected, 1), atol=1e-5)


def test_rows_found_before_are_not_found_again():
    memory = Memory(*rows(50))
    queries = memory.keys[:9]
    first = memory.search(queries, 5).rows
    second = memory.search(queries, 5, known=first).rows
    together = memory.search(queries, 10).rows
    np.testing.assert_array_equal(np.concatenate([first, second], 1), together)


def test_baskets_are_compared_by_the_weighted_items_they_share():
    keys, taken, users, recent = rows(200)
    memory = Memory(keys, taken, users, recent)
    question = recent[:6] * 1
    question[:, 3:] = -1
    found = memory.search_items(memory.baskets(question), 8, users=users[:6])
    rarity = np.sqrt(np.log(201 / (np.bincount(taken[:, 0], minlength=20) + 1)))

    def vector(items: np.ndarray) -> np.ndarray:
        dense = np.zeros(20)
        for age, item in enumerate(items):
            dense[item] += 0.8**age * rarity[item] if item >= 0 else 0
        return dense / np.linalg.norm(dense)

    every = np.array([vector(items) for items in recent])
    cosine = np.array([vector(items) for items in question]) @ every.T
    cosine[users[:6, None] == users] = -np.inf
    expected = np.sort(cosine, axis=1)[:, ::-1][:, :8]
    np.testing.assert_allclose(found.cosine, expected, atol=1e-5)
    assert (users[found.rows] != users[:6, None]).all()
    again = memory.search_items(memory.baskets(question), 8, users=users[:6], known=found.rows)
    assert (again.cosine[:, 0] <= found.cosine[:, -1] + 1e-6).all()


def test_a_question_moves_towards_what_was_found(thinker):
    history = torch.tensor([[2, 3]])
    start = thinker.ranker.states(history)

    def thought(move: float, by: str):
        settings = EvidenceSettings(by, neighbours=3, move=move)
        own = EvidenceThinker(thinker.ranker, thinker.memory, settings, look_ups=2)
        return own.think(start, history)

    still, moved = thought(0.0, "items"), thought(5.0, "items")
    assert still.look_ups[1].rows.tolist() != moved.look_ups[1].rows.tolist()
    states = thought(0.5, "state").states[0]
    assert (states[1] - states[0]).norm() == pytest.approx(0.5 * float(start.norm()), rel=1e-4)


def test_too_few_rows_leave_places_empty():
    keys, taken, users, recent = rows(4, users=1)
    found = Memory(keys, taken, users, recent).search(keys[:1], 6, users=np.zeros(1, np.int64))
    assert (found.rows == -1).all()
    assert np.isneginf(found.cosine).all()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_appended_rows_are_found_and_survive_a_reload(kind, tmp_path):
    memory = Memory(*rows(400), kind=kind)
    new = np.full((1, 6), 3.0, np.float32)
    memory.append(new, np.full((1, 4), 7), np.full(1, STRANGER), np.full((1, 5), 9))
    assert memory.search(new, 1).rows[0, 0] == 400
    for name, array in memory.arrays().items():
        np.save(tmp_path / f"{name}.npy", array)
    again = Memory.load(tmp_path, kind)
    assert len(again) == 401
    assert again.search(new, 1).rows[0, 0] == 400


def test_fast_indexes_find_most_of_what_the_exact_one_finds():
    data = rows(3000, width=16)
    exact = Memory(*data).search(data[0][:50], 10).rows
    for kind in ("ivf", "hnsw"):
        found = Memory(*data, kind=kind).search(data[0][:50], 10).rows
        shared = np.mean([len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)])
        assert shared > 6, kind


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
    settings = EvidenceSettings("state", 8, 0.2, decay=0.5, weight=30.0, move=0.5, repeat=-2.0)
    own = EvidenceThinker(thinker.ranker, thinker.memory, settings, look_ups=2)
    history = torch.tensor([[0, 1, 2]])
    trace = own.think(own.ranker.states(history), history)
    scores = own.log_scores(history, trace)[0].double()
    state = trace.states[0, -1].double()
    p = torch.softmax(own.vectors.double() @ state, 0)
    total = torch.zeros(2, dtype=torch.float64)
    each = torch.zeros(2, N_ITEMS, dtype=torch.float64)
    for number, look_up in enumerate(trace.look_ups):
        cosine = torch.from_numpy(own.memory.keys[look_up.rows[0]]).double() @ (
            trace.states[0, number].double() / trace.states[0, number].double().norm()
        )
        weights = torch.softmax(cosine / 0.2, 0)
        for row, weight in zip(look_up.rows[0], weights, strict=True):
            for after, item in enumerate(own.memory.taken[row]):
                if item >= 0:
                    each[number, item] += weight * 0.5**after
                    total[number] += weight * 0.5**after
    found = (each / total[:, None]).mean(0)
    expected = torch.log(p) + torch.log(1 + 30 * found)
    expected[[0, 1, 2]] -= 2.0
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_repeats_are_weighed_once_and_padding_is_no_item():
    history = torch.tensor([[1, 1, 3], [0, -1, -1]])
    scores = repeats(torch.zeros(2, 4), history, -2.0)
    assert scores.tolist() == [[0, -2, 0, -2], [-2, 0, 0, 0]]


def test_padding_on_the_right_changes_no_state(thinker):
    plain = thinker.ranker.states(torch.tensor([[3, 4]]))
    padded = thinker.ranker.states(torch.tensor([[3, 4, -1, -1]]))
    torch.testing.assert_close(plain, padded)


def test_a_look_up_changes_the_ranking_and_says_why(run, thinker):
    history = torch.tensor([[5, 6, 7]])
    strong = EvidenceThinker(
        thinker.ranker, thinker.memory, EvidenceSettings(neighbours=8, weight=1000.0), look_ups=1
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
    counts = {f"evidence_l{count}" for count in range(4)}
    assert counts | {"random_evidence"} <= result["controls"].keys()
    assert {"evidence_l0", "random_evidence"} <= result["comparisons"]["stream_evidence"].keys()


def test_recommend_prints_the_look_ups(run, streamctl):
    shown = streamctl("recommend", "--run", run.path, "--evidence", "--user", "u3", "-k", "3")
    assert shown.returncode == 0, shown.stderr
    assert "Look-up 1" in shown.stdout
    assert "took" in shown.stdout
