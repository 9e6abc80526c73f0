"""The engine with what came since: users, their interactions, and items."""

from __future__ import annotations

import asyncio
from itertools import product

import numpy as np
import pytest
from serving_run import make_run

import streamctl as sc
from streamctl.config import RefitConfig
from streamctl.data import load_data
from streamctl.evaluation.refit import refit
from streamctl.model import frozen
from streamctl.runs import RunDir
from streamctl.serving.engine import Engine
from streamctl.serving.model import Model
from streamctl.serving.question import as_job
from streamctl.serving.schemas import Query
from streamctl.serving.store import Refused, Store

pytestmark = pytest.mark.xdist_group("serving")
OLD, NEW = "u017", "a newcomer"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("users") / "run")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def engine(run, folder) -> Engine:
    return Engine(run, Store(run, folder), device="cpu")


def ask(engine: Engine, **query) -> dict:
    job = as_job(Query(**query), engine.store, engine.about())
    [answer] = engine.answer([job.details], **job.group)
    ids = {item: name["id"] for item, name in engine.store.names(range(200)).items()}
    return {**answer, "items": [(ids[item], score) for item, score in answer["items"]]}


def ids(engine: Engine, **query) -> list[str]:
    return [item for item, _ in ask(engine, **query)["items"]]


def add(engine: Engine, id_: str, title: str = "Oakfield brush set") -> int:
    return engine.add(id_, title, title, {})


def rare_items(engine: Engine, count: int) -> list[str]:
    """Items that are taken least often."""
    order = [item["id"] for item in engine.store.search("", 100)["items"]]
    return order[-count:]


def test_what_a_user_takes_is_read_and_not_recommended_again(engine):
    first = ids(engine, user_id=OLD)[0]
    before = engine.store.user(OLD)
    engine.store.take(OLD, [first])
    after = engine.store.user(OLD)
    assert after[:-1] == before and engine.store.indexes([first]) == after[-1:]
    assert first not in ids(engine, user_id=OLD, k=100)
    history = [item["id"] for item in engine.store.describe(after)]
    assert ids(engine, user_id=OLD, k=20) == ids(engine, history=history, k=20)


def test_who_says_nothing_is_told_the_popular_items_and_that_it_is_so(engine):
    for query in ({"user_id": NEW}, {"history": []}):
        answer = ask(engine, **query, k=120)
        assert answer["method"] == "popularity" and answer["note"].startswith("popular items: ")
        counts = [count for _, count in answer["items"]]
        assert len(counts) == 120 and counts == sorted(counts, reverse=True) and counts[0] > 30
    best = [item for item, _ in answer["items"]]
    assert ids(engine, user_id=NEW, deny=best[:1], allow=best[:3]) == best[1:3]
    engine.store.take(NEW, best[:1])
    answer = ask(engine, user_id=NEW)
    assert (
        answer["method"] == "stream_sft" and answer["note"] is None and len(answer["items"]) == 10
    )


@pytest.mark.parametrize("refitted", [False, True])
def test_the_api_and_the_server_give_the_same_answers(tmp_path, folder, refitted):
    run = make_run(tmp_path / "run")
    if refitted:
        refit(run, RefitConfig(), device="cpu")
    engine = Engine(run, Store(run, folder), device="cpu")
    history = [item["id"] for item in engine.store.describe([3, 50, 71])]
    methods = (None, "stream_pt", "popularity")
    loaded = {method: sc.load(run.path, method, device="cpu") for method in methods}
    options = ({}, {"think": 0}, {"diversity": 0.6}, {"allow": history}, {"allow": []})
    for method, k, more in product(methods, (10, 30), options):
        api, asked = loaded[method], {"k": k, **more}
        named = {} if method is None else {"method": method}
        for user, server, exclude in (
            ({"user": OLD}, {"user_id": OLD}, ()),
            ({"user": "nobody"}, {"user_id": "nobody"}, ()),
            ({"history": history}, {"history": history, "deny": ["i001"]}, ["i001"]),
        ):
            table = api.recommend(**user, exclude=exclude, **asked)
            answer = ask(engine, **server, **asked, **named)
            told = table.schema.metadata
            items, scores = zip(*answer["items"], strict=True) if answer["items"] else ((), ())
            assert list(items) == table["item_id"].to_pylist(), (asked, user)
            assert scores == pytest.approx(table["score"].to_pylist(), rel=1e-5)
            assert answer["method"].encode() == told[b"method"]
            assert (answer["note"] or "").encode() == told.get(b"note", b"")
    split = load_data(run)[1]
    counts = np.bincount(split.log.items) if refitted else split.popularity()
    best = engine.store.indexes(ids(engine, history=[], k=120))
    assert counts[best].tolist() == sorted(counts, reverse=True)


