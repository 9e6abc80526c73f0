"""Evidence in service: what the stage ranks, in words, for the items that it knows."""

from __future__ import annotations

import gc
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from serving_run import LOOK_UPS, make_run

from streamctl.commands.recommend import ask as command_ask
from streamctl.commands.recommend import show_first_user
from streamctl.runs import RunDir
from streamctl.serving.bulk import recommend_file
from streamctl.serving.catalogue import Refused
from streamctl.serving.engine import Engine
from streamctl.serving.schemas import NewItem, Query
from streamctl.training.evidence import load_thinker

pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("evidence") / "run", evidence=True)


@pytest.fixture
def engine(run, tmp_path) -> Engine:
    return Engine(run, journal=tmp_path / "items.jsonl", device="cpu")


def ask(engine: Engine, **query) -> dict:
    return engine.recommend([engine.prepare(Query(**{"thinker": "evidence", **query}))])[0]


def ids(answer: dict) -> list[str]:
    return [item["id"] for item in answer["items"]]


def test_a_user_gets_what_the_stage_ranks_without_evidence_of_their_own(run, engine):
    thinker = load_thinker(run, torch.device("cpu"))
    for user in (3, 17, 60):
        seen = engine.split.log.of(user).astype(np.int64)
        history = torch.from_numpy(seen[-engine.split.history :])[None]
        ranking = thinker.rank(history, 7, users=np.array([user]), exclude=[seen])
        answer = ask(engine, user_id=engine.split.log.user_ids[user], k=7)
        assert ids(answer) == [engine.catalogue.items.ids[item] for item in ranking.items[0]]
        np.testing.assert_allclose(
            [item["score"] for item in answer["items"]], ranking.scores[0], rtol=1e-4
        )


def test_every_look_up_has_its_reasons_and_moves_the_ranking(engine):
    answer = ask(engine, user_id="u017", k=6, think=LOOK_UPS, explain=True)
    explain = answer["explain"]
    assert explain["before"] == ask(engine, user_id="u017", k=6, think=0)["items"]
    assert len(explain["steps"]) == LOOK_UPS
    before = explain["before"]
    for step in explain["steps"]:
        assert step["ranking"] != before and step["words"] and step["items"]
        assert 1 <= len(step["reasons"]) <= 3
        before = step["ranking"]
    assert before == answer["items"]
    one = ask(engine, user_id="u017", k=6, think=1)
    assert one["items"] == explain["steps"][0]["ranking"]


def test_what_the_reasons_say_happened_in_the_training_log(engine):
    log, known = engine.split.log, engine.catalogue.items
    own = list(log.user_ids).index("u017")
    for step in ask(engine, user_id="u017", explain=True)["explain"]["steps"]:
        for reason in step["reasons"]:
            had = [known.index(item["id"]) for item in reason["had"]]
            story = [*had[::-1], known.index(reason["took"]["id"])]
            told = [
                user
                for user in range(log.n_users)
                for at in range(len(log.of(user)) - len(story) - 1)  # valid and test items are last
                if log.of(user)[at : at + len(story)].tolist() == story
            ]
            assert any(user != own for user in told)


def test_more_look_ups_than_it_was_trained_with_are_not_made(engine):
    assert engine.prepare(Query(user_id="u017", thinker="evidence", think=8)).think == LOOK_UPS
    assert engine.prepare(Query(user_id="u017", thinker="stream", think=8)).think == 8


def test_fewer_steps_than_asked_for_are_spoken_of(run, capsys):
    query = {"user_id": "u017", "thinker": "evidence", "k": 5, "think": 8}
    assert len(command_ask(run, query, "cpu")["explain"]["steps"]) == LOOK_UPS
    said = " ".join(capsys.readouterr().err.split())
    assert f"--think 8: the most that evidence takes is {LOOK_UPS}" in said
    command_ask(run, query | {"think": LOOK_UPS}, "cpu")
    show_first_user(run, device="cpu")
    shown = capsys.readouterr()
    assert "--think" not in shown.err and "Recommended" in shown.out


def test_wishes_and_removals_are_obeyed(engine):
    best = ids(ask(engine, user_id="u017", k=5))
    assert ids(ask(engine, user_id="u017", allow=best[1:3])) == best[1:3]
    assert ids(ask(engine, user_id="u017", k=4, deny=best[:1])) == best[1:]
    brand = engine.catalogue.item(best[0])["fields"]["brand"]
    found = ids(ask(engine, user_id="u017", k=50, filter={"brand": [brand]}))
    assert {engine.catalogue.item(item)["fields"]["brand"] for item in found} == {brand}
    engine.catalogue.remove(best[0])
    assert ids(ask(engine, user_id="u017", k=4)) == best[1:]


