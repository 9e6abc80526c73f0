"""Evidence: what the hops find, that nobody meets their own answer, and that it grows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from streamctl.retrieval import gathering, memory, transitions
from streamctl.retrieval.evidence import FEATURES, HOPS, Evidence, Pieces
from streamctl.retrieval.memory import Memory
from streamctl.retrieval.transitions import UNIT, Transitions, pair_weights
from streamctl.tokenizer.neighbours import neighbours

ITEMS, USERS = 40, 60
SIZES = (6, 5, 4, 4, 6, 3)


def shop(seed: int = 0, users: int = USERS) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of 3 to 12 items, neighbours in number often next to each other in time."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        steps = rng.integers(1, 4, rng.integers(3, 13)).cumsum()
        rows.append((rng.integers(ITEMS) + steps) % ITEMS)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return np.concatenate(rows).astype(np.int32), offsets.astype(np.int64)


def made(sequences: tuple[np.ndarray, np.ndarray], **options) -> Evidence:
    vectors = np.random.default_rng(1).standard_normal((ITEMS, 8)).astype(np.float32)
    return Evidence(sequences, vectors, neighbours(vectors, 6)[0], **{"sizes": SIZES} | options)


def prefixes(sequences, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A history of up to 6 items of each of the first users, and who they are."""
    items, offsets = sequences
    histories = np.full((count, 6), -1, np.int64)
    for user in range(count):
        row = items[offsets[user] : offsets[user + 1] - 1][-6:]
        histories[user, : len(row)] = row
    return histories, np.arange(count)


def same(one: Pieces, other: Pieces) -> None:
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.hops, other.hops)
    np.testing.assert_allclose(one.strengths, other.strengths, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.sums, other.sums, rtol=1e-5)


