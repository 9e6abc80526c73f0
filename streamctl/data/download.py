"""Download one file from one of several mirrors: continue it, check it, then rename it."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from streamctl.errors import StreamctlError
from streamctl.files import BROKEN_ZIP, disk_errors
from streamctl.progress import progress_bar, say

TIMEOUT_S = 30.0  # without a byte
TRIES = 3  # in a row that bring nothing, of one mirror
WAIT_S = 1.0  # before the second try; longer before the next
_BLOCK = 1 << 18
_NETWORK = (OSError, http.client.HTTPException, EOFError)


class _Failed(Exception):
    """This mirror does not have the file, or not whole; the message says why."""


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirections but none from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise _Failed(f"sends us from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(urls: Sequence[str], path: Path, md5: str | None = None) -> None:
    """Fetch a file to `path`; it appears there only whole and checked.

    What has come of it lies beside as `.NAME.part`, and the next call asks for the rest. A file
    that ends in .gz or .zip is read to its end, so that one cut short, damaged or made of pieces of
    two versions is noticed even where its owner publishes no checksum.

    Args:
        urls: mirrors, tried in order.
        md5: the owner's checksum, or None where there is none.

    Raises:
        StreamctlError: no mirror gives the file whole; says what each of them answered.
    """
    reasons = []
    for url in urls:
        try:
            _from_mirror(url, path, md5)
            return
        except _Failed as failure:
            host = urllib.parse.urlsplit(url).netloc
            reasons.append(f"{host} {failure}")
            say(f"{path.name}: {host} {failure}")
    raise StreamctlError(
        f"{path.name} could not be fetched: {'; '.join(reasons)}",
        run="the same command when the network is there (it continues); through a proxy, set "
        f"https_proxy; --mirror URL asks another server; or copy {path.name} to {path.parent}/ "
        "by hand",
    )


def _from_mirror(url: str, path: Path, md5: str | None) -> None:
    """One mirror, as often as it brings something new."""
    part = path.with_name(f".{path.name}.part")
    failures, spoilt = 0, False
    while True:
        before = _size(part)
        try:
            complete = _receive(url, part, path.name)
            problem = "ended the connection early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise _Failed(f"answers {error.code} {error.reason}") from error
            complete, problem = False, f"answers {error.code} {error.reason}"
        except _NETWORK as error:
            reason = getattr(error, "reason", error)
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            complete, problem = False, f"cannot be reached ({text})"
        if complete:
            fault = damage(part, path.name, md5)
            if fault is None:
                with disk_errors(path):
                    with open(part, "rb") as handle:
                        os.fsync(handle.fileno())
                    os.replace(part, path)
                return
            _discard(part)
            if spoilt:
                raise _Failed(f"sends a file that {fault}, twice")
            spoilt = True
            continue
        failures = 0 if _size(part) > before else failures + 1
        if failures >= TRIES:
            raise _Failed(problem)
        time.sleep(WAIT_S * failures)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    with disk_errors(part):
        part.unlink(missing_ok=True)


def _receive(url: str, part: Path, name: str) -> bool:
    """Ask for what is missing and append it; whether the server's length has been reached."""
    headers, held = {"Accept-Encoding": "identity", "User-Agent": "streamctl"}, _size(part)
    if held:
        headers["Range"] = f"bytes={held}-"
    opener = urllib.request.build_opener(_NoDowngrade)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        _discard(part)  # longer than the file: not a piece of it
        return False
    with answer:
        piece = re.match(r"bytes (\d+)-\d+/(\d+)$", answer.headers.get("Content-Range", ""))
        length = piece[2] if piece else answer.headers.get("Content-Length", "")
        total = int(length) if length.isascii() and length.isdigit() else None
        if answer.status != 206 or piece is None or int(piece[1]) != held:
            _discard(part)
            if answer.status == 206:
                return False  # it sends another piece than was asked for
        with progress_bar(name, max((total or 1) >> 20, 1), "MB") as bar:
            bar.start_at(_size(part) >> 20)
            with disk_errors(part):
                handle = open(part, "ab")  # noqa: SIM115 - network errors are not the disk's
            with handle:
                while block := answer.read(_BLOCK):
                    with disk_errors(part):
                        handle.write(block)
                    bar.advance((handle.tell() >> 20) - bar.done)
    return total is None or _size(part) == total


def damage(path: Path, name: str, md5: str | None) -> str | None:
    """What is wrong with a fetched file called `name`, or None.

    Raises:
        StreamctlError: it cannot be read.
    """
    if not path.is_file() or not path.stat().st_size:
        return "is empty"
    if md5 is not None:
        with open(path, "rb") as handle:
            found = hashlib.file_digest(handle, "md5").hexdigest()
        return None if found == md5 else f"has the checksum {found} instead of {md5}"
    try:
        if name.endswith(".gz"):
            with gzip.open(path) as handle:
                while handle.read(1 << 20):
                    pass
        elif name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return "is damaged"
    except (OSError, EOFError, zlib.error, *BROKEN_ZIP):
        return "is cut short or damaged"
    return None