def test_items_added_later_are_not_recommended_and_not_read(engine):
    new = NewItem(id="new-1", title="Oakfield brush set")
    engine.catalogue.add(new, engine.catalogue.tokenize([new.title])[0])
    history = [item["id"] for item in engine.user("u017")["history"]]
    assert ask(engine, history=[*history, "new-1"]) == ask(engine, history=history)
    assert ids(ask(engine, history=history, allow=["new-1"])) == []
    assert len(ids(ask(engine, history=history, k=100))) < len(engine.catalogue.items)
    with pytest.raises(Refused, match="added after") as error:
        ask(engine, history=["new-1"])
    assert error.value.field == "/history"
    assert ids(ask(engine, history=["new-1"], thinker="stream"))


def test_a_run_with_nothing_but_evidence_is_served_by_it(run, tmp_path):
    only = RunDir(tmp_path / "only")
    for name in ("data", "tokenizer", "evidence"):
        shutil.copytree(run.path / name, only.path / name)
    engine = Engine(only, journal=tmp_path / "items.jsonl", device="cpu")
    engine.warm_up(4)
    assert engine.model["stage"] == "evidence"
    job = engine.prepare(Query(user_id="u017"))
    assert (job.thinker, job.model["run"]) == ("evidence", "only")
    assert engine.recommend([job])[0]["items"]
    with pytest.raises(Refused, match="it has evidence"):
        engine.prepare(Query(user_id="u017", thinker="stream"))
    new = NewItem(id="new-1", title="Oakfield brush set")
    engine.catalogue.add(new, engine.catalogue.tokenize([new.title])[0])
    assert engine.catalogue.search("oakfield brush", 5)["items"]
    assert engine.report()["stages"][-1]["name"] == "evidence"


def test_evidence_that_is_damaged_leaves_the_other_thinker_in_service(run, tmp_path, capsys):
    other = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    (other.path / "evidence" / "taken.npy").write_bytes(b"no array")
    engine = Engine(other, journal=tmp_path / "items.jsonl", device="cpu")
    assert list(engine.thinkers) == ["stream"]
    assert "without its evidence" in capsys.readouterr().err
    assert ids(ask(engine, user_id="u017", thinker="auto"))


@pytest.mark.parametrize("how", [{"mode": "marginal"}, {"mode": "greedy"}, {"mode": "joint"}])
@pytest.mark.parametrize("thinker", ["stream", "evidence"])
def test_an_answer_does_not_depend_on_what_shares_its_batch(engine, thinker, how):
    def job(user: int, k: int):
        name = engine.split.log.user_ids[user]
        return engine.prepare(Query(user_id=name, k=k, thinker=thinker, **how))

    def answers(*jobs) -> list[list[str]]:
        assert len({one.group for one in jobs}) == 1
        return [ids(answer) for answer in engine.recommend(jobs)]

    [alone] = answers(job(40, 10))
    company = [job(user, k) for user, k in ((1, 20), (2, 3), (3, 15))]
    assert answers(*company, job(40, 10))[-1] == alone
    assert answers(job(40, 20))[0][:10] == alone


def test_an_answer_of_more_items_than_the_beam_is_computed_apart(engine):
    groups = {k: engine.prepare(Query(user_id="u017", k=k)).group for k in (1, 20, 21, 40, 100)}
    assert groups[1] == groups[20] != groups[21] == groups[40] != groups[100]


def test_a_file_of_users_may_be_answered_by_evidence(run, engine, tmp_path):
    path, output = tmp_path / "users.parquet", tmp_path / "recs.parquet"
    users = engine.split.log.user_ids[:30]
    pq.write_table(pa.table({"user_id": users}), path)
    recommend_file(run, path, output, Query(user_id="each", k=5, thinker="evidence"), device="cpu")
    rows = pq.read_table(output).to_pylist()
    for row in rows[::7]:
        assert row["items"] == ids(ask(engine, user_id=row["user_id"], k=5))


def test_an_engine_that_nobody_uses_any_more_gives_its_memory_back_at_once(run, tmp_path):
    engine = Engine(run, journal=tmp_path / "items.jsonl", device="cpu")
    engine.warm_up(2)
    kept = [engine, engine.catalogue, *engine.thinkers.values()]
    watched = [weakref.ref(one) for one in kept]
    gc.collect()
    gc.disable()
    try:
        del engine, kept
        assert [one() for one in watched] == [None] * 4
    finally:
        gc.enable()
