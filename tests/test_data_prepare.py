"""Preparing a log: filters, ties, numbering, statistics, determinism."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from streamctl.config import DataConfig
from streamctl.data import load_data, prepare
from streamctl.data.log import ranges
from streamctl.data.prepare import build
from streamctl.data.sources import read_source
from streamctl.data.sources.raw import ItemTable, RawLog
from streamctl.data.statistics import warn_about
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir


def raw_log(rows: list[tuple[str, str, int]], timed=True, catalogue=None) -> RawLog:
    """A raw log of (user, item, time) rows."""
    users, items, times = zip(*rows, strict=True)
    return RawLog.of(users, items, times, timed=timed, catalogue=catalogue)


def as_named(catalog, log) -> dict[str, list[str]]:
    return {u: [catalog.ids[i] for i in log.of(n)] for n, u in enumerate(log.user_ids)}


rows = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.sampled_from("123456789"), st.integers(0, 40)),
    min_size=30,
    max_size=120,
)


@settings(max_examples=80, deadline=None)
@given(rows=rows, min_user=st.integers(0, 5), min_item=st.integers(1, 5))
def test_filter_and_order_equal_a_slow_transcription(rows, min_user, min_item):
    kept = list(rows)
    while True:
        users, items = Counter(r[0] for r in kept), Counter(r[1] for r in kept)
        rest = [r for r in kept if users[r[0]] >= max(min_user, 3) and items[r[1]] >= min_item]
        if len(rest) == len(kept):
            break
        kept = rest
    config = DataConfig(min_user=min_user, min_item=min_item)
    if not kept:
        with pytest.raises(StreamctlError, match="no usable interactions"):
            build(raw_log(rows), config)
        return
    expected = {
        user: [
            item
            for _, item in sorted(((t, i) for u, i, t in kept if u == user), key=lambda r: r[0])
        ]
        for user in sorted({u for u, _, _ in kept})
    }
    catalog, log, facts = build(raw_log(rows), config)
    assert as_named(catalog, log) == expected
    assert facts["interactions"] == len(kept)
    assert facts["repeats"] == len(kept) - len({r[:2] for r in kept})
    removed = facts["removed"]
    taken = removed["interactions_of_short_users"] + removed["interactions_of_rare_items"]
    assert taken == len(rows) - len(kept)
    assert removed["users"] == len({r[0] for r in rows}) - log.n_users
    assert removed["items"] == len({r[1] for r in rows}) - len(catalog)


LOG = [(f"u{u}", f"i{(u * 3 + k * k) % 11}", 10 * (k // 3)) for u in range(20) for k in range(9)]


def test_ties_keep_the_input_order_or_are_shuffled_by_the_seed():
    keep = as_named(*build(raw_log(LOG), DataConfig(min_item=1))[:2])
    assert keep["u3"] == [item for user, item, _ in LOG if user == "u3"]
    shuffled = [
        as_named(*build(raw_log(LOG), DataConfig(min_item=1, ties="shuffle", seed=s))[:2])
        for s in (0, 0, 1)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert shuffled[0] != keep
    for user, items in keep.items():  # only within equal times
        for start in (0, 3, 6):
            assert sorted(items[start : start + 3]) == sorted(shuffled[0][user][start : start + 3])


def test_shuffling_the_ties_of_a_log_without_times_warns(capsys):
    build(raw_log(LOG, timed=False), DataConfig(ties="shuffle"))
    assert "--ties shuffle has no effect" in capsys.readouterr().err


def test_runs_of_ascending_ids_are_shuffled_and_nothing_crosses_a_run():
    log = [(f"u{u}", f"i{k % 7}{k:02d}", 0) for u in range(30) for k in range(20)]
    keep, shuffled, again = (
        as_named(*build(raw_log(log, timed=False), DataConfig(ties=ties))[:2])
        for ties in ("keep", "runs", "runs")
    )
    assert shuffled == again != keep
    for user, items in keep.items():
        cuts = [0, *(k for k in range(1, 20) if items[k] <= items[k - 1]), 20]
        for start, end in itertools.pairwise(cuts):
            assert sorted(items[start:end]) == sorted(shuffled[user][start:end])
    with pytest.raises(UsageError, match="--ties shuffle"):
        build(raw_log(LOG), DataConfig(ties="runs"))


def test_a_run_of_ascending_numbers_goes_on_where_they_get_another_digit():
    log = [(f"u{u}", str(k), 0) for u in range(30) for k in (8, 9, 10, 11)]
    shuffled = as_named(*build(raw_log(log, timed=False), DataConfig(ties="runs"))[:2])
    assert {items[0] for items in shuffled.values()} == {"8", "9", "10", "11"}


def test_a_log_with_times_gets_the_5_core_and_one_in_order_is_left_alone():
    short = [("short", f"i{k}", k) for k in range(4)]
    rare = [("u0", "rare", 99)]
    timed, _, _ = build(raw_log(LOG + short + rare), DataConfig())
    ordered, log, _ = build(raw_log(LOG + short + rare, timed=False), DataConfig())
    assert "rare" not in timed.ids
    assert "rare" in ordered.ids
    assert "short" in log.user_ids


def test_a_filter_that_takes_most_users_says_so_and_what_lowers_it(capsys):
    log = [(f"u{u}", f"i{k}", k) for u in range(9) for k in range(6 if u < 4 else 3)]
    for minimum, said in ((5, True), (3, False)):
        _, _, facts = build(raw_log(log), DataConfig(min_user=minimum, min_item=1))
        warn_about(facts)
        warning = "5 of 9 users are left out: a user needs 5 interactions, an item 1"
        assert (warning in " ".join(capsys.readouterr().err.split())) == said


def test_items_nobody_took_stay_out_unless_min_item_is_0():
    table = ItemTable(["i1", "new"], {"title": ["One", "New"]}, "title", ("title",))
    assert "new" not in build(raw_log(LOG, catalogue=table), DataConfig())[0].ids
    assert "new" not in build(raw_log(LOG, catalogue=table), DataConfig(min_item=1))[0].ids
    catalog, log, facts = build(raw_log(LOG, catalogue=table), DataConfig(min_item=0))
    assert catalog.titles[catalog.index("new")] == "New"
    assert facts["items"] == 12 and facts["items_taken"] == 11
    assert catalog.index("new") not in log.items


def test_dense_ids_are_a_seeded_permutation():
    first, again, other = (build(raw_log(LOG), DataConfig(seed=s))[0].ids for s in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert first != sorted(first)


def test_statistics_of_a_small_log_by_hand():
    log = [("a", "1", 1), ("a", "2", 2), ("a", "3", 2)]
    log += [("b", "3", 1), ("b", "2", 2), ("b", "10", 3), ("b", "2", 4)]
    _, _, facts = build(raw_log(log), DataConfig(min_user=3, min_item=1))
    assert (facts["users"], facts["items"], facts["interactions"]) == (2, 4, 7)
    assert facts["mean_length"] == 3.5
    assert facts["sparsity"] == 1 - 6 / 8  # pairs, not interactions: never below 0
    assert facts["train_prefixes"] == 1
    assert facts["repeats"] == 1  # b took 2 twice
    assert facts["tied_neighbours"] == 0.2  # a's 2 and 3, of five neighbours
    assert facts["test_id_above_valid_id"] == 0.5  # 3 > 2, and 2 < 10 as numbers
    assert facts["ascending_ids"] == 0.6


def write_source(folder: Path) -> Path:
    folder.mkdir()
    lines = ["user_id,item_id,timestamp", *(",".join(map(str, row)) for row in LOG)]
    (folder / "interactions.csv").write_text("\n".join(lines))
    items = [{"item_id": f"i{n}", "title": f"Thing {n}", "brand": "B"} for n in range(11)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def test_the_stage_is_deterministic_and_loads_as_it_was_built(tmp_path):
    source = write_source(tmp_path / "source")
    config = DataConfig(source=str(source), seed=5)
    one, two = (prepare(RunDir(tmp_path / name), config) for name in ("one", "two"))
    assert one.manifest["artifacts"] == two.manifest["artifacts"]
    catalog, split = load_data(RunDir(tmp_path / "one"))
    assert catalog.titles[catalog.index("i7")] == "Thing 7"
    assert catalog.fields == {"brand": ["B"] * 11}
    assert split.log.lengths.tolist() == [9] * 20
    assert split.log.timestamps.tolist() == [0, 0, 0, 10, 10, 10, 20, 20, 20] * 20
    assert as_named(catalog, split.log)["u3"] == [item for user, item, _ in LOG if user == "u3"]


def test_a_changed_file_is_noticed_and_an_unchanged_one_skipped(tmp_path, capsys):
    source = write_source(tmp_path / "source")
    config = DataConfig(source=str(source))
    prepare(RunDir(tmp_path / "run"), config)
    prepare(RunDir(tmp_path / "run"), config)
    assert "complete already" in capsys.readouterr().err
    with open(source / "interactions.csv", "a") as handle:
        handle.write("\nu1,i1,99\n")
    with pytest.raises(StreamctlError, match=r"interactions\.csv: the file has changed.*--force"):
        prepare(RunDir(tmp_path / "run"), config)
    prepare(RunDir(tmp_path / "run"), config, force=True)


def test_an_unknown_item_names_its_neighbours(tmp_path):
    prepare(RunDir(tmp_path / "r"), DataConfig(source=str(write_source(tmp_path / "source"))))
    catalog, _ = load_data(RunDir(tmp_path / "r"))
    with pytest.raises(StreamctlError, match=r"item 'i77' is not in the catalogue; did you mean"):
        catalog.index("i77")


def test_a_known_set_that_is_not_as_published_warns(tmp_path, capsys):
    source = write_source(tmp_path / "amazon-2018-scientific")
    stage = prepare(RunDir(tmp_path / "r"), DataConfig(source=str(source)))
    assert stage.json("statistics.json")["published"]["interactions"] == 22_743
    text = " ".join(capsys.readouterr().err.split())
    assert "users 20 (published 3,285)" in text


def test_beauty_is_as_published(tmp_path, capsys):
    source = real_data("amazon-2014-beauty")
    run = RunDir(tmp_path / "run")
    facts = prepare(run, DataConfig(source=str(source))).json("statistics.json")
    assert (facts["users"], facts["items"], facts["interactions"]) == (22_363, 12_101, 198_502)
    assert facts["items_without_text"] == 0
    assert round(facts["test_id_above_valid_id"], 2) == 0.71
    warnings = " ".join(capsys.readouterr().err.split())
    assert "P(id of the test item > id of the valid item) is 0.71" in warnings
    assert "published" not in warnings
    catalog, split = load_data(run)
    assert len(catalog) == 12_101
    assert len(split.train) == facts["train_prefixes"] == 131_413
    assert split.popularity().sum() == 198_502 - 2 * 22_363
    # In dense ids nothing of the tie artefact is left.
    test, valid = split.test.targets, split.valid.targets
    assert abs((test > valid).mean() - 0.5) < 0.02


def test_scientific_is_as_published(tmp_path, capsys):
    source = real_data("amazon-2018-scientific")
    run = RunDir(tmp_path / "run")
    facts = prepare(run, DataConfig(source=str(source))).json("statistics.json")
    assert (facts["users"], facts["items"], facts["interactions"]) == (3_285, 3_541, 22_743)
    assert "published" not in capsys.readouterr().err
    whole, _, _ = build(read_source(source), DataConfig(min_item=0))
    assert len(whole) == 3_686


def test_a_log_prepared_in_many_ranges_on_disk_is_the_log_prepared_in_one(monkeypatch):
    whole, log, facts = build(raw_log(LOG), DataConfig(ties="shuffle"))
    monkeypatch.setattr(
        "streamctl.data.statistics.ranges", lambda offsets, rows=0: ranges(offsets, rows=13)
    )
    monkeypatch.setattr("streamctl.data.sources.raw.HELD_BYTES", 0)
    monkeypatch.setattr("streamctl.data.order.BATCH", 7)
    catalog, parts, again = build(raw_log(LOG), DataConfig(ties="shuffle"))
    assert isinstance(parts.items, np.memmap)
    assert len(list(ranges(parts.offsets, rows=13))) > 1
    assert as_named(catalog, parts) == as_named(whole, log)
    assert parts.timestamps.tolist() == log.timestamps.tolist()
    assert again == facts


# Of the first edition's reader, before DuckDB: users by id, each a line of the ids of its items.
SEQUENCES = {
    "amazon-2014-beauty": "6d51e725cfbc328c82bd14328854dae9f18a94496c1b3baf0d4333181ffbafde",
    "amazon-2018-scientific": "4388966e6926e737a00ad741db15f061e0665d7f6fdcf71f3cd075d6f28ff5f6",
    "amazon-2023-instruments": "e1ca73b2ef8450f5a5962d1b0679bc7f57b860df10cb7343644a5d2842178929",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_real_sets_are_prepared_to_the_sequences_of_the_first_edition(name):
    catalog, log, _ = build(read_source(real_data(name)), DataConfig())
    digest = hashlib.sha256()
    for user, user_id in enumerate(log.user_ids):
        taken = " ".join(catalog.ids[item] for item in log.of(user))
        digest.update(f"{user_id}\t{taken}\n".encode())
    assert digest.hexdigest() == SEQUENCES[name]