def test_many_items_are_found_where_many_are_wanted(engine):
    assert len(set(ids(engine, user_id=OLD, k=1000, exclude_seen=False))) == 120
    with pytest.raises(ValueError, match="1000"):
        Query(user_id=OLD, k=1001)


def test_a_method_may_be_named_and_an_unknown_one_is_refused(engine):
    assert set(engine.about()["methods"]) >= {"popularity", "stream_pt", "stream_sft"}
    for method in ("stream_pt", "popularity"):
        assert ask(engine, user_id=OLD, method=method)["method"] == method
    assert ids(engine, user_id=OLD, method="stream_pt") != ids(engine, user_id=OLD)
    with pytest.raises(Refused, match="did you mean stream_pt") as error:
        ask(engine, user_id=OLD, method="stream_pd")
    assert error.value.field == "/method"


def test_a_process_begins_with_the_methods_that_the_one_before_it_had(run, folder):
    async def loaded() -> list[str]:
        model = await Model.start(
            run=str(run.path), store=str(folder), method=None, device="cpu", threads=1, batch=2,
            also=["stream_pt", "none of this run"],
        )  # fmt: skip
        await model.stop()
        return model.about["loaded"]

    assert sorted(asyncio.run(loaded())) == ["popularity", "stream_pt", "stream_sft"]


def test_what_shares_a_batch_changes_no_answer(engine):
    queries = [{"user_id": f"u{user:03}", "deny": ["i001"]} for user in range(3, 20)]
    jobs = [as_job(Query(**query), engine.store, engine.about()) for query in queries]
    together = engine.answer([job.details for job in jobs], **jobs[0].group)
    for job, answer in zip(jobs, together, strict=True):
        [alone] = engine.answer([job.details], **job.group)
        assert [item for item, _ in alone["items"]] == [item for item, _ in answer["items"]]
    groups = [as_job(Query(user_id=OLD, k=k), engine.store, engine.about()).group for k in (1, 2)]
    assert groups[0] != groups[1]  # a wider search may find other items


def test_no_request_waits_until_the_faster_way_is_measured(run, folder, monkeypatch):
    engine = Engine(run, Store(run, folder), device="cpu", batch=16)
    engine.warm_up()
    monkeypatch.setattr(frozen.choice, "fastest", None)
    items = [item["id"] for item in engine.store.search("", 20)["items"]]
    for count, length, think in product((1, 3, 16), (1, 7, 20), (0, "auto")):
        query = Query(history=items[:length], think=think)
        job = as_job(query, engine.store, engine.about())
        assert len(engine.answer([job.details] * count, **job.group)) == count


def test_it_survives_the_process_and_reaches_those_beside_it(run, folder, engine):
    beside = Engine(run, Store(run, folder), device="cpu")
    new = add(engine, "new-1")
    items = rare_items(engine, 4)
    engine.store.take(NEW, [*items, "new-1"])
    engine.store.remove(items[0])
    later = Engine(run, Store(run, folder), device="cpu")
    for other in (engine, beside, later):
        assert ids(other, user_id=OLD, allow=["new-1"]) == ["new-1"]
        assert ask(other, user_id=NEW) == ask(engine, user_id=NEW)
        assert items[0] not in ids(other, user_id=OLD, k=200)
        assert other.live.removed.tolist() == engine.store.indexes(items[:1])
        assert other.similar(new, 3) == engine.similar(new, 3)


