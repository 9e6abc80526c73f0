"""Mistakes in the data: one clear line each, with the file, the line and what to change."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streamctl.config import DataConfig
from streamctl.data import Catalog, prepare
from streamctl.data.sources import parse_columns, read_source
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir

HEADER = "user_id,item_id,timestamp\n"
GOOD = HEADER + "".join(f"u{u},i{i},{100 + i}\n" for u in range(6) for i in range(6))


@pytest.fixture
def source(tmp_path):
    """Write files of a source: `source(name=content, ...)` -> its folder."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"interactions.csv": ""}, r"interactions\.csv: the file is empty"),
        ({"interactions.csv": "\n\n"}, r"interactions\.csv: the file is empty"),
        ({"interactions.csv": HEADER}, r"interactions\.csv: the file holds no interactions"),
        (
            {"interactions.csv": GOOD + "u1,i1\n"},
            r"interactions\.csv:38: 2 columns where the header has 3",
        ),
        (
            {"interactions.csv": HEADER + "u1,i1,1\n\nu1,i1,1,9\n" + GOOD},
            r"interactions\.csv:4: 4 columns where the header has 3",
        ),
        (
            {"interactions.csv": GOOD + "u1,i1,yesterday\n"},
            r"interactions\.csv:38: timestamp is 'yesterday', which is no number and no ISO date",
        ),
        ({"interactions.csv": GOOD + "u1,i1,nan\n"}, r"interactions\.csv:38: timestamp is 'nan'"),
        ({"interactions.csv": GOOD + "u1,i1,\n"}, r"interactions\.csv:38: timestamp is ''"),
        ({"interactions.csv": GOOD + ",i1,3\n"}, r"interactions\.csv:38: user_id is empty"),
        (
            {"interactions.csv": "user_id,itme_id,timestamp\n1,2,3\n"},
            r"no column item_id; columns: 'user_id', 'itme_id', 'timestamp'; did you mean "
            r"itme_id.*--columns item=NAME",
        ),
        (
            {"interactions.csv": "user_id,item_id\n1,2\n"},
            r"no column timestamp or position; columns: 'user_id', 'item_id'",
        ),
        (
            {"interactions.csv": "user_id,item_id,user_id,timestamp\n1,2,3,4\n"},
            r"interactions\.csv:1: column 'user_id' occurs twice",
        ),
        (
            {"interactions.csv": GOOD.encode() + "u1,é,3\n".encode("latin-1")},
            r"interactions\.csv:38: not UTF-8 text.*iconv",
        ),
        (
            {"interactions.csv": GOOD.encode("utf-16")},
            r"interactions\.csv:1: not UTF-8 text.*iconv -f UTF-16",
        ),
        (
            {"interactions.csv.gz": gzip.compress(GOOD.encode() * 300)[:-300]},
            r"interactions\.csv\.gz.*damaged or cut short",
        ),
        ({"interactions.csv.zst": b"no zst"}, r"interactions\.csv\.zst.*damaged or cut short"),
        ({"interactions.parquet": b"PAR1 nothing"}, r"interactions\.parquet: not a parquet file"),
        (
            {"interactions.jsonl": '{"user_id": 1, "item_id": 2, "timestamp": 3}\n{"user_id": 1\n'},
            r"interactions\.jsonl:2: not a JSON object",
        ),
        (
            {"interactions.jsonl": '{"user": 1, "item_id": 2, "time": 3}\n{"user": 1}\n'},
            r"interactions\.jsonl:2: no 'item_id' here",
        ),
        ({"user_sequence.txt": "u1 a b\nu2\n"}, r"user_sequence\.txt:2: user 'u2' has no items"),
        (
            {"user_sequence.txt": "u1 a b c\nu2 a b c\nu1 c d e\n"},
            r"user_sequence\.txt:3: user 'u1' occurs twice, first in line 1",
        ),
        ({"user_sequence.txt": ""}, r"user_sequence\.txt: the file is empty"),
        (
            {"interactions.csv": GOOD, "items.jsonl": '{"item_id": "i1"}\n{"item_id": "i1"}\n'},
            r"items\.jsonl:2: item id 'i1' occurs twice, first in line 1",
        ),
        (
            {"interactions.csv": GOOD, "items.jsonl": '{"item_id": "i1"}\n[1, 2]\n'},
            r"items\.jsonl:2: not a JSON object",
        ),
        (
            {"interactions.csv": GOOD, "items.jsonl": '{"itemid_": "i1", "title": "x"}\n'},
            r"items\.jsonl:1: no item id column; columns: itemid_, title",
        ),
        (
            {"interactions.csv": GOOD, "items.csv": "item_id,title\ni1,a\ni2,b,c\n"},
            r"items\.csv:3: 3 columns where the header has 2",
        ),
        ({"interactions.csv": GOOD, "items.jsonl": ""}, r"items\.jsonl: the file holds no items"),
        ({"x.inter.json": "{"}, r"x\.inter\.json:1: not JSON"),
        ({"x.inter.json": '{"1": 5}'}, r"user '1' has no list of item ids"),
        ({"a.inter": "x", "b.inter": "x"}, r"2 logs here: a\.inter, b\.inter"),
        ({"ratings.dat": "1::2::3::4\n1::2\n"}, r"ratings\.dat:2: 2 columns where"),
        ({"photo.png": b"\x89PNG"}, r"nothing here that can be read \(found photo\.png\)"),
        ({}, r"nothing here that can be read; the layouts are"),
    ],
)  # fmt: skip
def test_a_fault_in_a_file_is_named_with_its_line(source, files, message):
    with pytest.raises(StreamctlError, match=message) as caught:
        read_source(source(files))
    assert "\n" not in str(caught.value)


