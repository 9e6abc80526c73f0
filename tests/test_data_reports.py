"""Logs as people have them: what reports of other tools were about comes out right here."""

from __future__ import annotations

import csv
import datetime
import decimal
import gc
import json
import os
import re
import zoneinfo
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from streamctl import cli
from streamctl.config import DataConfig
from streamctl.data import load_data, prepare
from streamctl.data.doctor import examine
from streamctl.data.prepare import build
from streamctl.data.sources import read_source
from streamctl.data.sources.items import as_number, id_text
from streamctl.data.sources.raw import PREFIX, RawLog, Reading
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir

HEAD = "user_id,item_id,timestamp"
USERS = range(4)
ORDER = [3, 0, 2, 1, 4]  # in which the items of every test here were taken; rows come as 0..4


def write(path: Path, times: list[str], name="timestamp") -> Path:
    """A log in which each user took item i at `times[i]`, the rows in the order of items."""
    with open(path, "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["user_id", "item_id", name])
        out.writerows((f"u{u}", f"i{i}", time) for u in USERS for i, time in enumerate(times))
    return path


def taken(source: Path, **settings) -> list[str]:
    catalog, log, _ = build(read_source(source), DataConfig(min_user=3, min_item=1, **settings))
    found = {tuple(catalog.ids[i] for i in log.of(user)) for user in range(log.n_users)}
    assert len(found) == 1
    return list(found.pop())


def in_order(moments: list) -> list:
    """The moments, ascending, given to the items in the order in which they were taken."""
    return [moments[ORDER.index(item)] for item in range(len(ORDER))]


EXPECTED = [f"i{item}" for item in ORDER]
FINE = {
    "a ten-thousandth of a second": [f"1700000000.{n}" for n in (1001, 1002, 1003, 1004, 1005)],
    "time.time()": [repr(1700000000.1234567 + n * 2.5e-7) for n in range(5)],
    "days": [repr(19675.123456789 + n * 1e-9) for n in range(5)],
    "normalised": [repr(0.1 + n * 1e-15) for n in range(5)],
    "18 digits": [f"17000000000000000{n}" for n in range(5)],
    "19 digits": [f"170000000000000000{n}" for n in range(5)],
    "exponents": ["1.7e9", "1.70000001e9", "17000000.2e2", "1700000030", "1.8e+9"],
    "as large as they may be": ["1.5", "2", "3", "4", str(2**62)],
    "below zero": ["-1.5", "-1.25", "-0.5", "0", "0.25"],
    "whole and fractions": ["1", "1.5", "2", "2.25", "3"],
    "nanoseconds in words": [f"2024-01-31T18:30:00.12345678{n}" for n in range(5)],
    "seven digits": [f"2024-01-31 18:30:00.123456{n}" for n in range(5)],
    "UTC": [f"2024-01-31 18:30:00.00{n} UTC" for n in range(5)],
    "Z": [f"2024-01-31T18:30:0{n}Z" for n in range(5)],
    "zones": ["2024-01-31T18:30:00+05:00", "2024-01-31T18:30:00+02", "2024-01-31T17:30:00Z",
              "2024-01-31 18:30:00", "2024-01-31T14:00:00-05:30"],
    "slashes": ["2024/01/31", "2024/02/01", "2024/02/01 10:00", "2024/2/3", "2024/10/01"],
    "days in words": ["1969-12-31", "1970-01-01", "2024-01-31", "2024-02-01", "2199-01-01"],
    "beyond nanoseconds": [f"{2261 + n}-05-01 00:00:00.000000001" for n in range(5)],
    "blanks around": [" 5", "6 ", " 7 ", "8", "  9"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FINE)
def test_times_keep_their_order_to_the_last_digit(tmp_path, kind):
    source = write(tmp_path / "log.csv", in_order(FINE[kind]))
    assert taken(source) == EXPECTED


def test_whole_times_are_kept_as_they_are_and_fractions_become_whole(tmp_path):
    for times, kept in (
        (["5", "7", "9"], [5, 7, 9]),
        (["0.5", "7", "9.25"], [50, 700, 925]),
        (["-0.5", "1e1", "20"], [-5, 100, 200]),
        (["1970-01-01", "1970-01-01 00:00:01.5", "1970-01-02"], [0, 1_500_000, 86_400_000_000]),
        (["1970-01-01 00:00:00.000000001", "1970-01-01 00:00:01", "1970-01-02"],
         [1, 10**9, 86_400 * 10**9]),
    ):  # fmt: skip
        raw = read_source(write(tmp_path / "log.csv", times))
        _, log, _ = build(raw, DataConfig(min_user=3, min_item=1))
        assert log.timestamps[:3].tolist() == kept


UTC = datetime.UTC
MOMENTS = [datetime.datetime(2024, 1, 31, 18, 30, second, tzinfo=UTC) for second in range(5)]
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
TYPES = {
    **{f"timestamp[{unit}]": (pa.timestamp(unit), [m.replace(tzinfo=None) for m in MOMENTS])
       for unit in ("s", "ms", "us", "ns")},
    "timestamp with a zone": (pa.timestamp("us", "Europe/Berlin"), MOMENTS),
    "timestamp[ns, UTC]": (pa.timestamp("ns", "UTC"), MOMENTS),
    "date32": (pa.date32(), [datetime.date(2024, 1, n) for n in range(1, 6)]),
    "date64": (pa.date64(), [datetime.date(2024, 1, n) for n in range(1, 6)]),
    "int32": (pa.int32(), list(range(1_700_000_000, 1_700_000_005))),
    "uint64": (pa.uint64(), [10**18 + n for n in range(5)]),
    "float64": (pa.float64(), [1.7e9 + n * 1e-6 for n in range(5)]),
    "float32": (pa.float32(), [n / 8 for n in range(5)]),
    "decimal": (pa.decimal128(30, 9), [decimal.Decimal(f"1700000000.00000000{n}")
                                       for n in range(5)]),
    "text": (pa.string(), [f"2024-01-31T18:30:0{n}.5+01:00" for n in range(5)]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), [f"1700000{n}" for n in range(5)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_arrow_type_that_tells_a_time_is_one(tmp_path, kind):
    type_, moments = TYPES[kind]
    times = pa.array(in_order(moments), type_)
    table = pa.table(
        {
            "user_id": [f"u{u}" for u in USERS for _ in range(5)],
            "item_id": [f"i{i}" for _ in USERS for i in range(5)],
            "timestamp": pa.concat_arrays([times] * len(USERS)),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    assert taken(tmp_path / "log.parquet") == EXPECTED


def test_nanoseconds_of_parquet_are_kept(tmp_path):
    moments = in_order([1_700_000_000_000_000_000 + n for n in range(5)])
    times = pa.array(moments * len(USERS), pa.timestamp("ns"))
    users, items = zip(*((f"u{u}", f"i{i}") for u in USERS for i in range(5)), strict=True)
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    pq.write_table(table, tmp_path / "log.parquet")
    assert taken(tmp_path / "log.parquet") == EXPECTED


NUMBERS = [12345670000.0, 1e10, 7.0, 1e17]


def parquet_log(path: Path, users: pa.Array, items: pa.Array) -> Path:
    count = len(users)
    columns = {
        "user_id": users.take(pa.array(np.repeat(np.arange(count), len(items)))),
        "item_id": items.take(pa.array(np.tile(np.arange(len(items)), count))),
    }
    times = pa.array(range(count * len(items)))
    pq.write_table(pa.table({**columns, "timestamp": times}), path)
    return path


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pa.array(NUMBERS), ["12345670000", "10000000000", "7", "100000000000000000"]),
        (pa.array([1.5, 2.25, 3.0]), ["1.5", "2.25", "3"]),
        (pa.array([1.0, 16777216.0, 3.0], pa.float32()), ["1", "16777216", "3"]),
        (pa.array([2**63 - 1, 5, -7]), ["9223372036854775807", "5", "-7"]),
        (pa.array([2**64 - 1, 5, 7], pa.uint64()), ["18446744073709551615", "5", "7"]),
        (pa.array(["007", "7", "7.0", " 7", "1e3"]), ["007", "7", "7.0", " 7", "1e3"]),
        (pa.array(["a", "b", "c"]).dictionary_encode(), ["a", "b", "c"]),
        (pa.array([b"a", b"b", b"c"]), ["a", "b", "c"]),
        (pa.array(["x", "y", "z"], pa.large_string()), ["x", "y", "z"]),
        (
            pa.array([decimal.Decimal(n) for n in ("1.00", "20.00", "1.50")]),
            ["1", "20", "1.5"],
        ),
    ],
)
def test_ids_of_parquet_are_what_a_person_would_write(tmp_path, ids, texts):
    raw = read_source(parquet_log(tmp_path / "log.parquet", ids, ids))
    assert sorted(raw.names("users")) == sorted(raw.names("items")) == sorted(texts)


def test_a_decimal_is_written_as_the_reader_writes_it():
    values = ["1.00", "20.00", "1.50", "0.000", "1" * 33, "12345670000.0"]
    texts = [id_text(decimal.Decimal(value)) for value in values]
    assert texts == ["1", "20", "1.5", "0", "1" * 33, "12345670000"]


@pytest.mark.parametrize("value", [*NUMBERS, 7, "007", " 7", "1e3", 1.5, 2**63, "é", True])
def test_an_id_is_written_the_same_in_every_door(tmp_path, value):
    """The log, the catalogue, json and what a question asks for: one function writes them all."""
    text = id_text(value)
    whole = isinstance(value, float) and value == int(value)
    assert text == (str(int(value)) if whole else str(value))
    rows = [json.dumps({"user_id": value, "item_id": value, "timestamp": n}) for n in range(3)]
    (tmp_path / "interactions.jsonl").write_text("\n".join(rows))
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": value, "title": "A thing"}))
    catalog, log, facts = build(read_source(tmp_path), DataConfig(min_user=3, min_item=1))
    assert catalog.ids == log.user_ids == [text]
    assert catalog.titles == ["A thing"] and facts["items_without_text"] == 0


def test_ids_of_a_text_stay_as_they_are(tmp_path):
    ids = ["007", "7", "7.0", " 7", "7 ", "1e3", "1000", "12345670000.0", "+5", "-0", "NaN", "null"]
    path = tmp_path / "log.csv"
    with open(path, "w", newline="") as handle:
        rows = [(user, item, n) for user in ids for n, item in enumerate(ids)]
        csv.writer(handle).writerows([("user_id", "item_id", "timestamp"), *rows])
    raw = read_source(path)
    assert raw.names("users") == raw.names("items") == sorted(ids)


@pytest.mark.parametrize(
    "text",
    ["7", "007", " 7 ", "+7", "-0", "1e3", "1.5", "0001.50", "000" + "1" * 30, "1" * 33, "1e31",
     "1e32", "NaN", "sNaN", "Infinity", "", "  ", "7.0000001", ".5", "1e400", "abc", "\u0663",
     "\u3000abc", "\u00a07", "\t7\n", "\tabc", "1,000"],
)  # fmt: skip
def test_numbers_are_read_in_the_catalogue_as_in_the_log(text):
    raw = RawLog(reading=Reading(numbers=True))
    raw.add({"user": [text], "item": [text], "time": ["1"]})
    assert raw.finish().names("items") == [as_number(text)]


def test_ids_that_are_the_same_number_are_one_id_if_that_is_asked_for(tmp_path):
    rows = "".join(f"0{u}.0,{i}.0,{i}\n" for u in range(3) for i in range(4))
    (tmp_path / "interactions.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    lines = [json.dumps({"item_id": i, "title": f"Number {i}"}) for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    source = str(tmp_path)
    found = examine(tmp_path, DataConfig(source=source)).findings
    assert any("--ids number" in finding.remedy for finding in found)
    config = DataConfig(source=source, min_user=3, min_item=1, ids="number")
    run = RunDir(tmp_path / "run")
    assert prepare(run, config).json("statistics.json")["items_without_text"] == 0
    catalog, split = load_data(run)
    assert sorted(catalog.ids) == ["0", "1", "2", "3"]
    assert split.log.user_ids == ["0", "1", "2"]


def quoted_log(path: Path, bad: str = "") -> Path:
    """A log with a text column whose values hold line breaks, blank lines and quotes."""
    with open(path, "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["user_id", "item_id", "review", "timestamp"])
        for n in range(2000):
            out.writerow([f"u{n % 20}", f"i{n % 13}", f'line "one"\n\nline, two\n{n}', n])
        handle.write(bad)
    return path


def test_line_breaks_inside_quotes_are_text(tmp_path):
    raw = read_source(quoted_log(tmp_path / "log.csv"))
    assert raw.sizes == {"users": 20, "items": 13, "interactions": 2000}
    found = examine(tmp_path / "log.csv", DataConfig(min_user=3, min_item=1)).findings
    assert next(f for f in found if f.topic == "lines").what == "every line is well formed"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("u1,i1\n", "2 columns where the header has 4"),
        ("u1,i1,fine,never\n", "timestamp is 'never'"),
        (",i1,fine,5\n", "user_id is empty"),
        ('u1,i1,"a\nb",5,6\n', "5 columns where the header has 4"),
        ('u1,i1,"a"b,5\n', "a quote that is not closed"),
    ],
)
def test_the_line_of_a_fault_counts_the_breaks_before_it(tmp_path, bad, told):
    path = quoted_log(tmp_path / "log.csv")
    line = path.read_bytes().count(b"\n") + 1
    quoted_log(path, bad + "u1,i1,fine,7\n")
    with pytest.raises(StreamctlError, match=f":{line}: .*{told}"):
        read_source(path)
    found = examine(path, DataConfig(min_user=3, min_item=1))
    lines = next(f for f in found.findings if f.topic == "lines")
    assert "1 bad line" in lines.what and f":{line}: " in lines.lines[0]
    assert found.statistics["read"]["interactions"] == 2001


@pytest.mark.parametrize("lines", [30, 12_000])
def test_a_quote_that_is_never_closed_takes_its_own_line_alone(tmp_path, lines):
    good = [f"u{n % 5},i{n % 7},{n}" for n in range(lines)]
    (tmp_path / "log.csv").write_text("\n".join([HEAD, good[0], 'u1,"i1,5', *good[1:]]))
    items = [f'i{n},5" tube {n}' for n in range(7)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *items, 'i9,"open']))
    reading = Reading(skip_bad=True)
    raw = read_source(tmp_path / "log.csv", items=tmp_path / "items.csv", reading=reading)
    assert len(raw) == lines
    assert [(damage.path.name, damage.lines[0][0]) for damage in reading.damages] == [
        ("log.csv", 3)
    ]
    assert raw.catalogue.columns["title"] == [*(line.split(",")[1] for line in items), "open"]


def test_lines_that_end_now_so_now_so(tmp_path):
    content = b"user_id,item_id,timestamp\nu,a,1\r\nu,b,2\nu,c,3\r\n"
    (tmp_path / "log.csv").write_bytes(content)
    assert len(read_source(tmp_path / "log.csv")) == 3
    (tmp_path / "log.csv").write_bytes(content + b"u,d\r\n")
    with pytest.raises(StreamctlError, match=":5: 2 columns"):
        read_source(tmp_path / "log.csv")


LISTS = pa.array([["a"], ["b"], ["c"]])


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"item_id": LISTS}, r"column 'item_id' holds varchar\[\], not ids"),
        ({"user_id": pa.array([{"a": 1}] * 3)}, "column 'user_id' holds struct.*not ids"),
        ({"timestamp": pa.array([[1]] * 3)}, "column 'timestamp' holds .*not times"),
        (
            {"timestamp": pa.array([datetime.time(10)] * 3)},
            "'timestamp' holds times of day .* Next: --columns time=NAME",
        ),
        ({"user_id": pa.array([1.0, float("nan"), 2.0])}, ":2: user_id is empty"),
        ({"user_id": pa.array(["a", None, "b"])}, ":2: user_id is empty"),
        ({"item_id": pa.array(["a", "", "b"])}, ":2: item_id is empty"),
        ({"timestamp": pa.array([1, None, 3])}, ":2: timestamp is ''"),
        ({"timestamp": pa.array(["1", "2024-01-31", "3"])}, ":2: .* number in some lines and a d"),
    ],
)
def test_what_a_parquet_file_cannot_be_used_for_is_said_of_its_column(tmp_path, columns, told):
    usual = {"user_id": pa.array([*"aab"]), "item_id": pa.array([*"xyz"]), "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(usual | columns), tmp_path / "log.parquet")
    with pytest.raises(StreamctlError, match=told) as caught:
        read_source(tmp_path / "log.parquet")
    assert "not a parquet file" not in str(caught.value)


RATED = [(f"u{u}", f"i{(u + 2 * k) % 9}", k, k % 5 + 1, ("view", "cart", "buy")[k % 3])
         for u in range(8) for k in range(15)]  # fmt: skip


def rated_log(folder: Path, names=("rating", "event_type")) -> Path:
    with open(folder / "log.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["user_id", "item_id", "timestamp", *names])
        out.writerows(RATED)
    return folder / "log.csv"


def prepared(source: Path, run: Path, **settings):
    config = DataConfig(source=str(source), min_user=3, min_item=1, **settings)
    stage = prepare(RunDir(run), config)
    return *load_data(RunDir(run)), stage.json("statistics.json")


def test_ratings_below_a_least_are_no_interactions(tmp_path):
    _, split, facts = prepared(rated_log(tmp_path), tmp_path / "run", min_rating=4)
    assert len(split.log) == sum(row[3] >= 4 for row in RATED)
    assert facts["cleaned"] == {"min_rating": sum(row[3] < 4 for row in RATED)}
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,i,1\n")
    with pytest.raises(StreamctlError, match=r"no column of ratings.*--columns rating=NAME"):
        prepared(tmp_path / "log.csv", tmp_path / "other", min_rating=4)
    rows = "".join(f"u;i{number};{number};4,5\n" for number in range(3))
    (tmp_path / "log.csv").write_text("user_id;item_id;timestamp;rating\n" + rows)
    with pytest.raises(UsageError, match="3 ratings missing or not a number"):
        prepared(tmp_path / "log.csv", tmp_path / "commas", min_rating=4)


def test_an_items_file_of_other_ids_is_spoken_of(tmp_path, capsys):
    (tmp_path / "items.csv").write_text("item_id,title\nZ1,Vase\nZ2,Cup\n")
    prepared(rated_log(tmp_path), tmp_path / "run", items=str(tmp_path / "items.csv"))
    said = " ".join(capsys.readouterr().err.split())
    assert "no id of the items file is one of the log's: 'Z1' there" in said


def test_a_kind_of_event_that_never_happens_is_spoken_of(tmp_path, capsys):
    _, split, _ = prepared(rated_log(tmp_path), tmp_path / "run", events="buy,purchase")
    assert len(split.log) == sum(row[4] == "buy" for row in RATED)
    said = " ".join(capsys.readouterr().err.split())
    assert "no event is purchase; the kinds are buy, cart, view" in said


def test_kinds_of_events_are_kept_and_weighed(tmp_path):
    source = rated_log(tmp_path)
    _, split, _ = prepared(source, tmp_path / "a", events="cart,buy")
    assert len(split.log) == sum(row[4] != "view" for row in RATED)
    assert split.log.weights is None and split.popularity().dtype.kind == "i"
    catalog, split, _ = prepared(source, tmp_path / "b", events="view=0.25,buy")
    assert sorted(set(split.log.weights.tolist())) == [0.25, 1.0]
    items, _ = split.training_sequences()
    weights = split.training_weights()
    assert len(items) == len(weights) == len(split.log) - 2 * split.log.n_users
    expected = np.zeros(len(catalog))
    np.add.at(expected, items, weights)
    np.testing.assert_allclose(split.popularity(), expected)
    with pytest.raises(UsageError, match="the kinds are buy, cart, view"):
        prepared(source, tmp_path / "c", events="purchase")
    for wrong in ("buy=0", "buy=-1", "buy=x", "buy=nan", "buy=1e-9", "buy=inf"):
        with pytest.raises(UsageError, match="--events takes"):
            prepared(source, tmp_path / "d", events=wrong)


@pytest.mark.parametrize("names", [("overall", "behavior"), ("stars", "action")])
def test_ratings_and_events_that_are_there_and_ignored_are_spoken_of(tmp_path, capsys, names):
    prepared(rated_log(tmp_path, names), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert f"column '{names[0]}' is not used" in said and "--min-rating N" in said
    assert f"column '{names[1]}' is not used" in said and "--events" in said


REPEATED = [("u", "a", 1), ("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "c", 4),
            ("u", "c", 4), ("u", "c", 4), ("u", "b", 9)]  # fmt: skip


@pytest.mark.parametrize(
    ("repeats", "left"),
    [("keep", "aabacccb"), ("drop", "abacb"), ("first", "abc"), ("last", "acb")],
)
def test_repeats_are_kept_or_dropped(repeats, left):
    raw = RawLog.of(*zip(*REPEATED, strict=True))
    catalog, log, facts = build(raw, DataConfig(min_user=3, min_item=1, repeats=repeats))
    assert "".join(catalog.ids[item] for item in log.items) == left
    assert facts["cleaned"].get("repeats", 0) == len(REPEATED) - len(left)


def test_a_crawler_is_named_and_capped(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", n) for u in range(30) for n, i in enumerate(rng.permutation(40)[:6])]
    rows += [("bot", f"i{n % 40}", n) for n in range(9000)]
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    )
    found = examine(tmp_path / "log.csv", DataConfig()).findings
    crawler = next(f for f in found if f.topic == "users")
    assert "user 'bot' has 98.0% of all interactions" in crawler.what
    cap = int(crawler.remedy.split()[1])
    assert crawler.remedy.startswith("--max-per-user")
    catalog, split, facts = prepared(tmp_path / "log.csv", tmp_path / "run", max_per_user=cap)
    bot = split.log.user_ids.index("bot")
    assert [catalog.ids[i] for i in split.log.of(bot)] == [
        f"i{n % 40}" for n in range(9000 - cap, 9000)
    ]
    assert facts["cleaned"] == {"max_per_user": 9000 - cap}
    assert split.log.lengths[:-1].max() <= cap


def test_bad_lines_up_to_a_share_are_left_out_counted_and_listed(tmp_path, capsys):
    good = "".join(f"u{u},i{i},{i}\n" for u in range(5) for i in range(6))
    (tmp_path / "interactions.csv").write_text(
        f"user_id,item_id,timestamp\n{good}u1,i1\nu1,,4\nu1,i1,then\n"
    )
    items = "".join(json.dumps({"item_id": f"i{i}", "title": f"T{i}"}) + "\n" for i in range(6))
    (tmp_path / "items.jsonl").write_text(items + "oops\n")
    _, split, facts = prepared(tmp_path, tmp_path / "run", skip_bad=0.2)
    assert len(split.log) == 30
    assert facts["bad_lines"] == {"interactions.csv": 3, "items.jsonl": 1}
    said = " ".join(capsys.readouterr().err.split())
    assert "interactions.csv: 3 bad lines left out" in said
    for told in ("line 32: 2 columns where the header has 3", "line 33: item_id is empty",
                 "line 34: timestamp is 'then'", "line 7: not a JSON object"):  # fmt: skip
        assert told in said
    with pytest.raises(StreamctlError, match=r"3 bad lines \(9\.1%\).*--skip-bad 0\.091"):
        prepared(tmp_path, tmp_path / "other", skip_bad=0.05)
    with pytest.raises(StreamctlError, match="32: 2 columns"):
        prepared(tmp_path, tmp_path / "strict")
    # The doctor's remedy is enough for both files.
    found = examine(tmp_path, DataConfig(min_user=3, min_item=1)).findings
    remedy = next(f.remedy for f in found if f.topic == "lines")
    share = float(re.match(r"--skip-bad (\S+)", remedy)[1])
    assert share == 0.143
    prepared(tmp_path, tmp_path / "enough", skip_bad=share)


@pytest.mark.parametrize("text", ["nan", "inf", "-sNaN", "1e999999999", "9999-12-31", "0001-01-01"])
def test_moments_that_no_log_has_are_told_in_one_line(text):
    for name in ("since", "until"):
        raw = RawLog.of(["u"] * 4, "abcd", [1, 2, 3, 4])
        try:
            left = len(build(raw, DataConfig(min_user=3, min_item=1, **{name: text}))[1])
            assert left == 4
        except StreamctlError as error:
            assert "leaves none of 4" in str(error) or "takes a date" in str(error)


@pytest.mark.parametrize("unit", [1, 1000])
def test_until_a_day_is_until_its_end(unit):
    hours = [1_706_659_200 + 3600 * hour for hour in range(0, 72, 6)]  # from 2024-01-31 on
    for text, kept in (("2024-01-31", 4), ("2024/02/01", 8), ("2024-01-31T12:00", 3)):
        raw = RawLog.of(["u"] * 12, list("abcdefghijkl"), [hour * unit for hour in hours])
        log = build(raw, DataConfig(min_user=3, min_item=1, until=text))[1]
        assert len(log) == kept, text


def test_times_and_items_that_are_not_wanted_are_left_out(tmp_path):
    rows = [(f"u{u}", f"i{i}", f"2024-01-{1 + i:02}") for u in range(5) for i in range(9)]
    raw = RawLog.of(*zip(*((u, i, int(t[-2:])) for u, i, t in rows), strict=True))
    assert len(build(raw, DataConfig(min_user=3, min_item=1, since="2.5", until="7.5"))[1]) == 25
    (tmp_path / "interactions.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    )
    items = [json.dumps({"item_id": f"i{i}", "title": "T"}) for i in range(7)]
    (tmp_path / "elsewhere.jsonl").write_text("\n".join(items))
    settings = {"items": str(tmp_path / "elsewhere.jsonl"), "since": "2024-01-03"}
    _, split, facts = prepared(tmp_path, tmp_path / "run", described=True, **settings)
    assert len(split.log) == 25
    assert facts["cleaned"] == {"since": 10, "described": 10}
    assert facts["items_without_text"] == 0
    with pytest.raises(UsageError, match="takes a date here"):
        prepared(tmp_path, tmp_path / "other", since="5")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"since": "2030-01-01"}, "--since 2030-01-01 leaves none of 6 interactions; the log goes"),
        ({"until": "2001-01-01"}, "from 2024-01-01 to 2024-01-06. Next: another --until"),
        ({"min_rating": 4.5}, "--min-rating 4.5 leaves none of 6 interactions. Next: another"),
    ],
)
def test_what_leaves_nothing_is_named_and_not_the_filters_behind_it(tmp_path, settings, told):
    rows = [f"u,i{day},2024-01-0{day},4\n" for day in range(1, 7)]
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rating\n" + "".join(rows))
    with pytest.raises(UsageError) as caught:
        prepared(tmp_path / "log.csv", tmp_path / "run", **settings)
    assert told in str(caught.value) and "--min-user" not in str(caught.value)


def test_sequences_have_no_ratings_to_choose_by(tmp_path):
    (tmp_path / "user_sequence.txt").write_text("u a b c d e\n")
    for settings in ({"min_rating": 4}, {"events": "buy"}):
        with pytest.raises(UsageError, match="the format sequences holds no"):
            prepared(tmp_path, tmp_path / "run", **settings)


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    """Not even of a process that was killed; what a living one uses is let alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "lock").touch()
    os.utime(tmp_path / f"{PREFIX}dead" / "lock", (0, 0))
    (tmp_path / f"{PREFIX}dead" / "log.duckdb").touch()
    raw = RawLog(size=1 << 30)
    other = RawLog()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {Path(raw.folder.name).name, Path(other.folder.name).name}
    assert (Path(raw.folder.name) / "log.duckdb").exists()
    del raw, other
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_temporary_files_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "log.csv", [*"12345"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(StreamctlError, match="none"):
        read_source(path)


def test_a_dense_log_has_no_negative_sparsity():
    rows = [(u, i, n) for u in "ab" for n, i in enumerate("xyxyxyxy")]
    _, _, facts = build(RawLog.of(*zip(*rows, strict=True)), DataConfig(min_user=3, min_item=1))
    assert facts["sparsity"] == 0.0


def test_all_options_together_on_the_command_line(tmp_path, monkeypatch, capsys):
    source = rated_log(tmp_path)
    with open(source, "a") as handle:
        handle.write("bad\n")
    items = [json.dumps({"item_id": f"i{i}", "title": f"T{i}"}) for i in range(8)]
    (tmp_path / "things.jsonl").write_text("\n".join(items))
    options = f"""--items {tmp_path}/things.jsonl --skip-bad 0.1 --ids exact --since 1 --until 13
        --min-rating 2 --events view=0.5,cart,buy --drop-repeats --described --max-per-user 9
        --min-user 1 --min-item 1 --split-at 60%,80% --ties shuffle --seed 3 --json"""
    run = tmp_path / "run"
    words = ["streamctl", "data", "prepare", str(source), "--run", str(run), *options.split()]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["cleaned"]) == [
        "since", "until", "min_rating", "events", "described", "repeats", "max_per_user"
    ]  # fmt: skip
    assert facts["bad_lines"] == {"log.csv": 1} and facts["test_targets"] > 0
    _, split = load_data(RunDir(run))
    assert split.log.lengths.max() <= 9 and split.log.weights is not None
    for pair in (["--drop-repeats", "--one-per-item", "first"],
                 ["--split", "auto", "--split-at", "80%"]):  # fmt: skip
        monkeypatch.setattr("sys.argv", [*words[:4], "--run", str(tmp_path / "other"), *pair])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--one-per-item", "drop"], "'drop'; it takes first or last. Next: --drop-repeats"),
        (["--one-per-item", "middle"], "'middle'; it takes first or last. Next: --one-per-item"),
        (["--ties=now"], "error: --ties is 'now'; it takes one of keep, shuffle, runs. Next: "),
        (["--min-item", "-2"], "error: --min-item is -2; it must be 0 to"),
        (["--set", "ties"], "Next: --set ties=VALUE"),
        (["--columns", "usr=a"], "Next: --columns user=NAME"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_typed(words, told, tmp_path, monkeypatch, capsys):
    log = rated_log(tmp_path)
    run = str(tmp_path / "run")
    monkeypatch.setattr(
        "sys.argv", ["streamctl", "data", "prepare", str(log), "--run", run, *words]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_remedy_is_not_what_is_in_use_already():
    rows = [(f"u{n // 3}", f"i{n}", n) for n in range(9)]
    with pytest.raises(StreamctlError, match="Next: --min-user 3 --min-item 1"):
        build(RawLog.of(*zip(*rows, strict=True)), DataConfig())
    for config in (DataConfig(), DataConfig(min_user=3, min_item=1)):
        raw = RawLog.of(*zip(*rows[:2], strict=True))
        with pytest.raises(StreamctlError, match=r"Next: more data: .* took 3 items") as caught:
            build(raw, config)
        assert "--min-user" not in str(caught.value)
    raw = RawLog.of(*zip(*rows, strict=True))
    with pytest.raises(StreamctlError, match="Next: --min-user 3 --min-item 1"):
        build(raw, DataConfig(min_user=2))


def test_every_option_that_the_doctor_names_is_one_of_prepare():
    from test_cli import commands

    prepare = next(command for words, command in commands() if words == ("data", "prepare"))
    known = {name for parameter in prepare.params for name in parameter.opts}
    folder = ROOT / "streamctl" / "data"
    text = "".join((folder / name).read_text() for name in ("doctor.py", "statistics.py"))
    named = set(re.findall(r"--[a-z-]+", text))
    assert len(named) > 10
    assert named <= known


def test_a_quote_that_an_item_never_closes_swallows_no_other_item(tmp_path):
    log = "\n".join([HEAD, "u0,a,1", "u0,b,2", "u1,c,3"])
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text('item_id,title\na,"open\nb,two\nc,three\n')
    with pytest.raises(StreamctlError, match=r"items\.csv:2: .*a quote that is not closed"):
        read_source(tmp_path / "log.csv", items=tmp_path / "items.csv").catalogue  # noqa: B018
    reading = Reading(skip_bad=True)
    raw = read_source(tmp_path / "log.csv", items=tmp_path / "items.csv", reading=reading)
    assert raw.catalogue.columns["title"] == ["two", "three"]
