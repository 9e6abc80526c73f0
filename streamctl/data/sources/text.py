"""Files as lines and texts: compression, encoding, and errors that name the line."""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from streamctl.data.sources.reading import Reading
from streamctl.errors import StreamctlError
from streamctl.files import disk_errors

COMPRESSED = (".gz", ".zst")
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
        encoding: "replace" is UTF-8 in which what is none is replaced.

    Raises:
        StreamctlError: unreadable, truncated, or not text in `encoding`.
    """
    import zstandard

    codec, errors = ("utf-8", "replace") if encoding == "replace" else (encoding, "strict")
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
    source: Iterable[tuple[int, str]], delimiter: str, quoted: bool, path: Path
) -> Iterator[tuple[int, list[str]]]:
    """(line in which it begins, values) of the rows of a delimited text; blank ones are left out.

    Args:
        source: numbered lines.
        quoted: whether values may be in double quotes, and then hold line breaks.

    Raises:
        StreamctlError: a line that is no CSV.
    """
    if not quoted:
        yield from ((number, text.split(delimiter)) for number, text in source if text.strip())
        return
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number, text in source:
            read.append(number)
            yield text + "\n"

    csv.field_size_limit(1 << 30)
    rows = csv.reader(texts(), delimiter=delimiter)
    while True:
        read.clear()
        try:
            row = next(rows, None)
        except csv.Error as error:
            where = read[0] if read else None
            raise StreamctlError(
                f"not CSV: {error}",
                where=path,
                line=where,
                run="give each line the columns of the header; quote texts that hold a delimiter",
            ) from error
        if row is None:
            return
        if len(row) > 1 or (row and row[0].strip()):
            yield read[0], row


def lines_at(path: Path, places: Sequence[int]) -> list[int]:
    """The line numbers of bytes (ascending, of the decompressed file)."""
    numbers, line, start = [], 1, 0
    with open_binary(path) as handle:
        for place in places:
            while start < place and (block := handle.read(min(1 << 20, place - start))):
                line += block.count(b"\n")
                start += len(block)
            numbers.append(line)
    return numbers


def plain_copy(path: Path, copy: Path, reading: Reading) -> Path:
    """The file decompressed, with one kind of line end; as far as it can be read.

    Raises:
        StreamctlError: the file is damaged, and bad lines are not to be left out.
    """
    import zstandard

    line = 1
    with open_binary(path) as source, disk_errors(copy), open(copy, "wb") as target:
        while True:
            try:
                block = source.read1(1 << 20)  # what there is of a file that is cut short
                while block.endswith(b"\r") and (more := source.read1(1)):
                    block += more
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                if not reading.skip_bad:
                    raise damaged(path, error) from error
                reading.bad(path, line, "the compressed file is damaged or cut short from here on")
                return copy
            if not block:
                return copy
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            line += block.count(b"\n")
            target.write(block)


def first_line(path: Path, encoding: str = "utf-8") -> tuple[int, str]:
    """(number, text) of the first line that is not blank.

    Raises:
        StreamctlError: the file is empty or unreadable.
    """
    for number, text in lines(path, encoding):
        return number, text
    raise StreamctlError("the file is empty", where=path, run="copy or download it again")


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