def test_what_others_write_while_it_looks_is_not_missed(run, folder, engine):
    beside, moment, reached = Engine(run, Store(run, folder), device="cpu"), 0, True
    while reached:  # before each of the statements of a look
        moment, reached, statements = moment + 1, False, 0

        def write(_: str, moment: int = moment) -> None:
            nonlocal statements, reached
            statements += 1
            if statements == moment:
                reached = True
                add(beside, f"during-{moment}")
                beside.store.take(NEW, [f"during-{moment}"])

        add(beside, f"before-{moment}")
        engine.store._db.set_trace_callback(write)
        engine.live.follow()
        engine.store._db.set_trace_callback(None)
        engine.live.follow()
        for store in (engine.store, beside.store):
            assert not store._db.in_transaction
        for when in ("before", "during") if reached else ():
            assert ids(engine, user_id=OLD, allow=[f"{when}-{moment}"]) == [f"{when}-{moment}"]
    assert moment > 5
    beside.live.follow()
    popular = {"user_id": "nobody", "k": 200}
    assert ask(engine, **popular) == ask(beside, **popular)


def test_popular_items_do_not_count_who_is_forgotten(run, folder, engine):
    def best(engine: Engine) -> list[str]:
        return ids(engine, user_id="nobody", k=200)

    before = best(engine)
    engine.store.take(NEW, [before[-1]] * 500)
    assert best(engine) == [before[-1], *before[:-1]]
    engine.store.forget(NEW)
    assert best(engine) == before == best(Engine(run, engine.store, device="cpu"))


def test_items_with_equal_texts_get_codes_of_their_own_in_whichever_process(run, folder, engine):
    engines = engine, Engine(run, Store(run, folder), device="cpu")
    made = []
    for number in range(6):
        item = add(engines[number % 2], f"twin-{number}", "Copperleaf wax seal kit")
        made.append(tuple(engine.store.describe([item])[0]["codes"]))
    assert len(set(made)) == 6 and len({codes[:-1] for codes in made}) == 1
    held = {tuple(item["codes"]) for item in engine.store.describe(range(120))}
    assert not held & set(made)


def test_an_added_item_is_read_in_a_history_and_takes_part_in_what_is_alike(run, engine):
    new = add(engine, "new-1", load_data(run)[0].texts[5])
    assert len(ids(engine, history=["new-1"], k=3)) == 3
    assert engine.similar(new, 1)[0][1] == pytest.approx(1, abs=1e-5)
    assert new in [item for item, _ in engine.similar(5, 5)]
    engine.store.remove("new-1")
    assert new not in [item for item, _ in engine.similar(5, 120)]
    assert ids(engine, user_id=OLD, allow=["new-1"]) == []
    assert len(ids(engine, history=["new-1"], k=3)) == 3


def test_another_tokenizer_gives_added_items_codes_of_its_own(run, folder, engine, tmp_path):
    add(engine, "new-1")
    other = make_run(tmp_path / "other", codes=8)
    for _ in range(2):  # the second one finds them written
        moved = Engine(other, Store(other, folder), device="cpu")
        codes = moved.store.item("new-1")["codes"]
        assert len(codes) == 3 and max(codes[:-1]) < 8
        assert ids(moved, user_id=OLD, allow=["new-1"]) == ["new-1"]


def test_a_forgotten_user_gets_the_popular_items(engine):
    engine.store.take(OLD, rare_items(engine, 1))
    engine.store.forget(OLD)
    assert ask(engine, user_id=OLD)["method"] == "popularity"


def test_a_diverse_list_begins_with_the_best_and_is_less_alike(engine, run):
    from streamctl.ranking.metrics import ItemFacts, beyond_accuracy
    from streamctl.tokenizer import vectors

    facts = ItemFacts(load_data(run)[1].popularity(), vectors(run))
    lists = []
    for diversity in (0.0, 0.7):
        job = as_job(Query(user_id=OLD, k=5, diversity=diversity), engine.store, engine.about())
        [answer] = engine.answer([job.details], **job.group)
        lists.append([item for item, _ in answer["items"]])
    plain, diverse = lists
    assert diverse[0] == plain[0] and len(set(diverse)) == 5
    alike = [beyond_accuracy(np.array([items]), facts)["diversity@10"] for items in lists]
    assert alike[1] > alike[0]
