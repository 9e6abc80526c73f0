"""Files as lines and texts: compression, encoding, and errors that name the line."""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from streamctl.errors import StreamctlError, count_of

COMPRESSED = (".gz", ".zst")
_NOT_CSV = "not CSV: a quote that is not closed, text behind its end, or a line end of another kind"
LONGEST = 10_000  # lines of a row: a quote that is open for longer was never to be closed
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")


def plain_name(path: Path) -> str:
    """The file's name in lower case, without .gz or .zst."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, decompressed where the name ends in .gz or .zst.

    Raises:
        StreamctlError: it cannot be opened.
    """
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")
        if path.suffix.lower() == ".zst":
            import zstandard

            return io.BufferedReader(zstandard.open(path, "rb"))  # it has no lines itself
        return open(path, "rb")
    except OSError as error:
        raise StreamctlError(
            f"cannot be read: {error.strerror or error}", where=path, run="a file that you may read"
        ) from error


def first_sentence(error: BaseException) -> str:
    """The first line of a message, at most 200 characters."""
    text = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
    return text[:200]


def damaged(path: Path, error: Exception, line: int | None = None) -> StreamctlError:
    """The error of a file that cannot be read to its end."""
    kind = "the compressed file is damaged or cut short" if path.suffix in COMPRESSED else ""
    reason = kind or f"cannot be read: {getattr(error, 'strerror', None) or first_sentence(error)}"
    return StreamctlError(reason, where=path, line=line, run="fetch or copy the file again")


def wrong_encoding(path: Path, line: int, encoding: str = "utf-8") -> StreamctlError:
    """The error of bytes that are not text in `encoding`."""
    with open_binary(path) as handle:
        start = handle.read(4)
    wide = start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start
    has = "UTF-16" if wide else "LATIN1"
    return StreamctlError(
        f"not {encoding.upper()} text",
        where=path,
        line=line,
        run=f"iconv -f {has} -t UTF-8 {path.name} > utf8-{path.name} (or what encoding it has)",
    )


def numbered(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of every line.

    Args:
        encoding: "replace" is UTF-8 in which what is none is replaced, "keep" in which it becomes
            lone surrogates.

    Raises:
        StreamctlError: unreadable, truncated, or not text in `encoding`.
    """
    import zstandard

    errors = {"replace": "replace", "keep": "surrogateescape"}.get(encoding, "strict")
    codec = encoding if errors == "strict" else "utf-8"
    number = 0
    with open_binary(path) as handle:
        stream = iter(handle)
        while True:
            try:
                raw = next(stream, None)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise damaged(path, error, number + 1) from error
            if raw is None:
                return
            number += 1
            try:
                text = raw.decode(codec, errors)
            except UnicodeDecodeError as error:
                raise wrong_encoding(path, number, codec) from error
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text.rstrip("\r\n")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """`numbered` without blank lines."""
    return (line for line in numbered(path, encoding) if line[1].strip())


def records(
    source: Iterable[tuple[int, str]], delimiter: str, width: int, *, quoted: bool, strict=False
) -> Iterator[tuple[int, list[str], str]]:
    """(line in which it begins, values, fault) of each row of a delimited text but blank ones.

    The fault is "" of a row that is well formed. After one that is not, with a quote that is not
    closed, say, the line behind its first one begins the next row.

    Args:
        source: numbered lines. width: how many values a row has.
        quoted: whether values may be in double quotes, and then hold line breaks.
        strict: whether text behind a closing quote is a fault.
    """
    csv.field_size_limit(1 << 30)
    source, again = iter(source), deque()
    read: list[tuple[int, str]] = []
    ended = False

    def texts() -> Iterator[str]:
        nonlocal ended
        while len(read) < LONGEST:
            if (line := again.popleft() if again else next(source, None)) is None:
                break
            read.append(line)
            yield line[1] + "\n"
        ended = True

    rows = None
    while True:
        read.clear()
        fault = ""
        if rows is None:
            ended = False
            rows = (
                csv.reader(texts(), delimiter=delimiter, strict=strict)
                if quoted
                else (text[:-1].split(delimiter) for text in texts())
            )
        try:
            row = next(rows, None)
        except csv.Error:
            ended = True
            row, fault = [], _NOT_CSV
        if row is None:
            return
        number = read[0][0]
        if ended and len(read) > 1:  # the reader was still inside a quote
            fault = _NOT_CSV
        if not fault and len(row) != width:
            if len(row) < 2 and not "".join(row).strip():
                continue
            fault = f"{count_of(len(row), 'column')} where the header has {width}"
        if ended:  # in the midst of a row: what is behind its first line is read again
            again.extendleft(reversed(read[1:] if fault else ()))
            rows = None
        yield number, row, fault


def first_line(path: Path, encoding: str = "utf-8") -> tuple[int, str]:
    """(number, text) of the first line that is not blank.

    Raises:
        StreamctlError: the file is empty or unreadable.
    """
    for number, text in lines(path, encoding):
        return number, text
    raise StreamctlError("the file is empty", where=path, run="copy or download it again")


def header_of(
    path: Path, delimiter: str, names: Sequence[str] = (), *, quoted: bool, encoding: str = "utf-8"
) -> tuple[int, list[str]]:
    """(number of the line, names) of a table's header; (0, `names`) where there are any.

    Raises:
        StreamctlError: the file is empty or unreadable.
    """
    number, text = first_line(path, encoding)
    if names:
        return 0, list(names)
    try:
        row = next(csv.reader([text], delimiter=delimiter)) if quoted else text.split(delimiter)
    except csv.Error as error:
        raise StreamctlError(
            f"not CSV: {error}", where=path, line=number, run="a first line that names the columns"
        ) from error
    return number, [name.strip() for name in row]


def delimiter_of(path: Path) -> str:
    """Comma, semicolon, tab or bar: the one that parts the first line most often."""
    _, header = first_line(path)
    return max(",;\t|", key=header.count)


def writable(text: str) -> str:
    """The text without lone surrogates, which JSON may hold and no file can."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def clean(value: object) -> str:
    """A catalogue value as one line of text: entities and tags resolved, lists joined."""
    if value is None or isinstance(value, dict):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(clean, value)))
    text = writable(str(value))
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    return " ".join(text.split())
