"""Logs with odd ids and times, in every format and damaged, as a Hypothesis strategy."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

HEAD = "user_id,item_id,timestamp\n"
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