def without(sequences, user: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences with one user's emptied."""
    items, offsets = sequences
    kept = np.ones(len(items), bool)
    kept[offsets[user] : offsets[user + 1]] = False
    lengths = np.diff(offsets)
    lengths[user] = 0
    return items[kept], np.concatenate([[0], np.cumsum(lengths)])


def test_a_pair_weighs_what_rows_with_recency_and_four_next_items_give_it():
    weights = pair_weights()
    assert weights[0] == 0
    assert weights[1] == UNIT
    assert weights[2] == round((0.5 + 0.3) * UNIT)
    assert weights[3] == round((0.25 + 0.15 + 0.1) * UNIT)
    assert (np.diff(weights[1:]) < 0).all()


def test_counts_are_those_of_a_plain_count():
    sequences = shop()
    items, offsets = sequences
    counts = np.zeros((ITEMS, ITEMS), np.int64)
    weights = pair_weights()
    for user in range(USERS):
        row = items[offsets[user] : offsets[user + 1]]
        for place, first in enumerate(row):
            for distance, second in enumerate(row[place + 1 : place + len(weights)], 1):
                counts[first, second] += weights[distance]
    found = Transitions.count(*sequences, ITEMS)
    for item in range(ITEMS):
        others, values = found.followers.row(item)
        assert dict(zip(others.tolist(), values.tolist(), strict=True)) == {
            int(other): int(counts[item, other]) for other in np.flatnonzero(counts[item])
        }
        assert (np.diff(values) <= 0).all()
    np.testing.assert_array_equal(found.totals, counts.sum(1))


def test_the_strongest_counts_are_kept_and_totals_stay_whole():
    whole, few = Transitions.count(*shop(), ITEMS), Transitions.count(*shop(), ITEMS, keep=3)
    np.testing.assert_array_equal(whole.totals, few.totals)
    for item in range(ITEMS):
        kept = few.followers.row(item)[1]
        np.testing.assert_array_equal(kept, whole.followers.row(item)[1][:3])


@pytest.mark.parametrize("weighed", [False, True])
def test_counts_and_rows_are_the_same_however_few_are_made_at_once(monkeypatch, weighed):
    items, offsets = shop()
    worth = np.random.default_rng(3).integers(1, 5 * UNIT, len(items)) if weighed else None

    def arrays(keep: int) -> list[np.ndarray]:
        counts = Transitions.count(items, offsets, ITEMS + 2, keep, worth)
        rows = Memory.index(items, offsets, ITEMS + 2, keep, worth=worth)
        return [*counts.followers.arrays, counts.totals, *rows.arrays]

    whole = {keep: arrays(keep) for keep in (3, 1000)}
    for module in (transitions, memory):
        monkeypatch.setattr(module, "BLOCK", 7)
    for keep, expected in whole.items():
        for one, other in zip(arrays(keep), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_latest_rows_of_an_item_are_kept_the_last_first():
    items, offsets = shop()
    whole, few = (Memory.index(items, offsets, ITEMS, keep) for keep in (1000, 4))
    for item in range(ITEMS):
        rows, weights = whole.postings.row(item)
        order = np.argsort(-rows, kind="stable")
        np.testing.assert_array_equal(order, np.arange(len(rows)))
        for one, other in zip(few.postings.row(item), (rows, weights), strict=True):
            np.testing.assert_array_equal(one, other[:4])


def test_compiled_and_plain_python_find_the_same(monkeypatch):
    sequences = shop()
    histories, users = prefixes(sequences, 4)
    compiled = made(sequences).gather(histories, users)
    monkeypatch.setenv("STREAMCTL_COMPILE", "never")
    monkeypatch.setattr(gathering, "compiled", None)  # what would call it fails
    same(compiled, made(sequences).gather(histories, users))


def test_the_first_hop_is_its_formula():
    sequences = shop()
    evidence = made(sequences)
    history = np.array([[3, 8, 5]])
    found = evidence.gather(history)
    expected = np.zeros(ITEMS)
    for age, item in enumerate((5, 8, 3)):
        others, values = evidence.transitions.followers.row(item)
        expected[others] += 0.6**age * values / np.sqrt(evidence.transitions.totals[item])
    first = found.items[0, found.hops[0] == 0]
    assert set(first).isdisjoint(history[0])
    expected[history[0]] = 0
    np.testing.assert_allclose(
        found.strengths[0, : len(first), 0], np.sort(expected)[::-1][: len(first)], rtol=1e-5
    )


def test_the_memory_votes_like_a_plain_search():
    sequences = shop()
    items, offsets = sequences
    evidence = made(sequences, nearest=7)
    idf = evidence.memory.idf

    def vector(latest):
        weights = np.zeros(ITEMS)
        for age, item in enumerate(latest[::-1][:10]):
            weights[item] += idf[item] * 0.5**age
        norm = np.sqrt(sum((idf[i] * 0.5**a) ** 2 for a, i in enumerate(latest[::-1][:10])))
        return weights / norm

    rows = []
    for user in range(USERS):
        sequence = items[offsets[user] : offsets[user + 1]]
        for end in range(1, len(sequence)):
            rows.append((vector(sequence[:end]), sequence[end : end + 4]))
    history = np.array([4, 6, 9])
    cosine = np.array([vector(history) @ row for row, _ in rows])
    votes = np.zeros(ITEMS)
    for row in np.argsort(-cosine, kind="stable")[:7]:
        for step, item in enumerate(rows[row][1]):
            votes[item] += cosine[row] ** 2 * (1, 0.3, 0.1, 0.05)[step]
    found = evidence.gather(history[None])
    for place, item in enumerate(found.items[0]):
        if item >= 0:
            assert found.strengths[0, place, HOPS.index("others")] == pytest.approx(
                votes[item], rel=1e-4, abs=1e-6
            )


def test_each_hop_brings_what_the_ones_before_could_not():
    found = made(shop()).gather(*prefixes(shop()))
    for items, hops in zip(found.items, found.hops, strict=True):
        real = items[items >= 0]
        assert len(np.unique(real)) == len(real)
        assert (np.diff(hops[items >= 0]) >= 0).all()
        for hop, most in enumerate(SIZES):
            assert (hops == hop).sum() <= most


def test_had_items_come_by_the_hop_own_alone_and_newest_first():
    sequences = shop()
    histories, users = prefixes(sequences)
    found = made(sequences).gather(histories, users)
    for row, (items, hops) in enumerate(zip(found.items, found.hops, strict=True)):
        history = histories[row][histories[row] >= 0]
        assert not np.isin(items[(hops >= 0) & (hops < 5)], history).any()
        newest = list(dict.fromkeys(history[::-1].tolist()))[:3]
        assert items[hops == 5].tolist() == newest


def test_a_user_s_own_pairs_and_rows_are_as_if_they_had_never_been_counted():
    sequences = shop()
    histories, users = prefixes(sequences)
    evidence = made(sequences)
    for user in users:
        alone = made(without(sequences, user))
        # Rarity is a figure of the whole log, which one user hardly moves; it is held fixed here.
        alone.memory.idf = evidence.memory.idf
        alone.memory.postings = (
            type(evidence.memory).index(*without(sequences, user), ITEMS).postings
        )
        mine, theirs = evidence.gather(histories[[user]], [user]), alone.gather(histories[[user]])
        for hop in (0, 1, 2, 3, 5):
            np.testing.assert_allclose(
                np.sort(mine.strengths[0, mine.hops[0] == hop, hop]),
                np.sort(theirs.strengths[0, theirs.hops[0] == hop, hop]),
                rtol=1e-5,
            )
        known = mine.items[0] >= 0
        np.testing.assert_allclose(
            mine.popularity[0, :-1][known], np.log1p(alone.popularity[mine.items[0][known]])
        )
        assert mine.items[0, mine.hops[0] == 0].tolist() == (
            theirs.items[0, theirs.hops[0] == 0].tolist()
        )


def test_an_event_s_weight_is_that_of_every_pair_and_vote_that_ends_in_it():
    items, offsets = sequences = shop()
    worth = np.random.default_rng(2).choice(np.float32([0.25, 1, 3]), len(items))
    evidence = made(sequences, weights=worth)
    counts, pairs = np.zeros((ITEMS, ITEMS), np.int64), pair_weights()
    votes = []
    for first, last in itertools.pairwise(offsets):
        for place in range(first, last):
            for distance in range(1, min(len(pairs), last - place)):
                later = place + distance
                exact = pairs[distance] * worth[later]
                counts[items[place], items[later]] += int(np.floor(exact + 0.5))
        votes += [worth[end : min(end + 4, last)].tolist() for end in range(first + 1, last)]
    np.testing.assert_array_equal(evidence.transitions.totals, counts.sum(1))
    for item in range(ITEMS):
        others, values = evidence.transitions.followers.row(item)
        np.testing.assert_array_equal(values, counts[item, others])
    for row, vote in zip(evidence.memory.worth, votes, strict=True):
        np.testing.assert_array_equal(row[: len(vote)], vote)
    np.testing.assert_allclose(evidence.popularity, np.bincount(items, worth, ITEMS))

    histories, users = prefixes(sequences)
    for user in users[:8]:  # nothing of a user's own is left, in any hop
        kept = worth.copy()
        kept[offsets[user] : offsets[user + 1]] = 1e-9
        alone = made(sequences, weights=kept)
        same(*(one.gather(histories[[user]], [user]) for one in (evidence, alone)))
    ones = made(sequences, weights=np.ones(len(items), np.float32)).gather(histories, users)
    plain = made(sequences).gather(histories, users)
    for field in ("items", "hops", "strengths", "ranks", "sums", "popularity"):
        np.testing.assert_array_equal(getattr(ones, field), getattr(plain, field))


def test_the_weights_of_a_split_reach_evidence_and_collaborative_vectors():
    from streamctl.data.log import InteractionLog
    from streamctl.data.split import Split
    from streamctl.tokenizer.collaborative import taken_together
    from streamctl.training.material import Material

    items, offsets = shop()
    names = [str(user) for user in range(USERS)]
    weights = np.where(items % 2, 0.25, 2).astype(np.float32)
    found, together = [], []
    for worth in (None, np.ones_like(weights), weights):
        split = Split(InteractionLog(items, offsets, names, weights=worth), n_items=ITEMS)
        plain = made(split.training_sequences())
        material = Material(split, None, plain.neighbours, plain.vectors)
        found.append(material.evidence.popularity)
        np.testing.assert_array_equal(found[-1], split.popularity())
        together.append(taken_together(split, 0))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[0] * np.where(np.arange(ITEMS) % 2, 0.25, 2))
    np.testing.assert_array_equal(together[0], together[1])
    assert np.abs(together[2] - together[0]).max() > 0.01


def test_a_weighed_user_can_grow_and_be_forgotten():
    sequences = shop()
    weights = np.random.default_rng(3).choice(np.float32([0.5, 2]), len(sequences[0]))
    evidence = made(sequences, weights=weights)
    evidence.append(4, [1, 2])
    evidence.append(USERS + 1, [7, 8])
    for user in range(USERS + 2):
        evidence.forget(user)
    assert not evidence.transitions.totals.any() and not evidence.popularity.any()
    assert not any(evidence.transitions.followers.row(item)[1].any() for item in range(ITEMS))


def test_a_target_that_only_its_own_user_took_is_never_found_for_them():
    """The leak that would make training evidence stronger than any serving can have."""
    items, offsets = shop()
    new = np.int32(ITEMS - 1)
    items[items == new] = 0
    at = int(offsets[1]) - 1
    items[at] = new  # user 0's last item is nobody else's
    evidence = made((items, offsets), sizes=(20, 0, 20, 20, 20, 0))
    history = items[offsets[0] : at].astype(np.int64)[None]
    assert new in evidence.gather(history).items
    assert new not in evidence.gather(history, [0]).items


def test_what_is_held_out_reaches_no_evidence():
    """Other items in validation's and test's place leave everything that is gathered the same."""
    from streamctl.data.log import InteractionLog
    from streamctl.data.split import Split

    items, offsets = shop()
    other = items.copy()
    for end in offsets[1:]:
        other[end - 2 : end] = (other[end - 2 : end] + 7) % ITEMS
    gathered = []
    for taken in (items, other):
        log = InteractionLog(taken, offsets, [str(user) for user in range(USERS)])
        split = Split(log, n_items=ITEMS)
        examples = split.train
        rows = np.arange(len(examples))
        gathered.append(
            made(split.training_sequences()).gather(examples.histories(rows), examples.users)
        )
    same(*gathered)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_appended_is_counted_as_training_counts_it(at_once, weighed):
    items, offsets = shop()
    lengths = np.diff(offsets)
    cut = np.minimum(lengths - 1, 4)
    early = np.concatenate([np.arange(a, a + n) for a, n in zip(offsets, cut, strict=False)])
    weights = np.ones(len(items), np.float32)
    weights[early[::2]] = 0.25  # what comes later is worth 1
    whole = made((items, offsets), weights=weights if weighed else None)
    first = items[early], np.concatenate([[0], np.cumsum(cut)])
    grown = made(first, weights=weights[early] if weighed else None)
    taken = [
        (user, [int(item)])
        for user in range(USERS)
        for item in items[offsets[user] + cut[user] : offsets[user + 1]]
    ]
    if at_once:
        grown.append(*taken[0])  # what has been appended before is counted, too
        grown.append_all(taken[1:])
        assert not grown._live
    else:
        for user, one in taken:
            grown.append(user, one)
    grown.memory.idf = whole.memory.idf
    for item in range(ITEMS):
        for one, other in ((whole.transitions.followers, grown.transitions.followers),):
            assert dict(zip(*map(np.ndarray.tolist, one.row(item)), strict=True)) == dict(
                zip(*map(np.ndarray.tolist, other.row(item)), strict=True)
            )
    np.testing.assert_array_equal(whole.transitions.totals, grown.transitions.totals)
    np.testing.assert_array_equal(whole.popularity, grown.popularity)

    def rows(evidence):
        _, _, _, _, owners, following, worth, _ = evidence.memory.arrays
        known = np.c_[owners, following, worth] if weighed else np.c_[owners, following]
        return sorted(map(tuple, known[: len(evidence.memory)].tolist()))

    assert rows(whole) == rows(grown)
    histories, users = prefixes((items, offsets))
    one, other = whole.gather(histories, users), grown.gather(histories, users)
    np.testing.assert_array_equal(
        np.where(one.hops == 0, one.items, -1), np.where(other.hops == 0, other.items, -1)
    )


def test_a_stranger_s_row_is_found_and_not_by_themselves():
    evidence = made(shop(), sizes=(10, 0, 0, 0, 10, 0))
    new = USERS + 5
    vectors = np.eye(8, dtype=np.float32)[:1]
    evidence.add_items(vectors)
    evidence.append(new, [2, 7, ITEMS])
    assert ITEMS in evidence.gather(np.array([[2, 7]])).items
    assert ITEMS not in evidence.gather(np.array([[2, 7]]), [new]).items


def test_a_new_item_is_alike_to_those_that_it_is_near():
    evidence = made(shop(), sizes=(0, 10, 0, 0, 0, 0))
    twin = evidence.vectors[3]
    evidence.add_items(twin[None])
    assert evidence.gather(np.array([[9, 3]])).items[0, 0] == ITEMS


@pytest.mark.parametrize("sizes", [[300], [1] * 20 + [280], [150, 150]])
def test_new_items_have_the_same_neighbours_however_many_come_at_once(sizes):
    """So that a server that starts again answers as before; among them are some exact copies."""
    new = np.random.default_rng(2).standard_normal((300, 8)).astype(np.float32)
    new[50:60] = new[0]
    plain, grouped = made(shop()), made(shop())
    for item in new:
        plain.add_items(item[None])
    for part in np.split(new, np.cumsum(sizes)[:-1]):
        grouped.add_items(part)
    np.testing.assert_array_equal(grouped.neighbours, plain.neighbours)
    cosines = grouped.vectors @ grouped.vectors[ITEMS + 9]
    expected = np.argsort(-cosines[: ITEMS + 9], kind="stable")[:5]  # the sixth may be a newer one
    np.testing.assert_array_equal(grouped.neighbours[ITEMS + 9, :5], expected)


def test_features_are_named_and_finite_and_nothing_where_no_piece_is():
    found = made(shop(), sizes=(30, 6, 9, 9, 30, 3)).gather(*prefixes(shop()))
    features = found.features()
    assert features.shape == (*found.items.shape, len(FEATURES))
    assert np.isfinite(features).all()
    assert not features[found.items < 0].any()


def test_the_same_answer_alone_and_among_others():
    sequences = shop()
    histories, users = prefixes(sequences)
    evidence = made(sequences)
    together = evidence.gather(histories, users)
    for row in (0, 7, 19):
        same(together.rows([row]), evidence.gather(histories[[row]], users[[row]]))
