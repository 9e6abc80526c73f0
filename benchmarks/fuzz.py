"""Broken and odd data: every input ends in success or in one line and exit code 1.

python benchmarks/fuzz.py --json [--save] [--inputs 20000] [--seed 0]

Two sources of inputs: a corpus of broken files (CORPUS), and logs that Hypothesis generates in
every format with odd ids and times, damage to the bytes, and truncated compression. Each goes
through the reader, the filters and the numbering; one in ten goes through the whole `data prepare`,
`data doctor` or `data export` as the command line runs it (in this process, for speed), and a
sample through a process of its own. Counted are tracebacks (any other exception, or more than one
line), hangs (more than 60 s), and stages left half-written; the exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from streamctl import cli
from streamctl.config import DataConfig
from streamctl.data.prepare import build
from streamctl.data.sinks import SINKS
from streamctl.data.sources import read_source
from streamctl.errors import StreamctlError
from streamctl.runs import provenance

RESULT = Path(__file__).resolve().parent / "results" / "fuzz.json"
HANG_S = 60
HEAD = "user_id,item_id,timestamp\n"
GOOD = "".join(f"u{u},i{i},{1000 + 7 * u + i}\n" for u in range(6) for i in range(6))
ODD_IDS = (
    "", " ", "0", "007", "-0", "nan", "null", "None", "\u202eabc", "e\u0301", "\u00e9", "\u212b",
    "\ufeff", "\u200b", "\x00", "\x1f", "\x85", "\u2028", "\U0001f600\U0001f3fd", "a\u0300" * 40,
    "\ufdd0", "\uffff", "\U0010ffff", '"', "'", ",", "\t", ";", "::", "|", "a b", "a\rb", "a\nb",
    "../../x", "/etc/passwd", "-rf", "=1+1", "%s%n", "{}", "[]", "<b>", "&amp;", "\\", "\\u0000",
    "1e3", "1.0", "x" * 5000, "\u0130", "\u00df", "\ud7ff", "\u0661\u0662", "True", "\u3000",
)  # fmt: skip
ODD_TIMES = (
    "", "nan", "NaN", "inf", "-inf", "-1", "0", "1e400", "1e30", "9" * 30, "1.5", "1.7e9", "0x10",
    "9223372036854775807", "-9223372036854775808", "9223372036854775808", "2020-02-30",
    "2020-01-01", "2020-01-01T00:00:00Z", "0001-01-01", "9999-12-31", "12:00", "\u0661", "1_000",
    " 5 ", "5,5", "null", "true", "1E5", "+7", "--7", "\x00",
)  # fmt: skip
MARKS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b",", b"\t", b"\n", b"\r", b"\n\n", b"nan",
    b"9" * 30, b"1e400", b"{", b"}", b"[", b"null", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"A" * 3000, b"[" * 3000, b"user_id", b"item_id", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"", b"::",
)  # fmt: skip
Row = tuple[str, str, str]


def _objects(rows: list[Row], names: tuple[str, str, str], **extra: str) -> str:
    lines = (json.dumps({**dict(zip(names, row, strict=True)), **extra}) for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _sequences(rows: list[Row]) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    for user, item, _ in rows:
        users.setdefault(user, []).append(item)
    return users


def _parquet(rows: list[Row]) -> bytes:
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), buffer)
    return buffer.getvalue()


def _lines(rows: list[Row], mark: str, middle: tuple[str, ...] = ()) -> str:
    return "".join(mark.join((user, item, *middle, time)) + "\n" for user, item, time in rows)


# Name of the interactions file -> its content.
FORMATS: dict[str, Callable[[list[Row]], str | bytes]] = {
    "interactions.csv": lambda rows: HEAD + _lines(rows, ","),
    "interactions.tsv": lambda rows: HEAD.replace(",", "\t") + _lines(rows, "\t"),
    "interactions.jsonl": lambda rows: _objects(rows, ("user_id", "item_id", "timestamp")),
    "interactions.parquet": _parquet,
    "user_sequence.txt": lambda rows: "".join(
        f"{user} {' '.join(items)}\n" for user, items in _sequences(rows).items()
    ),
    "x.inter": lambda rows: "user_id:token\titem_id:token\ttimestamp:float\n" + _lines(rows, "\t"),
    "x.inter.json": lambda rows: json.dumps(_sequences(rows)),
    "ratings.dat": lambda rows: _lines(rows, "::", ("5",)),
    "u.data": lambda rows: _lines(rows, "\t", ("5",)),
    "ratings.csv": lambda rows: "userId,movieId,rating,timestamp\n" + _lines(rows, ",", ("5",)),
    "Toys.csv": lambda rows: "user_id,parent_asin,rating,timestamp\n" + _lines(rows, ",", ("5",)),
    "Toys_5.json": lambda rows: _objects(
        rows, ("reviewerID", "asin", "unixReviewTime"), reviewText="x"
    ),
}
ITEMS = {
    "interactions.csv": "items.jsonl",
    "interactions.tsv": "items.csv",
    "interactions.jsonl": "items.tsv",
    "user_sequence.txt": "items.jsonl",
    "x.inter": "x.item",
    "x.inter.json": "x.item.json",
    "ratings.dat": "movies.dat",
    "u.data": "u.item",
    "ratings.csv": "movies.csv",
    "Toys.csv": "meta_Toys.jsonl",
    "Toys_5.json": "meta_Toys.json",
}


def _catalogue(name: str, ids: list[str]) -> str:
    titled = [(item, f"Thing {number}") for number, item in enumerate(ids)]
    if name.endswith(".item.json"):
        return json.dumps({item: {"title": title} for item, title in titled})
    if name.endswith((".jsonl", ".json")):
        key = "parent_asin" if name.endswith("jsonl") and "meta" in name else "asin"
        key = key if "meta" in name else "item_id"
        return "".join(json.dumps({key: item, "title": title}) + "\n" for item, title in titled)
    if name == "movies.dat":
        return "".join(f"{item}::{title}::Drama\n" for item, title in titled)
    if name == "u.item":
        return "".join(f"{item}|{title}|d||u|{'|'.join('0' * 19)}\n" for item, title in titled)
    if name == "movies.csv":
        titled = [("movieId", "title"), *titled]
    else:
        titled = [("item_id", "title"), *titled]
    mark = "," if name.endswith(".csv") else "\t"
    return "".join(f"{item}{mark}{title}\n" for item, title in titled)


@st.composite
def sources(draw: st.DrawFn) -> dict[str, bytes]:
    """Files of a source, by name: a good log into which oddities and damage are put."""
    ids = st.one_of(st.sampled_from(ODD_IDS), st.text(max_size=6))
    name = draw(st.sampled_from(sorted(FORMATS)))
    rows = [(f"u{u}", f"i{i}", str(1000 + 7 * u + i)) for u in range(5) for i in range(5)]
    for user, item, moment in draw(
        st.lists(
            st.tuples(ids, ids, st.one_of(st.sampled_from(ODD_TIMES), st.just("1010"))), max_size=3
        )
    ):
        at = draw(st.integers(0, len(rows)))
        copies = [(user or "u1", f"i{n}", moment) for n in range(4)]
        rows[at:at] = draw(st.sampled_from(([(user, item, moment)], [("u1", item, "9")], copies)))
    try:
        content = FORMATS[name](rows)
        whole = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    except UnicodeEncodeError:  # parquet holds no lone surrogates
        whole = b"PAR1"
    files = {name: whole}
    if name in ITEMS and draw(st.booleans()):
        known = sorted({item for _, item, _ in rows})
        text = _catalogue(ITEMS[name], known).encode("utf-8", "surrogatepass")
        files[ITEMS[name]] = text
    spoilt = draw(st.sampled_from(sorted(files)))
    content = bytearray(files[spoilt])
    for where, mark, removed in draw(
        st.lists(
            st.tuples(
                st.floats(0, 1), st.sampled_from(MARKS), st.sampled_from((0, 0, 1, 40, 1 << 30))
            ),
            max_size=2,
        )
    ):
        at = int(where * len(content))
        content[at : at + removed] = mark
    packed = draw(st.sampled_from(("", "", "", ".gz", ".zst")))
    data = bytes(content)
    if packed:
        data = gzip.compress(data, 1) if packed == ".gz" else zstandard.compress(data)
        cut = draw(st.sampled_from((0, 0, 1, 9, len(data) // 2)))
        data = data[: len(data) - cut]
    del files[spoilt]
    files[spoilt + packed] = data
    return files


def _csv(*lines: str | bytes) -> Callable[[Path], None]:
    """A writer of interactions.csv: a good log and these lines after it."""
    tail = b"".join(line.encode() if isinstance(line, str) else line for line in lines)
    return lambda folder: _put(folder, "interactions.csv", (HEAD + GOOD).encode() + tail)


def _put(folder: Path, name: str, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)


def _loop(folder: Path) -> None:
    (folder / "interactions.csv").symlink_to("interactions.csv")


def _folder_loop(folder: Path) -> None:
    _put(folder, "interactions.csv", HEAD + GOOD)
    (folder / "deeper").symlink_to(folder, target_is_directory=True)


def _denied(folder: Path) -> None:
    _put(folder, "interactions.csv", HEAD + GOOD)
    (folder / "interactions.csv").chmod(0)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "interactions.csv")


# What is broken -> how it is written into an empty folder.
CORPUS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "empty file": lambda folder: _put(folder, "interactions.csv", b""),
    "empty gz": lambda folder: _put(folder, "interactions.csv.gz", b""),
    "empty zst": lambda folder: _put(folder, "interactions.csv.zst", b""),
    "gz of nothing": lambda folder: _put(folder, "interactions.csv.gz", gzip.compress(b"")),
    "truncated gz": lambda folder: _put(
        folder, "interactions.csv.gz", gzip.compress((HEAD + GOOD * 50).encode())[:-40]
    ),
    "gz with rubbish after it": lambda folder: _put(
        folder, "interactions.csv.gz", gzip.compress((HEAD + GOOD).encode()) + b"rubbish"
    ),
    "plain text called gz": lambda folder: _put(folder, "interactions.csv.gz", HEAD + GOOD),
    "gz called csv": lambda folder: _put(
        folder, "interactions.csv", gzip.compress((HEAD + GOOD).encode())
    ),
    "utf-16": lambda folder: _put(folder, "interactions.csv", (HEAD + GOOD).encode("utf-16")),
    "utf-32": lambda folder: _put(folder, "interactions.csv", (HEAD + GOOD).encode("utf-32")),
    "latin-1": _csv("é,i1,5\n".encode("latin-1")),
    "shift-jis": _csv("日本,i1,5\n".encode("shift-jis")),
    "surrogates in utf-8": _csv(b"\xed\xa0\x80,i1,5\n"),
    "NUL bytes": _csv(b"u\0,i1,5\n", b"\0" * 300, b"\n"),
    "only NUL bytes": lambda folder: _put(folder, "interactions.csv", bytes(10_000)),
    "a line of 10 MB": _csv("x" * 10_000_000, ",i1,5\n"),
    "a header of 10 MB": lambda folder: _put(folder, "interactions.csv", "a," * 5_000_000),
    "10 MB without a line end": lambda folder: _put(folder, "interactions.csv", "x" * 10_000_000),
    "a json line of 10 MB": lambda folder: _put(
        folder, "interactions.jsonl", '{"user_id": "' + "x" * 10_000_000 + '"}\n'
    ),
    "json nested too deep": lambda folder: _put(folder, "x.inter.json", "[" * 1_000_000),
    "json lines nested too deep": lambda folder: _put(folder, "interactions.jsonl", "[" * 100_000),
    "a huge json number": lambda folder: _put(
        folder, "interactions.jsonl", '{"user_id": 1, "item_id": ' + "9" * 5000 + "}\n"
    ),
    "an open quote": _csv('"u1,i1,5\n', "u2,i2,6\n" * 2000),
    "a quote inside": _csv('u"1,i"1,5\n'),
    "numbers as strings": _csv('"1","2","3"\n', "'1','2','3'\n"),
    "NaN times": _csv("u1,i1,NaN\n"),
    "times of every kind": _csv("u1,i1,5\n", "u1,i2,2020-01-01\n", "u1,i3,5.5\n"),
    "a time of 1e300": _csv("u1,i1,1e300\n"),
    "a header twice": lambda folder: _put(folder, "interactions.csv", HEAD + HEAD + GOOD),
    "a column twice": lambda folder: _put(
        folder, "interactions.csv", "user_id,item_id,item_id,timestamp\n1,2,3,4\n"
    ),
    "a header alone": lambda folder: _put(folder, "interactions.csv", HEAD),
    "blank lines alone": lambda folder: _put(folder, "interactions.csv", "\n" * 1000),
    "a folder called as the file": lambda folder: (folder / "interactions.csv").mkdir(),
    "a link to itself": _loop,
    "a link to nothing": lambda folder: (folder / "interactions.csv").symlink_to("nowhere"),
    "a folder that holds itself": _folder_loop,
    "a named pipe": _fifo,
    "permission denied": _denied,
    "rubbish called parquet": lambda folder: _put(folder, "interactions.parquet", b"PAR1" * 99),
    "a parquet of no rows": lambda folder: pq.write_table(
        pa.table({"user_id": pa.array([], pa.string())}), folder / "interactions.parquet"
    ),
    "a parquet of structs": lambda folder: pq.write_table(
        pa.table(
            {"user_id": [{"a": 1}], "item_id": [[1, 2]], "timestamp": [{"b": 2}]}
        ),
        folder / "interactions.parquet",
    ),
    "a parquet with fractions as ids": lambda folder: pq.write_table(
        pa.table({"user_id": [1.5], "item_id": [2.0], "timestamp": [3]}),
        folder / "interactions.parquet",
    ),
    "items that are a list": lambda folder: (
        _csv()(folder), _put(folder, "items.jsonl", '["i1"]\n')
    )[0],
    "items of 10 MB in one value": lambda folder: (
        _csv()(folder),
        _put(folder, "items.jsonl", json.dumps({"item_id": "i1", "title": "x" * 10_000_000})),
    )[0],
    "every odd id": _csv(*(f'"{odd}",i1,5\n' for odd in ODD_IDS if odd and '"' not in odd)),
}  # fmt: skip


class Campaign:
    """Runs inputs and counts how they end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ends: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def run(self, what: str, files: dict[str, bytes] | None, way: str) -> str:
        """One input: `files`, or the corpus entry `what`; `way` is a key of WAYS."""
        source, run = self.folder / "source", self.folder / "run"
        for path in (source, run, self.folder / "out"):
            shutil.rmtree(path, ignore_errors=True)
        source.mkdir()
        if files is None:
            CORPUS[what](source)
        else:
            for name, content in files.items():
                _put(source, name, content)
        end, detail = _ends(lambda: WAYS[way](source, run))
        if (run / "data").exists() and not (run / "data" / "manifest.json").exists():
            end, detail = "half-written stage", f"{end}: {detail}"
        self.ends[end] += 1
        if end not in ("success", "one line"):
            self.failures.append({"input": what, "way": way, "end": end, "detail": detail})
        return f"{end}: {detail}"


