"""Export: what is written for other tools reads back as the same data."""

from __future__ import annotations

import numpy as np
import pytest

from streamctl.config import DataConfig
from streamctl.data import load_data, prepare, synthesize
from streamctl.data.export import WRITERS, export
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("shop"))
    synthesize(run, users=60, items=120, seed=1)
    return run


@pytest.mark.parametrize("format_name", WRITERS)
def test_what_is_exported_reads_back_as_the_same_data(shop, tmp_path, format_name):
    folder = tmp_path / "toy"
    files = export(shop, folder, format_name)
    assert all(file.is_file() for file in files)
    config = DataConfig(source=str(folder), min_user=3, min_item=0, seed=1)
    stage = prepare(RunDir(tmp_path / "run"), config)
    assert stage.json("statistics.json")["format"] == format_name
    (catalog, split), (same_catalog, same_split) = load_data(stage.run), load_data(shop)
    assert catalog.ids == same_catalog.ids
    assert catalog.titles == same_catalog.titles
    assert catalog.fields == same_catalog.fields
    np.testing.assert_array_equal(split.log.items, same_split.log.items)
    assert split.log.user_ids == same_split.log.user_ids
    if format_name != "lcrec":  # it holds the order only
        np.testing.assert_array_equal(split.log.timestamps, same_split.log.timestamps)


def test_the_recbole_header_is_typed(shop, tmp_path):
    inter, item = export(shop, tmp_path / "toy")
    assert inter.name == "toy.inter"
    assert inter.read_text().splitlines()[0] == "user_id:token\titem_id:token\ttimestamp:float"
    assert item.read_text().startswith("item_id:token\ttitle:token_seq\t")


def test_an_unknown_format_and_a_run_without_data_are_errors(shop, tmp_path):
    with pytest.raises(UsageError, match="did you mean recbole"):
        export(shop, tmp_path / "x", "recbol")
    with pytest.raises(StreamctlError, match="no such run"):
        export(RunDir(tmp_path / "none"), tmp_path / "x")