def test_no_such_path(tmp_path):
    with pytest.raises(StreamctlError, match=r"none\.csv: no such file or folder"):
        read_source(tmp_path / "none.csv")


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="unknown format 'movielense'; did you mean movielens"):
        read_source(tmp_path, "movielense")
    with pytest.raises(UsageError, match="known: amazon, amazon2023, auto, lcrec, movielens"):
        read_source(tmp_path, "xyz")


def test_a_format_that_is_not_there_says_what_it_looked_for(source):
    with pytest.raises(StreamctlError, match=r"the layouts are recbole: NAME\.inter"):
        read_source(source({"interactions.csv": GOOD}), "recbole")


@pytest.mark.parametrize("text", ["user", "user=", "usr=a", "=x"])
def test_columns_of_another_form_are_a_usage_error(text):
    with pytest.raises(UsageError, match="--columns takes user=NAME"):
        parse_columns([text])


def test_nothing_left_after_filtering_says_what_each_filter_took(source, tmp_path):
    folder = source({"interactions.csv": GOOD + "u9,i9,1\n"})
    config = DataConfig(source=str(folder), min_user=7)
    message = (
        r"no usable interactions are left of 37: 37 are of users with fewer than 7, 0 of items "
        r"with fewer than 5.*--min-user 3 --min-item 1"
    )
    with pytest.raises(StreamctlError, match=message):
        prepare(RunDir(tmp_path / "run"), config)
    assert not RunDir(tmp_path / "run").stage("data").complete


def test_items_without_text_are_counted_in_a_warning(source, tmp_path, capsys):
    folder = source(
        {"interactions.csv": GOOD, "items.jsonl": json.dumps({"item_id": "i1", "title": "x"})}
    )
    prepare(RunDir(tmp_path / "run"), DataConfig(source=str(folder)))
    assert "no text: 5 items of 6" in " ".join(capsys.readouterr().err.split())


def test_sequences_sorted_by_item_id_are_called_meaningless(source, tmp_path, capsys):
    rows = [sorted(f"B{(7 * u + 13 * k) % 100:03}" for k in range(6)) for u in range(40)]
    lines = "".join(f"u{n} {' '.join(items)}\n" for n, items in enumerate(rows))
    prepare(RunDir(tmp_path / "r"), DataConfig(source=str(source({"user_sequence.txt": lines}))))
    text = " ".join(capsys.readouterr().err.split())
    assert "the sequences are sorted by item id" in text
    assert "meaningless" in text