def _inside(source: Path, run: Path) -> None:
    build(read_source(source), DataConfig(min_user=3, min_item=1))


def _command(*words: str) -> None:
    """The command line in this process; a failure is raised as SystemExit with its code."""
    old, sys.argv = sys.argv, ["streamctl", *words]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = old


def _prepare(source: Path, run: Path) -> None:
    _command("data", "prepare", str(source), "--run", str(run), "--min-user", "3", "--json")


def _doctor(source: Path, run: Path) -> None:
    _command("data", "doctor", str(source), "--json")


def _export(source: Path, run: Path) -> None:
    _prepare(source, run)
    formats = list(SINKS)
    first = sum(file.stat().st_size for file in source.iterdir())  # another input, other formats
    for number in range(first, first + 3):
        kind = formats[number % len(formats)]
        out = run.parent / "out" / kind
        _command("data", "export", str(out), "--run", str(run), "--format", kind)


def _process(source: Path, run: Path) -> None:
    command = [sys.executable, "-m", "streamctl", "data", "prepare", str(source), "--run", str(run)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("warning: ")]
    if answer.returncode not in (0, 1) or "Traceback" in answer.stderr:
        raise RuntimeError(f"exit code {answer.returncode}: {answer.stderr[-300:]}")
    if answer.returncode:
        raise StreamctlError("\n".join(lines))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "reader": _inside,
    "prepare": _prepare,
    "doctor": _doctor,
    "export": _export,
    "process": _process,
}


