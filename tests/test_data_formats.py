"""Formats: the same log in every format gives the same prepared data."""

from __future__ import annotations

import csv
import gzip
import json
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT

from streamctl import cli
from streamctl.config import DataConfig
from streamctl.data.prepare import build
from streamctl.data.sources import SOURCES, find_source, read_source
from streamctl.data.sources.raw import Reading
from streamctl.errors import StreamctlError

START = 1_400_000_000


def toy() -> list[tuple[str, str, int]]:
    """(user, item, seconds) of 12 users, interleaved and not in the order of time."""
    rng = np.random.default_rng(7)
    rows = []
    for user in range(1, 13):
        moments = rng.choice(1_000_000, 6 + user % 4, replace=False)
        rows += [(str(user), str(rng.integers(1, 15)), START + int(time)) for time in moments]
    rng.shuffle(rows)
    return [(str(user), str(item), int(time)) for user, item, time in rows]


ROWS = toy()
TITLES = {str(item): f"Toy number {item} (1995)" for item in range(1, 15)}
SEQUENCES = {
    user: [item for time, item in sorted((t, i) for u, i, t in ROWS if u == user)]
    for user in sorted({user for user, _, _ in ROWS})
}


def write_csv(path: Path, header: list[str], rows, delimiter=",") -> None:
    with open(path, "w", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows([header, *rows])


def write_lines(path: Path, texts) -> None:
    data = "".join(f"{text}\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)


def write_items(folder: Path, key="item_id", name="items.jsonl") -> None:
    write_lines(folder / name, (json.dumps({key: i, "title": t}) for i, t in TITLES.items()))


def table_csv(folder):
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], ROWS)
    write_items(folder)


def table_csv_extra_columns(folder):
    rows = [(time, 'a "quoted", text', item, user) for user, item, time in ROWS]
    write_csv(folder / "interactions.csv", ["timestamp", "note", "item_id", "user_id"], rows)
    write_csv(folder / "items.csv", ["item_id", "title"], TITLES.items())


def table_tsv_gz(folder):
    lines = ["uid\tiid\ttime", *("\t".join(map(str, row)) for row in ROWS)]
    write_lines(folder / "interactions.tsv.gz", lines)
    write_items(folder)


def table_parquet(folder):
    users, items, times = zip(*ROWS, strict=True)
    columns = {"user_id": list(map(int, users)), "item_id": items, "timestamp": times}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    catalogue = pa.table({"item_id": list(map(int, TITLES)), "title": list(TITLES.values())})
    pq.write_table(catalogue, folder / "items.parquet")


def table_jsonl_zst(folder):
    names = ("user_id", "item_id", "timestamp")
    lines = (json.dumps(dict(zip(names, row, strict=True))) for row in ROWS)
    write_lines(folder / "interactions.jsonl.zst", lines)
    write_items(folder)


def table_dates(folder):
    moments = (np.datetime64(time, "s") for _, _, time in ROWS)
    rows = [(u, i, str(m).replace("T", " ")) for (u, i, _), m in zip(ROWS, moments, strict=True)]
    write_csv(folder / "interactions.csv", ["user", "item", "date"], rows)
    write_items(folder)


def table_positions(folder):
    rows = [(u, i, n) for u, items in SEQUENCES.items() for n, i in enumerate(items)]
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "position"], rows[::-1])
    write_items(folder)


def sequences(folder):
    write_lines(folder / "user_sequence.txt", (" ".join([u, *s]) for u, s in SEQUENCES.items()))
    write_items(folder)


def recbole(folder):
    header = "user_id:token\titem_id:token\ttimestamp:float"
    lines = [header, *(f"{u}\t{i}\t{t}.0" for u, i, t in ROWS)]
    write_lines(folder / "toy.inter", lines)
    header = "item_id:token\tmovie_title:token_seq"
    write_lines(folder / "toy.item", [header, *(f"{i}\t{t}" for i, t in TITLES.items())])


def amazon_2023_csv(folder):
    rows = [(user, item, "5.0", time * 1000) for user, item, time in ROWS]
    header = ["user_id", "parent_asin", "rating", "timestamp"]
    write_csv(folder / "Toys.csv", header, rows)
    write_csv(folder / "Toys.train.csv", header, rows[:5])
    write_items(folder, "parent_asin", "meta_Toys.jsonl.gz")


