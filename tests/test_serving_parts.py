"""The parts of the server that need no model: the store and the keys."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from serving_run import make_data

from streamctl.data import load_data
from streamctl.data.sources.items import as_number
from streamctl.errors import StreamctlError
from streamctl.runs import RunDir
from streamctl.serving import service as services
from streamctl.serving.batcher import Gone
from streamctl.serving.keys import KeyRing
from streamctl.serving.question import as_job
from streamctl.serving.schemas import Query
from streamctl.serving.service import Served, Service, Settings
from streamctl.serving.store import Refused, Store, words_of

READ, WRITE = "r" * 20, "w" * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_data(tmp_path_factory.mktemp("store") / "run")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(run, folder) -> Store:
    return Store(run, folder)


def add(store: Store, id_: str, title: str, fields: dict[str, str] | None = None) -> int:
    with store.writing():
        store.check_new(id_, fields or {})
        item = store.add(id_, title, title, fields or {})
        store.set_codes(item, [1, 2, 3], np.ones(4))
    return item


def found(store: Store, words: str) -> list[str]:
    return [item["id"] for item in store.search(words, 100)["items"]]


def test_items_and_users_of_the_run_are_there_with_what_they_are(run, store):
    catalog, split = load_data(run)
    assert store.count() == store.base == len(catalog)
    for item in (0, 7, len(catalog) - 1):
        told = store.item(catalog.ids[item])
        assert (told["id"], told["title"]) == (catalog.ids[item], catalog.titles[item])
        assert told["fields"]["brand"] == catalog.fields["brand"][item] and not told["added"]
    for user in (0, 33):
        assert store.user(split.log.user_ids[user]) == split.log.of(user).tolist()
    assert store.user("nobody") is None
    taken = np.bincount(split.log.items, minlength=len(catalog))
    assert found(store, "")[0] in np.array(catalog.ids)[taken == taken.max()]


def test_what_one_connection_writes_every_other_sees(run, folder, store):
    other = Store(run, folder)
    assert other.changes({}) is None
    item = add(store, "new-1", "Lip balm", {"brand": "Wren"})
    assert other.index("new-1") == item == store.base
    [(number, text, codes, vector)] = (seen := other.changes({})).items
    assert (number, text, codes) == (item, "Lip balm", [1, 2, 3])
    assert vector.tolist() == [1, 1, 1, 1]
    assert other.with_values("brand", ["Wren"], "/filter") == [item]
    other.take("u001", ["new-1"])
    assert store.user("u001")[-1] == item
    news = store.changes(seen.mark)
    assert news.items == [] and news.taken == [("u001", [item])]
    assert store.changes(news.mark) is None
    assert Store(run, folder).user("u001") == store.user("u001")


def test_a_removed_item_is_gone_but_histories_may_hold_it_and_its_id_is_free(store):
    first = add(store, "new-1", "Lip balm")
    with pytest.raises(Refused, match="in the catalogue"):
        store.check_new("new-1", {})
    for id_ in ("new-1", store.describe([5])[0]["id"]):
        old, count = store.index(id_), store.count()
        store.remove(id_)
        assert store.index(id_) is None and store.indexes([id_]) == [old]
        assert store.count() == count - 1 and id_ not in found(store, "")
        with pytest.raises(Refused, match="no such item"):
            store.remove(id_)
        again = add(store, id_, "Another balm")
        assert store.index(id_) == store.indexes([id_])[0] == again > first
        assert store.count() == count
    assert store.changes({}).removed == [first, 5]


def test_titles_are_found_by_words_their_beginnings_and_pieces_of_scripts_without_blanks(store):
    titles = {
        "lip": "Lip balm", "red": "Red lip balm", "tea": "杭州特级绿茶", "kana": "抹茶ラテの素",
        "thai": "ชาเขียวญี่ปุ่น", "fire": "🔥 Sauce", "cpp": "C++ primer", "cafe": "Café au lait 2",
    }  # fmt: skip
    for id_, title in titles.items():
        add(store, id_, title)
    for words, ids in {
        "lip ba": ["lip", "red"], "RED li": ["red"], "绿茶": ["tea"], "茶": ["tea", "kana"],
        "ラテ": ["kana"], "เขียว": ["thai"], "🔥": ["fire"], "c++": ["cpp"], "café": ["cafe"],
        "2": ["cafe"], "州级": [], "balmy": [], "...": [], '"': [], "AND": [],
    }.items():  # fmt: skip
        assert [one for one in found(store, words) if one in titles] == ids, words
    assert words_of("Öl & 绿茶!") == ["öl", "绿", "茶"]


def test_a_forgotten_user_is_not_read_any_more_and_may_begin_anew(run, folder, store):
    other = Store(run, folder)
    ids = [item["id"] for item in store.describe([1, 2])]
    store.take("u001", ids)
    store.take("newcomer", ids)
    for user in ("u001", "newcomer"):
        store.forget(user)
        assert other.user(user) is None and user not in other.users(user, 5)["users"]
        with pytest.raises(Refused, match="nothing is known of user"):
            store.forget(user)
        store.take(user, ids)
        assert other.user(user) == [1, 2]
        assert other.users(user, 5)["users"] == [user]
    assert store.changes({}).forgotten == ["u001", "newcomer"]


def test_who_is_forgotten_is_so_even_if_the_file_cannot_be_tidied(store):
    def refuse(action, *_):
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_PRAGMA else sqlite3.SQLITE_OK

    store._db.set_authorizer(refuse)
    store.forget("u001")
    store._db.set_authorizer(None)
    assert store.user("u001") is None


def test_a_user_is_asked_about_by_the_id_that_is_stored(store):
    about = {"method": "a", "methods": ["a"]}
    store.read_id = as_number
    store.take("7", [store.describe([0])[0]["id"]])
    assert as_job(Query(user_id="007"), store, about).details["user_id"] == "7"


def test_interactions_count_for_runs_of_the_same_data_only(run, folder, store, tmp_path):
    store.take("u001", [store.describe([1])[0]["id"]])
    later = Store(make_data(tmp_path / "later", seed=1), folder)
    assert store.user("u001")[-1] == 1
    assert later.user("u001") == load_data(later.run)[1].log.of(1).tolist()
    assert later.changes({}).taken == []


def test_an_unknown_id_or_field_is_refused_with_its_place_and_the_nearest(store):
    ids = [item["id"] for item in store.describe([1, 2])]
    with pytest.raises(Refused, match=f"did you mean {ids[1]}") as error:
        store.known([ids[0], ids[1] + "0"], "/history")
    assert error.value.field == "/history/1"
    with pytest.raises(Refused, match="did you mean brand") as error:
        store.with_values("brnd", ["x"], "/filter")
    assert error.value.field == "/filter/brnd"
    with pytest.raises(Refused):
        store.take("u001", ["nothing"])
    assert store.changes({}) is None


TAKE_MANY = """
import sys; from pathlib import Path
from streamctl.runs import RunDir; from streamctl.serving.store import Store
store = Store(RunDir(sys.argv[1]), Path(sys.argv[2]))
item = store.describe([0])[0]["id"]
for _ in range(20): store.take(sys.argv[3], [item])
"""


def test_two_processes_that_write_at_once_lose_nothing(run, folder, store):
    command = [sys.executable, "-c", TAKE_MANY, run.path, folder]
    workers = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert [len(store.user(name)) for name in "ab"] == [20, 20]


def test_a_change_that_fails_half_way_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.writing():
        store.add("half", "Half", "Half", {})
        raise RuntimeError
    assert store.index("half") is None and found(store, "half") == []


def test_what_a_full_disk_refuses_is_said_and_the_next_change_is_stored(run, folder, store):
    def refuse(action, what, *_):
        commits = action == sqlite3.SQLITE_TRANSACTION and what == "COMMIT"
        return sqlite3.SQLITE_DENY if commits else sqlite3.SQLITE_OK

    item = store.describe([0])[0]["id"]
    store._db.set_authorizer(refuse)
    with pytest.raises(StreamctlError, match="cannot be stored"):
        store.take("first", [item])
    store._db.set_authorizer(None)
    store.take("second", [item])
    assert [Store(run, folder).user(name) for name in ("first", "second")] == [None, [0]]


def test_a_file_that_is_no_store_is_named(run, folder):
    folder.mkdir()
    (folder / "live.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StreamctlError, match=r"cannot be opened: file is not a database"):
        Store(run, folder)


def test_keys_come_from_the_file_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# who may\nread {READ}  # the shop\nwrite {WRITE}\n")
    monkeypatch.setenv("STREAMCTL_READ_KEYS", f"{'e' * 20}, {'f' * 20}")
    ring = KeyRing(path)
    assert ring.guards_reading
    assert [ring.right_of(key) for key in (READ, WRITE, "e" * 20, "f" * 20)] == [
        "read",
        "write",
        "read",
        "read",
    ]
    assert ring.right_of(READ[:-1]) is None
    assert ring.right_of("\udc80") is None


def test_a_changed_key_file_is_in_force_at_once(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"read {READ}\n")
    ring = KeyRing(path)
    path.write_text(f"write {WRITE}\n# changed\n")
    assert ring.right_of(READ) is None
    assert ring.right_of(WRITE) == "write"


def test_a_key_file_that_breaks_is_spoken_of_and_keeps_the_last_keys_in_force(tmp_path, capfd):
    path = tmp_path / "keys"
    path.write_text(f"read {READ}\n")
    ring = KeyRing(path)
    path.write_text("reed something-quite-wrong\n")
    assert ring.right_of(READ) == "read"
    path.unlink()
    assert ring.right_of(READ) == ring.right_of(READ) == "read"
    said = capfd.readouterr().err.replace("\n", "")
    assert "keys:1" in said and said.count("cannot be read") == 1


@pytest.mark.parametrize("text", ["read short\n", "write\n", "admin " + READ, "read a b c\n"])
def test_a_wrong_key_file_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text("# first line\n" + text)
    with pytest.raises(StreamctlError, match="keys:2"):
        KeyRing(path)


@pytest.mark.parametrize("text", ["", "# none yet\n"])
def test_a_key_file_without_a_key_does_not_open_the_door(tmp_path, monkeypatch, text):
    monkeypatch.delenv("STREAMCTL_READ_KEYS", raising=False)
    monkeypatch.delenv("STREAMCTL_WRITE_KEYS", raising=False)
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(StreamctlError, match=r"holds no key\. Next: openssl"):
        KeyRing(path)


def test_without_keys_reading_is_open_and_no_key_may_write(monkeypatch):
    monkeypatch.delenv("STREAMCTL_READ_KEYS", raising=False)
    monkeypatch.delenv("STREAMCTL_WRITE_KEYS", raising=False)
    ring = KeyRing(None)
    assert not ring.guards_reading
    assert ring.right_of(WRITE) is None


class Slow:
    """A model that takes 0.3 s to load a method; `most` have done so at the same time."""

    loading = most = 0
    stopped = False

    async def ask(self, what: str, **details):
        if what == "add":
            await asyncio.sleep(0.3)
            return self.stopped
        if what == "load":
            Slow.loading += 1
            Slow.most = max(Slow.most, Slow.loading)
            await asyncio.sleep(0.3)
            Slow.loading -= 1
            return None
        return [{"items": [], "method": details["method"], "think": 0, "note": None,
                 "explain": None} for _ in details["jobs"]]  # fmt: skip

    async def answer(self, jobs):
        return await self.ask("answer", jobs=jobs, **jobs[0].group)

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def slow(run, folder) -> Service:
    service = Service(Settings(run.path, store=folder, deadline_ms=200))
    served = service._served = Served(run.path, service.settings)
    served.about, served.loaded = {"method": "a", "methods": ["a", "b"], "history": 20}, {"a"}
    served.models = [Slow(), Slow()]
    return service


def begin(served: Served) -> Query:
    """Let the models work; a question for the method that they have not loaded."""
    served._tasks = [
        asyncio.create_task(served.batcher.serve(model.answer)) for model in served.models
    ]
    return Query(history=[served.store.names([0])[0]["id"]], method="b")


def test_a_method_is_loaded_outside_the_deadline_and_one_model_after_another(slow):
    async def asked() -> list[str]:
        query = begin(slow.served)
        answers = await slow.recommend([query]) + await slow.recommend([query])
        await slow.stop()
        return [answer["method"] for answer in answers]

    assert asyncio.run(asked()) == ["b", "b"]
    assert Slow.most == 1 and slow.served.loaded == {"a", "b"}


def test_who_waits_for_a_method_is_answered_before_its_run_goes(slow):
    async def asked() -> list[str]:
        answer = asyncio.create_task(slow.recommend([begin(slow.served)]))
        await asyncio.sleep(0.01)
        await slow.served.stop()
        return [one["method"] for one in await answer]

    assert asyncio.run(asked()) == ["b"]


def test_an_item_that_is_being_added_is_in_before_its_run_goes(slow):
    async def stopped_before_it_was_added() -> bool:
        adding = asyncio.create_task(slow.served.ask("add"))
        await asyncio.sleep(0.01)
        await slow.served.stop()
        return await adding

    assert asyncio.run(stopped_before_it_was_added()) is False


def test_what_a_user_took_is_stored_before_its_run_goes(slow, run, folder):
    beside = Store(run, folder)
    item = beside.names([0])[0]["id"]

    async def main() -> None:
        with beside.writing():  # who writes now waits
            taking = asyncio.create_task(slow.change("take", "somebody", [item]))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(slow.served.stop())
            await asyncio.sleep(0.1)
        await asyncio.gather(taking, stopping)

    asyncio.run(main())
    assert beside.user("somebody") == [0]


@pytest.mark.parametrize("kind", [StreamctlError, RuntimeError, Gone, OSError])
def test_a_replacement_that_cannot_load_is_ended_and_another_tried(run, folder, monkeypatch, kind):
    errors = [kind("not this one")]

    class Fake:
        def __init__(self):
            self.ended = asyncio.Event()

        async def died(self) -> str:
            await self.ended.wait()
            return "exit code -9"

        async def answer(self, jobs) -> None:
            raise AssertionError

    async def start(also, **settings) -> Fake:
        assert also == ["a", "b"]
        if errors:
            raise errors.pop()
        return Fake()

    async def replaced() -> list[Fake]:
        served = Served(run.path, Settings(run.path, store=folder), ["b", "a"])
        served.models = [first := Fake()]
        keeper = asyncio.create_task(served._keep(first))
        first.ended.set()
        async with asyncio.timeout(10):
            while served.models in ([first], []):
                await asyncio.sleep(0.001)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        return served.models

    monkeypatch.setattr(services, "RETRY_S", 0.0)
    monkeypatch.setattr(services.Model, "start", staticmethod(start))
    assert len(asyncio.run(replaced())) == 1


@pytest.mark.parametrize("starts", ["while another loads", "after all have loaded"])
def test_a_model_that_starts_while_others_load_a_method_has_it_too(
    run, folder, monkeypatch, starts
):
    class Fake:
        def __init__(self, loaded):
            self.loaded, self.ended, self.may_load = {*loaded}, asyncio.Event(), asyncio.Event()

        async def ask(self, what: str, method: str) -> None:
            await self.may_load.wait()
            self.loaded.add(method)

        async def died(self) -> str:
            await self.ended.wait()
            return "exit code -9"

        async def answer(self, jobs) -> None:
            raise AssertionError

    async def main() -> list[set[str]]:
        served = Served(run.path, Settings(run.path, store=folder), ["a"])
        served.models = [dies, lives] = [Fake("a"), Fake("a")]
        may_start, started = asyncio.Event(), []

        async def start(also, **settings) -> Fake:
            started.append(model := Fake(also))
            model.may_load.set()
            await may_start.wait()
            return model

        async def until(true) -> None:
            async with asyncio.timeout(10):
                while not true():
                    await asyncio.sleep(0)

        monkeypatch.setattr(services.Model, "start", staticmethod(start))
        keeper = asyncio.create_task(served._keep(dies))
        loading = asyncio.create_task(served.load("b"))
        dies.may_load.set()
        await until(lambda: "b" in dies.loaded)
        dies.ended.set()
        await until(lambda: started)
        if starts == "while another loads":
            may_start.set()
            await until(lambda: len(served.models) == 2)
        lives.may_load.set()
        await loading
        may_start.set()
        await until(lambda: len(served.models) == 2)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        return [model.loaded for model in served.models]

    assert asyncio.run(main()) == [{"a", "b"}] * 2


def test_a_model_that_loads_what_others_have_is_ended_with_its_server(run, folder, monkeypatch):
    class Fake:
        killed = False

        async def ask(self, what: str, method: str) -> None:
            await asyncio.Event().wait()

        def kill(self) -> None:
            self.killed = True

    async def main() -> bool:
        served = Served(run.path, Settings(run.path, store=folder))

        async def start(**settings) -> Fake:
            served.loaded.add("b")  # meanwhile
            return model

        model = Fake()
        monkeypatch.setattr(services.Model, "start", staticmethod(start))
        served._tasks = [asyncio.create_task(served._start())]
        await asyncio.sleep(0.01)
        await served.stop()
        return model.killed

    assert asyncio.run(main())


# What is typed at the server's terminal must not end the compiler: it leads its own session.
ALONE = "import os; raise SystemExit(os.getsid(0) != os.getpid())"


@pytest.mark.parametrize(("program", "made_anew"), [(ALONE, True), ("raise SystemExit(1)", False)])
def test_models_in_plain_pytorch_make_room_when_the_compiler_is_done(
    run, monkeypatch, tmp_path, capfd, program, made_anew
):
    made = []

    class Fake:
        loaded = frozenset("ab")

        def __init__(self, path, settings, loaded=()):
            assert loaded == ({"b"} if made else ())
            self.run, self.store, self.stopped = RunDir(path), self, False
            model = {"model": {"run": "run"}, "compiled": bool(made)}
            self.about = model | {"method": "a", "why": "you chose it"}
            made.append(self)

        async def start(self) -> None:
            pass

        def count(self) -> int:
            return 120

        async def stop(self) -> None:
            self.stopped = True

    (tmp_path / "compiler_of_a_test.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(services, "COMPILER", "compiler_of_a_test")
    monkeypatch.setattr(services, "Served", Fake)

    async def settled() -> Service:
        service = Service(Settings(run.path))
        await service._load_first()
        await asyncio.sleep(0)
        return service

    service = asyncio.run(settled())
    assert service.served is made[-1] and service.failure is None
    assert [one.stopped for one in made] == ([True, False] if made_anew else [False])
    assert ("the compiler failed" in capfd.readouterr().err) is not made_anew
