"""The doctor: finds what was put into a log, with the lines and a remedy, and nothing else."""

from __future__ import annotations

import gzip
import json
import shlex
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import real_data
from typer.testing import CliRunner

from streamctl.cli import build_app
from streamctl.config import DataConfig
from streamctl.data import Catalog, InteractionLog, doctor
from streamctl.data.doctor import examine
from streamctl.data.log import ranges
from streamctl.errors import StreamctlError

START = 1_500_000_000


def healthy() -> list[tuple[str, str, int]]:
    """40 users who take 8 different items each, one a day, all items at least five times."""
    rng = np.random.default_rng(3)
    rows = []
    for user in range(40):
        taken = rng.permutation(20)[:8]
        rows += [(f"u{user}", f"i{i:02}", START + 86_400 * k + user) for k, i in enumerate(taken)]
    return rows


def write(folder: Path, rows, extra: str = "", items: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["user_id,item_id,timestamp", *(",".join(map(str, row)) for row in rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n" + extra)
    if items is None:
        items = [{"item_id": f"i{i:02}", "title": f"Thing {i}"} for i in range(20)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def remedies(source: Path) -> dict[str, str]:
    """topic -> the last remedy."""
    found = examine(source, DataConfig(source=str(source))).findings
    return {finding.topic: finding.remedy for finding in found if finding.remedy}


def findings(source: Path, level: str | None = None, **settings) -> dict[str, str]:
    """topic -> what, of one level, or of all that are not good."""
    found = examine(source, DataConfig(source=str(source), **settings)).findings
    for finding in found:
        assert finding.level in ("good", "note") or finding.remedy, finding
    wanted = [f for f in found if (f.level == level if level else f.level != "good")]
    return {f.topic: f.what for f in wanted}


def bad_lines(source: Path) -> list[str]:
    found = examine(source, DataConfig(source=str(source))).findings
    return [line for finding in found if finding.topic == "lines" for line in finding.lines]


def test_a_healthy_log_has_nothing_but_good_findings(tmp_path):
    assert findings(write(tmp_path / "s", healthy())) == {}


@pytest.mark.parametrize("text", ["hello\n", "u1\nu2\n"])
def test_a_log_of_users_without_items_is_examined_too(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    assert examine(tmp_path / "log.txt", DataConfig())


def test_what_the_source_is_comes_first(tmp_path):
    source = write(tmp_path / "s", healthy())
    first = examine(source, DataConfig(source=str(source))).findings[0]
    size = (source / "interactions.csv").stat().st_size
    assert f"table: interactions.csv ({size / 1000:.1f} kB), items.jsonl (" in first.what
    assert "320 interactions of 40 users and 20 items; 20 described items, columns: title" in (
        first.what
    )


def test_a_log_in_many_ranges_is_examined_as_in_one(tmp_path, monkeypatch):
    rows = healthy()
    rows += [rows[0], rows[9], (rows[4][0], rows[4][1], START + 86_400 * 30), ("u3", "i19", START)]
    source = write(tmp_path / "s", rows[::-1])
    whole = examine(source, DataConfig(source=str(source)))
    for module in ("doctor", "statistics"):
        path = f"streamctl.data.{module}.ranges"
        monkeypatch.setattr(path, lambda offsets, rows=0: ranges(offsets, rows=13))
    monkeypatch.setattr("streamctl.data.sources.raw.HELD_BYTES", 0)
    assert examine(source, DataConfig(source=str(source))) == whole


def test_bad_lines_are_all_listed_and_the_rest_is_examined(tmp_path):
    source = write(tmp_path / "s", healthy(), "u1,i01\nu1,i02,never\n\n,i03,5\n")
    with open(source / "items.jsonl", "a") as handle:
        handle.write('\n{"item_id": "i00"}\n{broken\n')
    at = len(healthy()) + 2
    assert bad_lines(source) == [
        f"{source / 'interactions.csv'}:{at}: 2 columns where the header has 3",
        f"{source / 'interactions.csv'}:{at + 1}: timestamp is 'never', which is no number and no "
        "ISO date",
        f"{source / 'interactions.csv'}:{at + 3}: user_id is empty",
        f"{source / 'items.jsonl'}:21: item id 'i00' occurs twice, first in line 1",
        f"{source / 'items.jsonl'}:22: not a JSON object",
    ]
    found = examine(source, DataConfig(source=str(source)))
    assert found.statistics["interactions"] == len(healthy())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("user_sequence.txt", "u1 a b c\nu2\nu3 a b c d\nu1 a b\n", "2: user 'u2' has no items"),
        ("x.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n1\t2\n", "3: 2"),
        ("ratings.dat", "1::2::5::30\n1::3::5::40\n1::2\n1::4::4::50\n", "3: 2 columns"),
        ("u.data", "1\t2\t5\t30\n1\t3\t5\tx\n", "2: timestamp is 'x', which is no number"),
        (
            "interactions.jsonl",
            '{"user_id": 1, "item_id": 2, "timestamp": 3}\n[]\n{"user_id": 1}\n',
            "2: not a JSON object",
        ),
    ],
)  # fmt: skip
def test_bad_lines_of_every_text_format_are_found(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    assert bad_lines(tmp_path)[0].startswith(f"{tmp_path / name}:{reason}")


@pytest.mark.parametrize(
    ("log", "name", "content", "reason"),
    [
        ("ratings.dat", "movies.dat", "1::Caf\xe9::Drama\n2::Two\n", "2: 2 columns"),
        ("u.data", "u.item", f"1|Caf\xe9|d|v|u{'|0' * 19}\n2|Two\n", "2: 2 columns"),
        ("ratings.csv", "movies.csv", "movieId,title,genres\n1,One,a\n2,Two\n", "3: 2 columns"),
        ("x.inter", "x.item", "item_id:token\ttitle:token_seq\n1\tOne\n\tTwo\n", "3: the item"),
        ("reviews_X_5.json", "meta_X.json", "{'asin': '1'}\n{'asin': '1'}\n{broken\n", "3: not a"),
    ],
)  # fmt: skip
def test_bad_lines_of_every_items_file_are_found(tmp_path, log, name, content, reason):
    rows = [(user, item, 1_000_000_000 + item) for user in range(5) for item in (1, 2, 3, 4, 5)]
    names = {"reviewerID": 0, "asin": 1, "unixReviewTime": 2}
    lines = {
        "ratings.dat": lambda row: "{}::{}::5::{}".format(*row),
        "u.data": lambda row: "{}\t{}\t5\t{}".format(*row),
        "ratings.csv": lambda row: "{},{},5,{}".format(*row),
        "x.inter": lambda row: "{}\t{}\t{}".format(*row),
        "reviews_X_5.json": lambda row: json.dumps({k: row[at] for k, at in names.items()}),
    }[log]
    heads = {"ratings.csv": "userId,movieId,rating,timestamp\n",
             "x.inter": "user_id:token\titem_id:token\ttimestamp:float\n"}  # fmt: skip
    (tmp_path / log).write_text(heads.get(log, "") + "\n".join(map(lines, rows)) + "\n")
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert bad_lines(tmp_path)[0].startswith(f"{tmp_path / name}:{reason}")


def test_a_file_cut_short_is_examined_up_to_the_cut(tmp_path):
    source = write(tmp_path / "s", healthy() * 20)
    path = source / "interactions.csv"
    (source / "interactions.csv.gz").write_bytes(gzip.compress(path.read_bytes())[:-200])
    path.unlink()
    found = examine(source, DataConfig(source=str(source)))
    assert "cut short from here on" in bad_lines(source)[-1]
    assert found.statistics["interactions"] > 1000


def test_items_cut_short_are_read_up_to_the_cut_where_bad_lines_may_be_left_out(tmp_path):
    source = write(tmp_path / "s", healthy())
    (source / "items.jsonl").unlink()
    rng = np.random.default_rng(0)
    rows = "".join(f"i{n:02},{rng.bytes(40).hex()}\n" for n in range(4000))
    packed = gzip.compress(f"item_id,title\n{rows}".encode())
    (source / "items.csv.gz").write_bytes(packed[:-2000])
    assert "cut short from here on" in bad_lines(source)[-1]
    assert "all 20 items of the log" in findings(source, "good")["items"]


def test_duplicates_are_counted_exact_and_in_time(tmp_path):
    rows = healthy()
    user, item, moment = rows[0]
    source = write(tmp_path / "s", [*rows, rows[0], (user, item, moment + 86_400 * 20)])
    assert (
        "exact repeats of user, item and time: 1 row (0.3%)"
        in findings(source, "warning")["duplicates"]
    )
    assert "2 interactions" in findings(source, "note")["duplicates"]
    assert "in the user's own history: 1 test item (2.5%)" in findings(source)["leakage"]


def test_impossible_and_unordered_times_are_found(tmp_path):
    rows = healthy()
    source = write(tmp_path / "s", [*rows[::-1], ("u0", "i19", 0), ("u1", "i19", 9_000_000_000)])
    assert "2 times before 1990 or in the future" in findings(source, "error")["times"]
    assert "not in the order of time: " in findings(source, "note")["times"]


def test_milliseconds_are_known_as_such(tmp_path):
    source = write(tmp_path / "s", [(u, i, t * 1000) for u, i, t in healthy()])
    assert findings(source, "good")["times"] == "in milliseconds, 2017-07-14 to 2017-07-21"


def test_sequences_sorted_by_id_are_an_error(tmp_path):
    """But with times that differ it is the ids that follow the times, and nothing is wrong."""
    rows = sorted(healthy(), key=lambda row: row[:2])
    lines = "".join(f"{user} {' '.join(i for u, i, _ in rows if u == user)}\n"
                    for user in sorted({user for user, _, _ in rows}))  # fmt: skip
    (tmp_path / "user_sequence.txt").write_text(lines)
    assert "sorted by item id, not by time (100%" in findings(tmp_path, "error")["order"]
    source = write(tmp_path / "s", [(u, i, START + n) for n, (u, i, _) in enumerate(rows)])
    assert "order" not in findings(source, "error") | findings(source, "warning")
    assert "item ids follow the times (100%" in findings(source, "note")["order"]
    source = write(tmp_path / "s", [(u, i, START) for u, i, _ in rows])
    assert "--ties shuffle" in remedies(source)["order"]


def test_ties_sorted_by_id_are_a_warning_and_shuffling_removes_them(tmp_path):
    rows = [(u, i, START + (t - START) // 259_200) for u, i, t in healthy()]  # three days are one
    rows += [(f"v{u[1:]}", i, t) for u, i, t in rows] + [(f"w{u[1:]}", i, t) for u, i, t in rows]
    source = write(tmp_path / "s", sorted(rows, key=lambda r: (r[0], r[2], r[1])))
    found = examine(source, DataConfig(source=str(source))).findings
    orders = [f for f in found if f.topic == "order" and f.level == "warning"]
    assert "P(id of the test item > id of the valid item) is 1.00" in orders[0].what
    assert orders[0].remedy.startswith("--ties shuffle")
    assert "100.0% of users have their valid and test item at the same time" in orders[1].what
    shuffled = examine(source, DataConfig(source=str(source), ties="shuffle")).findings
    assert not [f for f in shuffled if "P(id of" in f.what and f.level != "good"]


def test_filters_and_cold_items_are_reported(tmp_path):
    rows = [*healthy(), ("rare", "i00", START), ("u0", "new", START + 86_400 * 9)]
    source = write(tmp_path / "s", rows)
    what = findings(source)["filters"]
    assert "1 of 41 users, 1 of 21 items" in what
    found = examine(source, DataConfig(source=str(source))).findings
    assert next(f.lines for f in found if f.topic == "filters") == [
        "1 user with fewer than 5 interactions, and 1 interaction with them",
        "1 item with fewer than 5 interactions, and 1 interaction with them",
    ]
    assert "never in training: 1 test item (2.4%)" not in findings(source).get("cold items", "")
    cold = findings(source, min_item=1, min_user=3)["cold items"]
    assert cold == "never in training: 1 test item (2.5%)"
    assert "not in the items file: 1 item of 21 in the log" in findings(source)["items"]


def test_filters_that_leave_nothing_are_an_error_with_a_remedy(tmp_path):
    source = write(tmp_path / "s", healthy())
    assert "no usable interactions" in findings(source, "error", min_user=9)["filters"]


def test_ids_that_follow_the_time_are_noted(tmp_path):
    rows = [
        (f"u{u}", f"i{(u // 3 + 2 * k % 7) % 99:02}", START + 1000 * u + 7 * k)
        for u in range(60)
        for k in range(6)
    ]
    assert "item ids follow the time" in findings(write(tmp_path / "s", rows))["leakage"]


def test_a_log_without_items_file_is_an_error(tmp_path):
    source = write(tmp_path / "s", healthy())
    (source / "items.jsonl").unlink()
    assert "no items file" in findings(source, "error")["items"]


def test_what_cannot_be_read_at_all_is_one_error(tmp_path):
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1")
    with pytest.raises(StreamctlError, match="not a parquet file"):
        examine(tmp_path, DataConfig(source=str(tmp_path)))
    (tmp_path / "interactions.parquet").unlink()
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n1,2\n")
    with pytest.raises(StreamctlError, match=f"{tmp_path}/interactions.csv:2: 2 columns"):
        examine(tmp_path, DataConfig(source=str(tmp_path)))
    (tmp_path / "interactions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(StreamctlError, match=r"no column user_id"):
        examine(tmp_path, DataConfig(source=str(tmp_path)))


def test_the_findings_are_plain_json(tmp_path):
    source = write(tmp_path / "s", healthy())
    found = json.loads(json.dumps(examine(source, DataConfig(source=str(source))).to_dict()))
    assert set(found) == {"source", "format", "files", "findings", "statistics"}
    assert set(found["findings"][0]) == {"topic", "level", "what", "remedy", "lines"}


def test_beauty_has_the_tie_artefact_and_is_as_published():
    source = real_data("amazon-2014-beauty")
    assert findings(source, "error") == {}
    assert set(findings(source, "warning")) == {"order"}
    assert findings(source, "good")["published"].startswith("as Amazon 2014 Beauty")


def test_the_command_shows_lines_and_remedies_and_is_strict_on_demand(tmp_path):
    source = write(tmp_path / "s", healthy(), "u1,i01\nu1\n")
    call = partial(CliRunner().invoke, build_app())
    words = ["data", "doctor", str(source)]
    answer = call(words)
    assert answer.exit_code == 0, answer.output
    assert "ERROR  lines: interactions.csv: 2 bad lines" in answer.output
    assert "interactions.csv:322: 2 columns where the header has 3" in answer.output
    assert "interactions.csv:323: 1 column where the header has 3" in answer.output
    assert "-> --skip-bad 0.007 leaves them out" in answer.output
    assert call([*words, "--strict"]).exit_code == 1
    assert json.loads(call([*words, "--json"]).output)["format"] == "table"


def test_the_next_step_keeps_the_options_that_were_given(tmp_path):
    rows = "".join(f"{u},{i},{t},5\n" for u, i, t in healthy())
    (tmp_path / "log.csv").write_text("who,item_id,timestamp,rating\n" + rows)
    given = [str(tmp_path / "log.csv"), "--columns", "user=who", "--set", "data.min_rating=4"]
    answer = CliRunner().invoke(build_app(), ["data", "doctor", *given, "--strict"])
    assert f"Next: streamctl data prepare {shlex.join(given)} --run runs/log" in answer.output


def test_leakage_is_looked_for_a_range_of_users_at_a_time(monkeypatch):
    random = np.random.default_rng(0)
    items = random.integers(0, 50, 400_000).astype(np.int32)
    offsets = np.arange(0, len(items) + 1, 10)
    log = InteractionLog(items, offsets, ["u"] * (len(offsets) - 1))
    catalog = Catalog([str(item) for item in range(50)], [], [])
    whole = list(doctor.leakage(catalog, log))
    monkeypatch.setattr(doctor, "ranges", partial(ranges, rows=2000))
    tracemalloc.start()
    assert list(doctor.leakage(catalog, log)) == whole
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "in the user's own history: " in whole[1].what
    assert peak < 2 * items.nbytes, "numbers of users, none of interactions"


def test_items_without_a_title_are_counted(tmp_path):
    items = [{"item_id": f"i{i:02}", "title": f"Thing {i}" if i > 2 else " "} for i in range(20)]
    found = examine(write(tmp_path / "s", healthy(), items=items), DataConfig()).findings
    told = [finding.what for finding in found if finding.level == "warning"]
    assert told == ["no title: 3 items of 20, such as 'i00'"]


def test_of_many_bad_lines_the_first_are_listed_and_the_others_counted(tmp_path):
    source = write(tmp_path / "s", healthy(), extra="u1,i01,never\n" * 53)
    [finding] = [f for f in examine(source, DataConfig()).findings if f.topic == "lines"]
    assert "53 bad lines" in finding.what
    assert len(finding.lines) == 21
    assert finding.lines[-1] == "... and 33 more"


@pytest.mark.parametrize("copy", [False, True], ids=["the same file", "a copy"])
def test_a_log_given_as_the_items_file_is_told_from_one(tmp_path, copy):
    log = write(tmp_path / "s", healthy()) / "interactions.csv"
    items = log
    if copy:
        items = tmp_path / "items.csv"
        items.write_bytes(log.read_bytes())
    with pytest.raises(StreamctlError, match=r"log of interactions.*Next: --items FILE"):
        examine(log, DataConfig(items=str(items)))


def test_an_items_file_given_as_the_log_is_told_the_order(tmp_path):
    log = write(tmp_path / "s", healthy()) / "interactions.csv"
    goods = tmp_path / "goods.csv"
    goods.write_text("item_id,title\ni01,Thing\n")
    with pytest.raises(StreamctlError, match=r"no column user_id.*with the log first"):
        examine(goods, DataConfig(items=str(log)))
