"""Users in service: what they take is on the disk, read at once, and evidence for others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from serving_run import LOOK_UPS, make_run

from streamctl.runs import RunDir
from streamctl.serving.catalogue import Refused
from streamctl.serving.engine import Engine
from streamctl.serving.schemas import NewItem, Query
from streamctl.training.evidence import recent_items, taken_next

pytestmark = pytest.mark.xdist_group("serving")
OLD, NEW = "u017", "a newcomer"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("users") / "run", evidence=True)


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "items.jsonl"


@pytest.fixture
def engine(run, journal) -> Engine:
    return Engine(run, journal=journal, device="cpu")


def ask(engine: Engine, **query) -> dict:
    return engine.recommend([engine.prepare(Query(**{"thinker": "evidence", **query}))])[0]


def history_of(engine: Engine, user: str) -> list[str]:
    return [item["id"] for item in engine.user(user)["history"]]


def rare_items(engine: Engine, count: int) -> list[str]:
    """Items that are taken least often."""
    times = np.bincount(engine.split.log.items, minlength=engine.split.n_items)
    return [engine.catalogue.items.ids[item] for item in np.argsort(times, kind="stable")[:count]]


@pytest.mark.parametrize("thinker", ["stream", "evidence"])
def test_what_a_user_takes_is_read_and_not_recommended_again(engine, thinker):
    first = ask(engine, user_id=OLD, thinker=thinker)["items"][0]["id"]
    before = engine.user(OLD)
    engine.catalogue.take(OLD, [first])
    after = engine.user(OLD)
    assert after["interactions"] == before["interactions"] + 1
    assert history_of(engine, OLD)[-1] == first
    told = ask(engine, user_id=OLD, thinker=thinker, k=20)["items"]
    assert first not in [item["id"] for item in told]
    if thinker == "stream":  # the evidence leaves out a known user's own rows
        history = [engine.catalogue.items.ids[item] for item in engine.users.taken(17)]
        assert told == ask(engine, history=history, thinker=thinker, k=20)["items"]


def test_a_new_user_begins_with_the_first_interaction(engine):
    with pytest.raises(Refused, match="no such user"):
        engine.user(NEW)
    items = rare_items(engine, 3)
    engine.catalogue.take(NEW, items[:2])
    engine.catalogue.take(NEW, items[2:])
    assert history_of(engine, NEW) == items and engine.user(NEW)["interactions"] == 3
    assert NEW in engine.users.beginning("a new", 5)["users"]
    assert len(ask(engine, user_id=NEW)["items"]) == 10


def test_what_a_newcomer_took_is_evidence_for_others_and_not_for_themselves(engine):
    *had, took = rare_items(engine, 3)
    query = {"history": had, "think": LOOK_UPS, "explain": True, "exclude_seen": False}

    def said(**query) -> list[tuple[list[str], str]]:
        steps = ask(engine, **query)["explain"]["steps"]
        return [
            ([item["id"] for item in reason["had"]], reason["took"]["id"])
            for step in steps
            for reason in step["reasons"]
        ]

    def place(item: str) -> int:
        ranked = [one["id"] for one in ask(engine, **query, k=100)["items"]]
        return ranked.index(item)

    assert (had[::-1], took) not in said(**query)
    before = place(took)
    engine.catalogue.take(NEW, [*had, took])
    assert (had[::-1], took) in said(**query)
    assert place(took) < before
    own = {"user_id": NEW, "think": LOOK_UPS, "explain": True}
    assert took not in [item for _, item in said(**own)]


@pytest.mark.parametrize("at_once", [100, 1, 3])
@pytest.mark.parametrize("answers", [True, False], ids=["asked between", "asked after"])
def test_the_rows_that_join_are_those_that_training_would_have_made(run, engine, at_once, answers):
    """A prefix of the log, taken again by somebody new: state, items and what came next."""
    memory = engine.thinkers["evidence"]._thinker.memory
    train = engine.split.train
    rows = np.flatnonzero(train.users == 17)
    sequence = engine.split.log.of(17)[: len(rows) + 1]  # all of it but validation and test
    before = len(memory)
    for start in range(0, len(sequence), at_once):
        part = [engine.catalogue.items.ids[item] for item in sequence[start : start + at_once]]
        engine.catalogue.take(NEW, part)
        if answers:
            ask(engine, user_id=OLD)
    ask(engine, user_id=OLD)
    assert len(memory) == before + len(rows)
    np.testing.assert_allclose(memory.keys[before:], memory.keys[rows], atol=1e-5)
    assert (memory.taken[before:] == taken_next(train)[rows]).all()
    assert (memory.recent[before:] == recent_items(train)[rows]).all()
    assert (memory.users[before:] == engine.users.index(NEW)).all()


def test_what_nobody_asks_about_joins_in_parts(engine, monkeypatch):
    from streamctl.serving import evidence

    monkeypatch.setattr(evidence, "MOST_WAITING", 6)
    memory = engine.thinkers["evidence"]._thinker.memory
    before, items = len(memory), rare_items(engine, 4)
    for number in range(5):
        engine.catalogue.take(f"{NEW} {number}", items)
    assert len(memory) == before + 4 * 3  # two and two users; the fifth waits
    ask(engine, user_id=OLD)
    assert len(memory) == before + 5 * 3


def test_it_survives_the_process_and_reaches_those_beside_it(run, engine, journal):
    beside = Engine(run, journal=journal, device="cpu")
    items = rare_items(engine, 4)
    engine.catalogue.take(NEW, items)
    ask(beside, user_id=OLD)  # an answer follows the journal
    later = Engine(run, journal=journal, device="cpu")
    for other in (beside, later):
        assert history_of(other, NEW) == items
        assert ask(other, user_id=NEW) == ask(engine, user_id=NEW)


def test_added_items_may_be_taken_and_the_evidence_passes_over_them(engine):
    new = NewItem(id="new-1", title="Oakfield brush set")
    engine.catalogue.add(new, engine.catalogue.tokenize([new.title])[0])
    first, second = rare_items(engine, 2)
    engine.catalogue.take(NEW, [first, "new-1", second])
    assert history_of(engine, NEW) == [first, "new-1", second]
    memory = engine.thinkers["evidence"]._thinker.memory
    ask(engine, user_id=NEW)
    known = [engine.catalogue.items.index(item) for item in (first, second)]
    assert memory.recent[-1][0] == known[0] and memory.taken[-1][0] == known[1]


def test_an_item_that_never_was_is_refused_with_its_place(engine, journal):
    with pytest.raises(Refused, match="no such item") as error:
        engine.catalogue.take(OLD, [*rare_items(engine, 1), "nothing"])
    assert error.value.field == "/items/1"
    assert not journal.exists() and engine.users.index(NEW) is None


def test_it_is_not_counted_twice_by_a_run_of_a_log_that_has_it(run, engine, journal):
    """A run of other data was prepared later, and its log says what its users took."""
    engine.catalogue.take(OLD, rare_items(engine, 1))
    record = json.loads(journal.read_text())
    journal.write_text(json.dumps(record | {"data": "another"}) + "\n")
    other = Engine(run, journal=journal, device="cpu")
    assert other.user(OLD)["interactions"] == engine.user(OLD)["interactions"] - 1
