"""Export: what is written for other tools reads back as the same data."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from streamctl.config import DataConfig, TokenizeConfig
from streamctl.data import load_data, prepare
from streamctl.data.prepare import write_stage
from streamctl.data.sinks import SINKS, export
from streamctl.data.sources import SOURCES, find_source
from streamctl.data.sources.raw import ItemTable, RawLog
from streamctl.data.synthetic import generate_shop
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir

KINDS = [(name, "none") for name in SINKS]
KINDS += [(name, kind) for name in SINKS for kind in ("gz", "zst") if SINKS[name].compressible]


def shop_run(folder, *, timed=True, **changes):
    """A run of a small shop with the columns that some format or other knows."""
    shop = generate_shop(60, 120, 1)
    columns = dict(shop.catalogue.columns)
    columns["genres"] = [
        f"{a}, {b}" for a, b in zip(columns["brand"], columns["project"], strict=True)
    ]
    columns["description"] = [f'"{text}", or | so; it\'s\\n' for text in columns["title"]]
    ids = [f"é {name}" if number % 9 == 0 else name
           for number, name in enumerate(shop.catalogue.ids)]  # fmt: skip
    ids = changes.pop("ids", ids)
    table = ItemTable(ids, columns | changes, "title", ("title", "genres"))
    raw = RawLog.of(
        [f"u{number}" for number in shop.user],
        [ids[number] for number in shop.item],
        shop.times if timed else None,
        catalogue=table,
        format="shop",
    )
    config = DataConfig(source="a shop", min_user=3, min_item=0, seed=1)
    write_stage(RunDir(folder), config, lambda: raw)
    return RunDir(folder)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Ids with blanks and accents, texts with quotes and bars."""
    return shop_run(tmp_path_factory.mktemp("strange"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Ids that every format can hold."""
    return shop_run(tmp_path_factory.mktemp("plain"), ids=generate_shop(60, 120, 1).catalogue.ids)


def read_back(folder, tmp_path):
    config = DataConfig(source=str(folder), min_user=3, min_item=0, seed=1)
    return prepare(RunDir(tmp_path / "run"), config)


def test_whatever_is_read_is_written():
    assert {sink.source for sink in SINKS.values()} == {source.name for source in SOURCES}


@pytest.mark.parametrize(("name", "compression"), KINDS)
def test_what_is_exported_reads_back_as_the_same_data(strange, plain, tmp_path, name, compression):
    """Order, ids and titles always; times and columns as far as the format holds them."""
    sink = SINKS[name]
    original = plain if name in ("sequences", "movielens") else strange
    folder = tmp_path / "Toys [2018]"
    files = export(original, folder, name, compression)
    assert all(file.name.endswith(f".{compression}") for file in files) or compression == "none"
    stage = read_back(folder, tmp_path)
    assert stage.json("statistics.json")["format"] == sink.source
    (catalog, split), (same_catalog, same_split) = (
        load_data(RunDir(stage.root)),
        load_data(original),
    )
    assert catalog.ids == same_catalog.ids
    assert catalog.titles == same_catalog.titles
    held = set(same_catalog.fields).intersection(sink.columns or same_catalog.fields)
    assert catalog.fields == {key: same_catalog.fields[key] for key in held}
    assert held
    np.testing.assert_array_equal(split.log.items, same_split.log.items)
    np.testing.assert_array_equal(split.log.offsets, same_split.log.offsets)
    assert split.log.user_ids == same_split.log.user_ids
    if sink.times:
        np.testing.assert_array_equal(split.log.timestamps, same_split.log.timestamps)
    else:
        assert split.log.timestamps is None


@pytest.mark.parametrize("name", SINKS)
def test_a_log_without_times_keeps_its_order(tmp_path, name):
    """Tables say `position`; formats whose column is of times get positions in it."""
    original = shop_run(tmp_path / "in", timed=False, ids=generate_shop(60, 120, 1).catalogue.ids)
    export(original, tmp_path / "toy", name)
    read_back(tmp_path / "toy", tmp_path)
    log = load_data(RunDir(tmp_path / "run"))[1].log
    np.testing.assert_array_equal(log.items, load_data(original)[1].log.items)
    as_times = SINKS[name].times and SINKS[name].source != "table"
    assert (log.timestamps is not None) == as_times


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("recbole", {"id": "a\tb"}, r"item id 'a\\tb' \('\\t' ends it\)"),
        ("table", {"id": "a\nb"}, r"item id 'a\\nb'"),
        ("movielens", {"id": "a:b"}, r"item id 'a:b' \(':' ends it\)"),
        ("movielens", {"id": "é"}, "it is not ASCII"),
        ("movielens", {"title": "日本"}, "it is in Latin-1"),
        ("movielens", {"title": "One::Two"}, "'::' parts its columns"),
        ("movielens", {"title": "Mission:"}, "'::' parts its columns"),
        ("sequences", {"id": "a b"}, r"id 'a b' \(blanks part ids\)"),
    ],
)
def test_what_a_format_cannot_hold_is_named(tmp_path, name, changed, told):
    shop = generate_shop(60, 120, 1)
    ids = list(shop.catalogue.ids)
    ids[shop.item[0]] = changed.get("id", ids[0] + "x")
    titles = list(shop.catalogue.columns["title"])
    titles[shop.item[0]] = changed.get("title", "x")
    run = shop_run(tmp_path / "run", ids=ids, title=titles)
    with pytest.raises(StreamctlError, match=f"cannot hold .*{told}.*--format table-jsonl"):
        export(run, tmp_path / "toy", name)
    assert not (tmp_path / "toy").exists()
    export(run, tmp_path / "toy", "table-jsonl")


def test_compressed_files_are_the_same_again(strange, tmp_path):
    first, second = (
        [file.read_bytes() for file in export(strange, tmp_path / name / "toy", "recbole", "gz")]
        for name in ("a", "b")
    )
    assert first == second


def test_the_recbole_header_is_typed(strange, tmp_path):
    inter, item = export(strange, tmp_path / "toy")
    assert inter.name == "toy.inter"
    assert inter.read_text().splitlines()[0] == "user_id:token\titem_id:token\ttimestamp:float"
    assert item.read_text().startswith("item_id:token\ttitle:token_seq\t")


def test_lcrec_gets_the_codes_of_a_tokenized_run(tmp_path):
    run = shop_run(tmp_path / "run")
    ids = load_data(run)[0].ids
    with run.begin("tokenizer", TokenizeConfig(), ["data"]) as stage:
        stage.save_json("index.json", {name: [f"<a_{n}>"] for n, name in enumerate(ids)})
        stage.publish()
    *_, index = export(run, tmp_path / "toy", "lcrec", "zst")
    assert index.name == "toy.index.json.zst"
    written = json.loads(zstandard.open(index).read())
    assert list(written) == ids
    assert written[ids[3]] == ["<a_3>"]


def test_other_data_in_the_folder_is_spoken_of(strange, tmp_path, capsys):
    export(strange, tmp_path / "toy", "table")
    assert not capsys.readouterr().err
    export(strange, tmp_path / "toy", "table-jsonl")
    assert "also holds interactions.csv, which `data prepare` takes first" in " ".join(
        capsys.readouterr().err.split()
    )


def test_files_that_cannot_lie_side_by_side_are_spoken_of(strange, tmp_path, capsys):
    export(strange, tmp_path / "toy", "recbole")
    files = export(strange, tmp_path / "toy", "recbole", "gz")
    assert all(file.is_file() for file in files)
    said = " ".join(capsys.readouterr().err.split())
    assert "`data prepare` cannot read" in said and "2 logs" in said


def test_an_amazon_folder_with_brackets_keeps_its_own_catalogue(strange, tmp_path):
    folder = tmp_path / "Toys [x]"
    _, meta = export(strange, folder, "amazon2018")
    (folder / "meta_Other.json").write_text(meta.read_text())
    assert find_source(folder)[1].items == meta


def test_what_is_not_known_is_an_error(strange, tmp_path):
    with pytest.raises(UsageError, match="did you mean recbole"):
        export(strange, tmp_path / "x", "recbol")
    with pytest.raises(UsageError, match="none, gz, zst"):
        export(strange, tmp_path / "x", "recbole", "bz2")
    with pytest.raises(UsageError, match="compressed already"):
        export(strange, tmp_path / "x", "table-parquet", "gz")
    with pytest.raises(StreamctlError, match="no such run"):
        export(RunDir(tmp_path / "none"), tmp_path / "x")


def test_items_with_fields_named_as_a_logs_are_written_as_texts(tmp_path):
    run = shop_run(tmp_path / "run", position=["first"] * 120)
    export(run, tmp_path / "out", "table-parquet")
    found = pq.read_table(tmp_path / "out" / "items.parquet")
    assert found["position"].to_pylist() == ["first"] * 120