def test_the_command_ends_with_one_line_and_exit_code_1(streamctl, source, tmp_path):
    folder = source({"interactions.csv": GOOD + "u1,i1\n"})
    answer = streamctl("data", "prepare", folder, "--run", tmp_path / "run")
    assert answer.returncode == 1
    assert f"{folder / 'interactions.csv'}:38: 2 columns" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert not answer.stdout


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace(",", ";"),
        GOOD.replace(",", "|"),
        "\n\n" + GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        '"user_id","item_id","timestamp"\n' + GOOD.partition("\n")[2],
    ],
    ids=["semicolons", "bars", "blank-lines-first", "byte-order-mark", "dos-lines", "quotes"],
)
def test_usual_oddities_of_csv_are_read(source, content):
    raw = read_source(source({"interactions.csv": content}))
    assert len(raw) == 36
    assert raw.names("users") == [f"u{n}" for n in range(6)]


def test_lone_surrogates_of_json_do_not_reach_a_file(source, tmp_path):
    rows = [
        json.dumps({"user_id": f"u{u}\ud800", "item_id": f"i{i}", "timestamp": i})
        for u in range(6)
        for i in range(6)
    ]
    item = json.dumps({"item_id": "i1", "title": "lamp \ud800", "na\ud800me": "x"})
    folder = source({"interactions.jsonl": "\n".join(rows), "items.jsonl": item})
    stage = prepare(RunDir(tmp_path / "run"), DataConfig(source=str(folder)))
    assert "lamp ?" in Catalog.load(stage).titles


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet"])
def test_parquet_texts_that_are_not_utf_8_are_an_error(source, tmp_path, name):
    folder = source({"interactions.csv": GOOD})
    column = pa.array([b"i\xd7(", b"i2"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, column.buffers())
    table = pa.table({"user_id": ["a", "b"], "item_id": text, "timestamp": [1, 2]})
    pq.write_table(table, folder / name)
    path = folder / name if name.startswith("interactions") else folder
    with pytest.raises(StreamctlError, match=r"UTF|utf"):
        read_source(path)


def test_a_history_of_nothing_is_a_usage_error(source, tmp_path):
    config = DataConfig(source=str(source({"interactions.csv": GOOD})), history=0)
    with pytest.raises(UsageError, match="history is 0"):
        prepare(RunDir(tmp_path / "run"), config)


LINES = "".join(f"c{user};p{item};{item}\n" for user in range(6) for item in range(6))
HEAD = "user_id,item_id,time\n"
STRANGERS = {
    "other names": (
        "log.csv",
        f"customer;product;bought\n{LINES}",
        r"no column user_id, item_id, .* Next: --columns user=NAME,item=NAME,time=NAME, or",
    ),
    "no header": (
        "log.csv",
        LINES,
        r"log.csv:1: the header is missing.*'c0', 'p0', '0'.* Next: put a first line",
    ),
    "no times": (
        "log.csv",
        "user_id,item_id\nu,i\n",
        r"Next: --columns time=NAME, or a column pos",
    ),
    "a date of here": (
        "log.csv",
        f"{HEAD}u,i,31.01.2024\n",
        r"log.csv:2: time is '31.01.2024', which is no number .* Next: write 2024-01-31",
    ),
    "a time in words": ("log.csv", f"{HEAD}u,i,3 days ago\n", r"log.csv:2: time is '3 d.* Next: "),
    "latin-1": (
        "log.csv",
        f"{HEAD}café,i,3\n".encode("latin-1"),
        r"log.csv:2: not UTF-8 .* Next: iconv .* utf8-log.csv",
    ),
    "a spreadsheet": ("log.xlsx", "PK\x03\x04", r"nothing here .* Next: simplest: a file LOG.csv"),
    "a line an interaction": ("log.txt", "u i\nu j\n", r"'u' occurs twice"),
}


@pytest.mark.parametrize("command", ["prepare", "doctor"])
@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_is_told_what_to_do_next(tmp_path, capsys, monkeypatch, command, case):
    from streamctl import cli

    name, content, told = STRANGERS[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = ["--run", str(tmp_path / "run")] if command == "prepare" else []
    monkeypatch.setattr("sys.argv", ["streamctl", "data", command, str(path), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    output = capsys.readouterr()
    said = " ".join(f"{output.out} {output.err}".split())
    assert re.search(told, said), said
    assert stop.value.code == 1 or command == "doctor"
    assert not (tmp_path / "run").exists()
