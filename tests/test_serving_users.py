"""Users in service: what they take is on the disk, and read at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from serving_run import make_run

from streamctl.runs import RunDir
from streamctl.serving.catalogue import Refused
from streamctl.serving.engine import Engine
from streamctl.serving.schemas import NewItem, Query

pytestmark = pytest.mark.xdist_group("serving")
OLD, NEW = "u017", "a newcomer"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("users") / "run")


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "items.jsonl"


@pytest.fixture
def engine(run, journal) -> Engine:
    return Engine(run, journal=journal, device="cpu")


def ask(engine: Engine, **query) -> dict:
    return engine.recommend([engine.prepare(Query(**query))])[0]


def history_of(engine: Engine, user: str) -> list[str]:
    return [item["id"] for item in engine.user(user)["history"]]


def rare_items(engine: Engine, count: int) -> list[str]:
    """Items that are taken least often."""
    times = np.bincount(engine.split.log.items, minlength=engine.split.n_items)
    return [engine.catalogue.items.ids[item] for item in np.argsort(times, kind="stable")[:count]]


def test_what_a_user_takes_is_read_and_not_recommended_again(engine):
    first = ask(engine, user_id=OLD)["items"][0]["id"]
    before = engine.user(OLD)
    engine.catalogue.take(OLD, [first])
    after = engine.user(OLD)
    assert after["interactions"] == before["interactions"] + 1
    assert history_of(engine, OLD)[-1] == first
    told = ask(engine, user_id=OLD, k=20)["items"]
    assert first not in [item["id"] for item in told]
    history = [engine.catalogue.items.ids[item] for item in engine.users.taken(17)]
    assert told == ask(engine, history=history, k=20)["items"]


def test_a_new_user_begins_with_the_first_interaction(engine):
    with pytest.raises(Refused, match="no such user"):
        engine.user(NEW)
    items = rare_items(engine, 3)
    engine.catalogue.take(NEW, items[:2])
    engine.catalogue.take(NEW, items[2:])
    assert history_of(engine, NEW) == items and engine.user(NEW)["interactions"] == 3
    assert NEW in engine.users.beginning("a new", 5)["users"]
    assert len(ask(engine, user_id=NEW)["items"]) == 10


def test_it_survives_the_process_and_reaches_those_beside_it(run, engine, journal):
    beside = Engine(run, journal=journal, device="cpu")
    items = rare_items(engine, 4)
    engine.catalogue.take(NEW, items)
    ask(beside, user_id=OLD)  # an answer follows the journal
    later = Engine(run, journal=journal, device="cpu")
    for other in (beside, later):
        assert history_of(other, NEW) == items
        assert ask(other, user_id=NEW) == ask(engine, user_id=NEW)


def test_added_items_may_be_taken(engine):
    new = NewItem(id="new-1", title="Oakfield brush set")
    engine.catalogue.add(new, engine.catalogue.tokenize([new.title])[0])
    first, second = rare_items(engine, 2)
    engine.catalogue.take(NEW, [first, "new-1", second])
    assert history_of(engine, NEW) == [first, "new-1", second]
    assert len(ask(engine, user_id=NEW)["items"]) == 10


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