class _Hang(BaseException):
    pass


class _OutOfTime(BaseException):
    pass


def _ends(call: Callable[[], None]) -> tuple[str, str]:
    """(how a call ends, a detail): "success", "one line", "traceback" or "hang"."""

    def ring(*_: object) -> None:
        raise _Hang

    output, errors = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            call()
        return "success", ""
    except SystemExit as stop:
        text = errors.getvalue().strip()
        if stop.code in (0, None):
            return "success", ""
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        if stop.code == 1 and len(said) == 1 and text.splitlines()[-1] == said[0]:
            return "one line", said[0][:300]
        return "traceback", f"exit code {stop.code}: {text[-300:]}"
    except (StreamctlError, OSError) as error:
        lines = str(error).splitlines()
        return ("one line" if len(lines) == 1 else "traceback"), str(error)[:300]
    except _Hang:
        return "hang", f"more than {HANG_S} s"
    except Exception:
        return "traceback", traceback.format_exc()[-800:]
    finally:
        signal.alarm(0)


def generated(campaign: Campaign, inputs: int, number: int, minutes: float = 60) -> None:
    """Inputs that Hypothesis generates; the campaign counts failures, nothing is shrunk.

    After `minutes` no further input is run or counted.
    """
    last = time.monotonic() + 60 * minutes

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(sources())
    def each(files: dict[str, bytes]) -> None:
        if time.monotonic() > last:
            raise _OutOfTime
        done = sum(campaign.ends.values())
        way = {5: "prepare", 10: "doctor", 15: "export"}.get(done % 30, "reader")
        campaign.run(repr(files)[:2000], files, way)

    with contextlib.suppress(_OutOfTime):
        each()


