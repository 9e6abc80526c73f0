"""Splits of one's own: parts that a source comes in, and moments; nothing of the future leaks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamctl.config import DataConfig
from streamctl.data import Split, load_data, prepare
from streamctl.data.doctor import examine
from streamctl.data.prepare import build
from streamctl.data.sources import read_source
from streamctl.data.sources.raw import RawLog
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir

HEADER = "user_id,item_id,timestamp\n"
PARTS = {
    "train": [("a", "1", 5), ("b", "2", 1), ("a", "2", 3), ("b", "3", 2)],
    "valid": [("a", "3", 7), ("b", "1", 9)],
    "test": [("b", "4", 11), ("a", "4", 12), ("a", "5", 13), ("new", "1", 14)],
}


def as_csv(rows, header=HEADER, mark=",") -> str:
    return header + "".join(mark.join(map(str, row)) + "\n" for row in rows)


def table_parts(folder: Path) -> None:
    for name, rows in PARTS.items():
        (folder / f"{name}.csv").write_text(as_csv(rows))


def other_names(folder: Path) -> None:
    for name, part in (("train", "train"), ("valid", "val"), ("test", "test")):
        (folder / f"clicks_{part}.tsv").write_text(as_csv(PARTS[name], "uid\tiid\tts\n", "\t"))


def recbole_parts(folder: Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    for name, rows in PARTS.items():
        (folder / f"toy.{name}.inter").write_text(as_csv(rows, header, "\t"))
    (folder / "toy.item").write_text("item_id:token\ttitle:token_seq\n1\tOne\n")


def amazon_parts(folder: Path) -> None:
    for name, rows in PARTS.items():
        rows = [(user, item, 5.0, time) for user, item, time in rows]
        text = as_csv(rows, "user_id,parent_asin,rating,timestamp\n")
        (folder / f"Toys.{name}.csv").write_text(text)
    (folder / "meta_Toys.jsonl").write_text(json.dumps({"parent_asin": "1", "title": "One"}))


def targets(examples, catalog, log):
    """(user, history, target) of each example, by external id."""
    rows = examples.histories(np.arange(len(examples)))
    return [
        (log.user_ids[user], [catalog.ids[i] for i in row if i >= 0], catalog.ids[target])
        for user, row, target in zip(examples.users, rows, examples.targets, strict=True)
    ]


@pytest.mark.parametrize("write", [table_parts, other_names, recbole_parts, amazon_parts])
def test_a_source_in_parts_is_split_as_it_came(tmp_path, write):
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    run = RunDir(tmp_path / "run")
    facts = prepare(run, DataConfig(source=str(source))).json("statistics.json")
    catalog, split = load_data(run)
    log = split.log
    assert targets(split.train, catalog, log) == [("a", ["2"], "1"), ("b", ["2"], "3")]
    assert targets(split.valid, catalog, log) == [("a", ["2", "1"], "3"), ("b", ["2", "3"], "1")]
    # A stranger's first item has no history to be told from.
    assert targets(split.test, catalog, log) == [
        ("a", ["2", "1", "3"], "4"),
        ("a", ["2", "1", "3", "4"], "5"),
        ("b", ["2", "3", "1"], "4"),
    ]
    items, offsets = split.training_sequences()
    assert [catalog.ids[item] for item in items] == ["2", "1", "2", "3"]
    assert offsets.tolist() == [0, 2, 4, 4]
    assert split.popularity().sum() == 4
    assert (facts["split"], facts["test_targets"]) == ("auto", 3)
    assert "has no title" not in facts


def test_parts_can_be_split_anew(tmp_path, capsys):
    table_parts(tmp_path)
    config = DataConfig(min_user=3, min_item=1, split="leave-one-out")
    catalog, log, facts = build(read_source(tmp_path), config)
    assert log.cuts is None and facts["split"] == "leave-one-out"
    assert "own parts become one log" in " ".join(capsys.readouterr().err.split())
    assert [catalog.ids[i] for i in log.of(0)] == ["2", "1", "3", "4", "5"]
    with open(tmp_path / "test.csv", "a") as handle:
        handle.write("a,2,3\n")  # in train, too: one row twice in what is one log now
    config = DataConfig(min_user=2, min_item=1, split="12,13", repeats="drop")
    catalog, log, facts = build(read_source(tmp_path), config)
    assert facts["cleaned"] == {"repeats": 1}
    split = Split(log)
    assert log.timestamps[split.valid.end].tolist() == [12] * len(split.valid)
    assert log.timestamps[split.test.end].min() >= 13


def test_without_a_part_to_validate_on_the_last_of_training_does(tmp_path):
    table_parts(tmp_path)
    (tmp_path / "valid.csv").unlink()
    catalog, log, _ = build(read_source(tmp_path), DataConfig())
    split = Split(log)
    assert targets(split.valid, catalog, log) == [("a", ["2"], "1"), ("b", ["2"], "3")]
    assert len(split.train) == 0 and split.popularity().sum() == 2


def test_a_whole_log_beside_its_parts_is_the_log(tmp_path):
    amazon_parts(tmp_path)
    rows = [(u, i, 5.0, t) for part in PARTS.values() for u, i, t in part]
    (tmp_path / "Toys.csv").write_text(as_csv(rows, "user_id,parent_asin,rating,timestamp\n"))
    assert not read_source(tmp_path).split


def test_parts_that_write_times_in_two_ways_are_refused(tmp_path):
    table_parts(tmp_path)
    (tmp_path / "test.csv").write_text(as_csv([("a", "1", "2024-01-31")]))
    told = r"test\.csv: timestamp holds dates here and numbers in train\.csv"
    with pytest.raises(StreamctlError, match=told):
        read_source(tmp_path)


def test_two_logs_in_parts_are_named(tmp_path):
    table_parts(tmp_path)
    for name, rows in PARTS.items():
        (tmp_path / f"other.{name}.csv").write_text(as_csv(rows))
    with pytest.raises(StreamctlError, match="2 logs here"):
        read_source(tmp_path)


def test_the_doctor_finds_training_rows_that_know_the_test(tmp_path):
    table_parts(tmp_path)
    with open(tmp_path / "train.csv", "a") as handle:
        handle.write("a,4,12\nb,5,99\n")
    found = examine(tmp_path, DataConfig(source=str(tmp_path))).findings
    leak = next(f for f in found if f.topic == "leakage" and f.level == "warning")
    assert "train shares 1 interaction with a later part" in leak.what
    assert "holds what comes after a target of 2 users" in leak.what
    assert "--split leave-one-out" in leak.remedy


rows = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("123456"), st.integers(0, 50)),
    min_size=20,
    max_size=60,
)


@settings(max_examples=30, deadline=None)
@given(rows=rows, first=st.integers(5, 25), second=st.integers(26, 45))
def test_at_a_moment_nobodys_future_is_in_anybodys_training(rows, first, second):
    rows += [("e", "1", 0), ("e", "2", first), ("e", "3", 50)]
    users, items, times = zip(*rows, strict=True)
    config = DataConfig(min_user=1, min_item=1, split=f"{first},{second}")
    _, log, facts = build(RawLog.of(users, items, times), config)
    split = Split(log)
    trains = np.arange(len(log)) < np.repeat(split.valid_from, log.lengths)
    assert log.timestamps[trains].max() < first
    assert (log.timestamps[~trains] >= first).all()
    assert split.popularity().sum() == sum(time < first for time in times)
    for view, low, high in ((split.train, -1, first), (split.valid, first, second),
                            (split.test, second, 99)):  # fmt: skip
        moments = log.timestamps[view.end]
        assert ((moments >= low) & (moments < high)).all()
        assert (view.end > log.offsets[view.users]).all()  # something is before every target
        for example, seen in enumerate(view.seen(np.arange(len(view)))):
            assert len(seen) == view.end[example] - log.offsets[view.users[example]]
    assert facts["train_prefixes"] == len(split.train)
    assert facts["valid_targets"] == len(split.valid)
    assert facts["test_targets"] == len(split.test)


@settings(max_examples=15, deadline=None)
@given(rows=rows, later=rows)
def test_what_comes_after_the_moment_changes_nothing_that_trains(rows, later):
    everything = [(user, item, 0) for user in "abcd" for item in "123456"]
    past = [*everything, *((u, i, t) for u, i, t in rows if t < 30), ("a", "1", 35)]
    trained = []
    for future in (rows, later):
        future = [(u, i, t + 100) for u, i, t in future]
        users, items, times = zip(*past, *future, strict=True)
        config = DataConfig(min_user=1, min_item=1, split="30,40")
        split = Split(build(RawLog.of(users, items, times), config)[1])
        everyone = np.arange(len(split.train))
        trained.append([*split.training_sequences(), split.train.histories(everyone),
                        split.train.targets, split.popularity()])  # fmt: skip
    for one, other in zip(*trained, strict=True):
        np.testing.assert_array_equal(one, other)


DAY = 86_400
LOG = [(f"u{u}", f"i{(u * 3 + k) % 7}", 1_600_000_000 + DAY * (u + 10 * k)) for u in range(10)
       for k in range(10)]  # fmt: skip


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        (1, "2020-11-20"),
        (1000, "2020-11-20"),
        (10**6, "2020-11-20T00:00"),
        (10**9, "2020/11/20"),
        (1, str(1_605_830_400)),
        (1, "1605830400.0"),
    ],
)
def test_a_moment_is_a_date_in_any_unit_or_the_logs_own_number(unit, text):
    raw = RawLog.of(*zip(*((u, i, t * unit) for u, i, t in LOG), strict=True))
    _, log, _ = build(raw, DataConfig(split=text))
    split = Split(log)
    moments = log.timestamps[split.test.end]
    assert moments.min() >= 1_605_830_400 * unit > log.timestamps[split.valid.end].max()
    sizes = [(split.test_from - split.valid_from).sum(), (log.offsets[1:] - split.test_from).sum()]
    assert abs(int(sizes[0]) - int(sizes[1])) <= 5  # validation as large as test


def test_a_moment_by_share_and_where_it_is(capsys):
    _, log, _ = build(RawLog.of(*zip(*LOG, strict=True)), DataConfig(split="80%,90%"))
    split = Split(log)
    assert abs(len(split.test) - 10) <= 2 and abs(len(split.valid) - 10) <= 2
    first = (log.timestamps[part.end].min() for part in (split.valid, split.test))
    dates = [str(np.datetime64(int(time), "s")).replace("T", " ") for time in first]
    said = " ".join(capsys.readouterr().err.split())
    assert f"validation begins at {dates[0]}, test at {dates[1]}" in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("yesterday", "takes a date"),
        ("1990-01-01", "no interactions are left to train.*--split-at 80%,90%"),
        ("2100-01-01", r"no interactions are left to.*the log goes from 20\d\d-\d\d-\d\d.* to 20"),
        ("2020-12-01,2020-11-01", "validation comes before test"),
        ("80%,x%", "takes a share like 80%"),
        ("nan%", "takes a share like 80%"),
        ("800%", "takes a share like 80%"),
        ("nan", "takes a date or a number"),
        ("-Infinity", "takes a date or a number"),
        ("1e400", "no interactions are left to"),
        ("1,2,3", "takes TIME or VALIDATION,TEST"),
    ],
)
def test_a_moment_that_cannot_be_is_told(text, told):
    with pytest.raises(StreamctlError, match=told):
        build(RawLog.of(*zip(*LOG, strict=True)), DataConfig(split=text))


def test_a_log_in_order_only_has_no_moments():
    users, items, _ = zip(*LOG, strict=True)
    with pytest.raises(UsageError, match="gives the order only"):
        build(RawLog.of(users, items), DataConfig(split="80%"))


def test_users_of_one_interaction_each_have_no_neighbours():
    rows = [(f"u{n}", f"i{n % 3}", n) for n in range(10)]
    config = DataConfig(min_user=1, min_item=1, split="50%,80%")
    _, log, facts = build(RawLog.of(*zip(*rows, strict=True)), config)
    assert len(log) == 10 and facts["tied_neighbours"] == 0