def amazon_2023_jsonl(folder):
    lines = (
        json.dumps({"rating": 5.0, "asin": "x", "parent_asin": i, "user_id": u, "timestamp": t})
        for u, i, t in ROWS
    )
    write_lines(folder / "Toys.jsonl.gz", lines)
    write_items(folder, "parent_asin", "meta_Toys.jsonl.gz")


def amazon_2014(folder):
    lines = (
        json.dumps({"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t})
        for u, i, t in ROWS
    )
    write_lines(folder / "reviews_Toys_5.json.gz", lines)
    # The meta files of 2014 hold Python literals, and some items twice.
    texts = [repr({"asin": i, "title": t, "imUrl": "http://x"}) for i, t in TITLES.items()]
    write_lines(folder / "meta_Toys.json.gz", [*texts, texts[0]])


def movielens_dat(folder):
    write_lines(folder / "ratings.dat", (f"{u}::{i}::5::{t}" for u, i, t in ROWS))
    lines = "".join(f"{i}::{t}::Comédie|Drama\n" for i, t in TITLES.items())
    (folder / "movies.dat").write_bytes(lines.encode("latin-1"))


def movielens_csv(folder):
    rows = [(u, i, 4.5, t) for u, i, t in ROWS]
    write_csv(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], rows)
    rows = [(i, t, "Comédie|Drama") for i, t in TITLES.items()]
    write_csv(folder / "movies.csv", ["movieId", "title", "genres"], rows)


def movielens_100k(folder):
    write_lines(folder / "u.data", (f"{u}\t{i}\t3\t{t}" for u, i, t in ROWS))
    flags = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
    lines = "".join(f"{i}|{t}|01-Jan-1995||http://é|{flags}\n" for i, t in TITLES.items())
    (folder / "u.item").write_bytes(lines.encode("latin-1"))


def lcrec(folder):
    numbers = {user: list(map(int, items)) for user, items in SEQUENCES.items()}
    (folder / "Toys.inter.json").write_text(json.dumps(numbers))
    entries = {item: {"title": title} for item, title in TITLES.items()}
    (folder / "Toys.item.json").write_text(json.dumps(entries))


WRITERS = {
    table_csv: "table",
    table_csv_extra_columns: "table",
    table_tsv_gz: "table",
    table_parquet: "table",
    table_jsonl_zst: "table",
    table_dates: "table",
    table_positions: "table",
    sequences: "sequences",
    recbole: "recbole",
    amazon_2023_csv: "amazon2023",
    amazon_2023_jsonl: "amazon2023",
    amazon_2014: "amazon",
    movielens_dat: "movielens",
    movielens_csv: "movielens",
    movielens_100k: "movielens",
    lcrec: "lcrec",
}


def prepared(folder: Path, **settings):
    raw = read_source(folder)
    return build(raw, DataConfig(source=str(folder), min_user=3, min_item=1, **settings))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    table_csv(folder)
    return prepared(folder)


def test_every_format_is_covered():
    assert set(WRITERS.values()) == {source.name for source in SOURCES}


@pytest.mark.parametrize(
    ("write", "name"), WRITERS.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_the_same_log_in_every_format_is_the_same_data(tmp_path, expected, write, name):
    write(tmp_path)
    assert find_source(tmp_path)[0].name == name
    catalog, log, facts = prepared(tmp_path)
    same_catalog, same_log, _ = expected
    assert catalog.ids == same_catalog.ids
    assert catalog.titles == same_catalog.titles
    assert log.user_ids == same_log.user_ids
    np.testing.assert_array_equal(log.items, same_log.items)
    np.testing.assert_array_equal(log.offsets, same_log.offsets)
    assert facts["format"] == name
    timed = write not in (table_positions, sequences, lcrec)
    assert (log.timestamps is not None) == timed
    if timed:
        assert all(
            (np.diff(log.timestamps[a:b]) > 0).all()
            for a, b in zip(log.offsets, log.offsets[1:], strict=False)
        )


def test_the_order_is_that_of_time(expected):
    catalog, log, _ = expected
    for user, name in enumerate(log.user_ids):
        assert [catalog.ids[item] for item in log.of(user)] == SEQUENCES[name]


def test_strange_ids_find_their_text(tmp_path):
    """An id is what it is in both files: blanks, entities, tags and leading zeros belong to it."""
    ids = ["  lead", "tail ", "a  b", "<b>z</b>", "A&amp;B", "0007", "7.0", "null", "日本", 'q"']
    taken = list(enumerate(ids))
    rows = [(f"u{user}", name, START + user + 9 * n) for user in range(4) for n, name in taken]
    write_csv(tmp_path / "interactions.csv", ["user_id", "item_id", "timestamp"], rows)
    items = [(name, f"Text of {number}") for number, name in enumerate(ids)]
    write_csv(tmp_path / "items.csv", ["item_id", "title"], items)
    catalog, _, facts = prepared(tmp_path)
    assert facts["items_without_text"] == 0
    assert dict(zip(catalog.ids, catalog.titles, strict=True)) == dict(items)


def test_genres_and_accents_of_movielens_reach_the_text(tmp_path):
    movielens_dat(tmp_path)
    catalog, _, _ = prepared(tmp_path)
    assert catalog.texts[0] == f"{catalog.titles[0]}. Comédie, Drama"
    assert set(catalog.fields) == {"genres"}


def test_a_file_is_as_good_as_its_folder(tmp_path, expected):
    table_csv(tmp_path)
    (tmp_path / "interactions.csv").rename(tmp_path / "sales-2014.csv")
    with pytest.raises(StreamctlError, match=r"nothing here.*sales-2014"):
        read_source(tmp_path)
    catalog, log, _ = prepared(tmp_path / "sales-2014.csv")
    assert catalog.titles == expected[0].titles
    np.testing.assert_array_equal(log.items, expected[1].items)


def test_unusual_columns_are_named(tmp_path, expected):
    write_csv(tmp_path / "interactions.csv", ["who", "what", "when"], ROWS)
    write_items(tmp_path)
    told = r"no column user_id, .*columns: 'who', 'what', 'when'.*user=NAME,item=NAME,time=NAME"
    with pytest.raises(StreamctlError, match=told):
        read_source(tmp_path)
    raw = read_source(tmp_path, reading=Reading({"user": "who", "item": "what", "time": "when"}))
    _, log, _ = build(raw, DataConfig(min_user=3, min_item=1))
    np.testing.assert_array_equal(log.items, expected[1].items)


def test_text_is_the_title_and_the_describing_columns(tmp_path):
    table_csv(tmp_path)
    item = {"item_id": "1", "price": 3.5, "brand": "B&amp;W", "title": "<b>Big</b>\n lamp",
            "categories": [["Home", "Light"], "Lamps"], "imUrl": "x", "year": "1995"}  # fmt: skip
    write_lines(tmp_path / "items.jsonl", [json.dumps(item)])
    catalog, _, facts = prepared(tmp_path)
    row = catalog.index("1")
    assert catalog.titles[row] == "Big lamp"
    assert catalog.texts[row] == "Big lamp. B&W. Home, Light, Lamps"
    assert catalog.fields["price"][row] == "3.5"
    assert facts["items_without_text"] == len(catalog) - 1
    other = catalog.index("2")
    assert catalog.titles[other] == catalog.texts[other] == "2"


def sales(folder):
    rows = [(u, i, np.datetime64(time, "s")) for u, i, time in ROWS]
    write_csv(folder / "sales.csv", ["customer", "sku", "day"], rows)
    write_csv(folder / "goods.csv", ["item_id", "title"], TITLES.items())


def parts(folder):
    for name, start in (("train", 0), ("valid", 1), ("test", 2)):
        write_csv(folder / f"{name}.csv", ["user_id", "item_id", "timestamp"], ROWS[start::3])


TUTORIAL_LINES = {
    "shop": table_csv,
    "till": sales,
    "parts": parts,
    "order": sequences,
    "atomic": recbole,
    "amazon": amazon_2023_csv,
    "reviews": amazon_2014,
    "movies": movielens_dat,
    "letter": lcrec,
}
SECTION = (ROOT / "docs/tutorial.md").read_text().split("### Data in\n")[1].split("\n## ")[0]
TABLE = [line for line in SECTION.splitlines() if line.startswith("|")]
LINES = [row.split("|")[1:4] for row in TABLE[2:]]


def test_the_tutorial_names_every_format():
    assert {name.strip() for name, _, _ in LINES} == {source.name for source in SOURCES}


@pytest.mark.parametrize(("name", "line"), [(name.strip(), line) for name, _, line in LINES])
def test_the_lines_of_the_tutorial_read_their_formats(tmp_path, monkeypatch, capsys, name, line):
    words = shlex.split(line.strip().strip("`"))
    folder = words[3].partition("/")[0]
    (tmp_path / folder).mkdir()
    TUTORIAL_LINES[folder](tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    # The toy is so small that the filter for real logs would leave nothing.
    monkeypatch.setattr("sys.argv", [*words, "--min-user", "3", "--min-item", "1", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["format"] == name