def share(
    top: str, inputs: int, minutes: float, number: int
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """What one worker does: its part of the generated inputs, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=top))
    campaign = Campaign(folder)
    generated(campaign, inputs, number, minutes)
    return campaign.ends, campaign.failures


def corpus(campaign: Campaign, ways: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Every entry of the corpus in each of the ways: (entry, way, how it ended)."""
    for name in CORPUS:
        for way in ways:
            yield name, way, campaign.run(name, None, way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="stop generating after this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as top:
        campaign = Campaign(Path(top))
        for name, way, end in corpus(campaign, ("prepare", "doctor")):
            print(f"{name} ({way}): {end}", file=sys.stderr)
        entries = sum(campaign.ends.values())
        for name in list(CORPUS)[::6]:
            campaign.run(name, None, "process")
        processes = sum(campaign.ends.values()) - entries
        part = -(-options.inputs // options.workers)
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as workers:
            numbers = range(options.seed, options.seed + options.workers)
            for ends, failures in workers.map(
                share, repeat(top), repeat(part), repeat(options.minutes), numbers
            ):
                campaign.ends += ends
                campaign.failures += failures
    receipt = {
        "name": "fuzz",
        "command": f"python benchmarks/fuzz.py --json --save --inputs {options.inputs}",
        "inputs": sum(campaign.ends.values()),
        "tracebacks": campaign.ends["traceback"],
        "hangs": campaign.ends["hang"],
        "half_written": campaign.ends["half-written stage"],
        "succeeded": campaign.ends["success"],
        "one_line": campaign.ends["one line"],
        "inputs_asked_for": options.inputs,
        "corpus_entries": len(CORPUS),
        "corpus_inputs": entries,
        "process_inputs": processes,
        "failures": campaign.failures[:50],
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        **{key: value for key, value in provenance().items() if key != "peak_memory_mb"},
    }
    print(json.dumps(receipt, indent=1) if options.json else f"{dict(campaign.ends)}")
    if options.save:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(receipt, indent=1) + "\n")
    sys.exit(bool(campaign.failures))


if __name__ == "__main__":
    main()
