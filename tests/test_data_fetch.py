"""Fetching: what a server does wrong (drops, lies, changes its mind) never becomes a wrong file."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import random
import stat
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from streamctl.commands.data_fetch import command
from streamctl.config import DataConfig
from streamctl.data import download as downloading
from streamctl.data.archives import unpack
from streamctl.data.download import download
from streamctl.data.fetch import fetch
from streamctl.data.prepare import build
from streamctl.data.public import SETS, PublicSet, Remote, find_set
from streamctl.data.sources import find_source, read_source
from streamctl.errors import StreamctlError, UsageError

CONTENT = random.Random(0).randbytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Asks the server's behaviour what to do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        try:
            self.server.behaviour(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *words):
        pass

    def begin(self) -> int:
        """First byte asked for."""
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0

    def head(self, code: int, length: int | None, **headers: str) -> None:
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def piece(self, content: bytes, most: int | None = None) -> None:
        """Answer as a good server does, but break off after `most` bytes."""
        start = self.begin()
        rest = content[start:]
        if start:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.head(206, len(rest), Content_Range=span)
        else:
            self.head(200, len(rest))
        self.wfile.write(rest[:most])
        self.close_connection = most is not None


@pytest.fixture
def server(monkeypatch):
    """A server on this machine: set `.behaviour`; `.requests` holds (path, Range)."""
    monkeypatch.setattr(downloading, "WAIT_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.requests = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        running.behaviour = lambda handler: handler.piece(CONTENT)
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_whole(server, tmp_path):
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["a.bin"]


def test_dropped_connections_are_continued_and_nothing_is_asked_twice(server, tmp_path):
    server.behaviour = lambda handler: handler.piece(CONTENT, 700_000)
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    starts = [asked for _, asked in server.requests]
    assert starts[0] is None
    assert len(starts) >= 5
    assert all(asked.startswith("bytes=") for asked in starts[1:])
    assert len(set(starts)) == len(starts)


def test_a_later_call_continues_what_an_earlier_one_left(server, tmp_path):
    def dying(handler):
        if handler.begin() >= 1_000_000:
            handler.close_connection = True
        else:
            handler.piece(CONTENT, 500_000)

    server.behaviour = dying
    with pytest.raises(StreamctlError, match=r"a\.bin could not be fetched.*it continues"):
        download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert not (tmp_path / "a.bin").exists()
    held = (tmp_path / ".a.bin.part").stat().st_size
    assert held >= 1_000_000
    server.behaviour, server.requests[:] = lambda handler: handler.piece(CONTENT), []
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert server.requests == [("/a.bin", f"bytes={held}-")]
    assert leftovers(tmp_path) == ["a.bin"]


def test_a_file_that_changed_in_between_begins_anew(server, tmp_path):
    other = CONTENT[::-1]

    def changing(handler):
        if len(server.requests) == 1:
            handler.piece(other, 900_000)
        else:
            handler.piece(CONTENT)

    server.behaviour = changing
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_begins_anew(server, tmp_path):
    def forgetful(handler):
        handler.head(200, len(CONTENT))
        first = len(server.requests) == 1
        handler.wfile.write(CONTENT[: 900_000 if first else None])
        handler.close_connection = True

    server.behaviour = forgetful
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_that_sends_another_piece_than_asked_is_not_believed(server, tmp_path):
    def confused(handler):
        if len(server.requests) == 1:
            handler.piece(CONTENT, 900_000)
        elif len(server.requests) == 2:
            span = f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"
            handler.head(206, len(CONTENT) - 5, Content_Range=span)
            handler.wfile.write(CONTENT[5:])
        else:
            handler.piece(CONTENT)

    server.behaviour = confused
    download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("lie", ["short", "long", "none"])
def test_a_length_that_is_a_lie_never_makes_a_wrong_file(server, tmp_path, lie):
    packed = gzip.compress(CONTENT)

    def lying(handler):
        length = {"short": len(packed) // 2, "long": len(packed) + 999, "none": None}[lie]
        handler.head(200, length)
        handler.wfile.write(packed if lie != "none" else packed[:-20])
        handler.close_connection = True

    server.behaviour = lying
    with pytest.raises(StreamctlError, match=r"cut short or damaged, twice|ended the connection"):
        download([f"{server.url}/a.gz"], tmp_path / "a.gz")
    assert not (tmp_path / "a.gz").exists()


def test_another_content_than_the_owners_is_refused(server, tmp_path):
    server.behaviour = lambda handler: handler.piece(b"x" + CONTENT)
    with pytest.raises(StreamctlError, match=rf"has the checksum \w+ instead of {MD5}, twice"):
        download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert leftovers(tmp_path) == []


def test_the_next_mirror_is_asked_when_one_fails(server, tmp_path):
    def half(handler):
        if handler.path.startswith("/bad"):
            handler.head(404, 0)
        else:
            handler.piece(CONTENT)

    server.behaviour = half
    urls = ["http://127.0.0.1:9/a.bin", f"{server.url}/bad/a.bin", f"{server.url}/good/a.bin"]
    download(urls, tmp_path / "a.bin", MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_being_offline_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "WAIT_S", 0.01)
    with pytest.raises(StreamctlError) as caught:
        download(["http://127.0.0.1:9/a.bin"], tmp_path / "a.bin", MD5)
    text = str(caught.value)
    assert "127.0.0.1:9 cannot be reached (Connection refused)" in text
    assert "https_proxy" in text
    assert f"copy a.bin to {tmp_path}/ by hand" in text
    assert leftovers(tmp_path) == []


def test_a_server_that_stops_sending_does_not_hang_us(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT_S", 0.2)
    release = threading.Event()

    def silent(handler):
        handler.head(200, len(CONTENT))
        release.wait()

    server.behaviour = silent
    try:
        with pytest.raises(StreamctlError, match="timed out"):
            download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    finally:
        release.set()


def test_https_is_not_left_for_http():
    request = downloading.urllib.request.Request("https://example.org/a")
    with pytest.raises(downloading._Failed, match="from https to http"):
        downloading._NoDowngrade().redirect_request(request, None, 302, "", {}, "http://x/a")


def test_a_full_disk_keeps_what_came_and_says_so(server, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloading, "open", Full, raising=False)
    with pytest.raises(StreamctlError, match="cannot be written: No space left on device"):
        download([f"{server.url}/a.bin"], tmp_path / "a.bin", MD5)
    assert not (tmp_path / "a.bin").exists()


def movies(name: str = "ml-1m") -> bytes:
    """A zip like GroupLens's: everything in one folder."""
    ratings = "".join(f"{u}::{i}::5::{1000 + u + i}\n" for u in range(6) for i in range(6))
    titles = "".join(f"{i}::Film {i} (1999)::Drama\n" for i in range(6))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}/", "")
        file.writestr(f"{name}/ratings.dat", ratings)
        file.writestr(f"{name}/movies.dat", titles)
    return buffer.getvalue()


def test_a_fetched_set_prepares_and_is_not_fetched_twice(server, tmp_path):
    packed = movies()
    remote = Remote("ml-1m.zip", (server.url,), hashlib.md5(packed).hexdigest())
    toy, folder = PublicSet("ml-1m", (remote,), "none"), tmp_path / "ml-1m"
    server.behaviour = lambda handler: handler.piece(packed)
    files = fetch(toy, folder)
    assert sorted(path.name for path in files) == ["movies.dat", "ratings.dat"]
    _, log, _ = build(read_source(folder), DataConfig())
    assert len(log) == 36
    assert fetch(toy, folder) == files
    assert len(server.requests) == 1
    (folder / "movies.dat").write_text("another")
    with pytest.raises(StreamctlError, match=r"movies\.dat: the file has changed"):
        fetch(toy, folder)


def test_a_file_put_there_by_hand_is_checked_and_used(server, tmp_path):
    packed = movies()
    remote = Remote("ml-1m.zip", (server.url,), hashlib.md5(packed).hexdigest())
    toy = PublicSet("ml-1m", (remote,), "none")
    (tmp_path / "ml-1m.zip").write_bytes(packed[:-9])
    with pytest.raises(StreamctlError, match=r"ml-1m\.zip: the file has the checksum"):
        fetch(toy, tmp_path)
    (tmp_path / "ml-1m.zip").write_bytes(packed)
    assert len(fetch(toy, tmp_path)) == 2
    assert not server.requests


def archive(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            file.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("../out.txt", 0, "leaves the folder"),
        ("a/../../out.txt", 0, "leaves the folder"),
        ("/etc/out.txt", 0, "leaves the folder"),
        ("a\\..\\..\\out.txt", 0, "leaves the folder"),
        ("C:out.txt", 0, "leaves the folder"),
        ("link", stat.S_IFLNK | 0o777, "is a link"),
        ("pipe", stat.S_IFIFO | 0o666, "is a link or a device"),
        (".lock", 0, "is hidden"),
    ],
)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, name, mode, reason):
    file = archive(tmp_path / "x.zip", {"good.txt": b"good", name: b"/etc/passwd"}, mode)
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    with pytest.raises(StreamctlError, match=reason):
        unpack(file, folder)
    assert leftovers(folder) == []
    assert leftovers(tmp_path) == ["in", "x.zip"]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("streamctl.data.archives.MAX_BYTES", 1000)
    file = archive(tmp_path / "x.zip", {"bomb": bytes(2000)})
    with pytest.raises(StreamctlError, match="unpacks to more than"):
        unpack(file, tmp_path)


def test_a_damaged_archive_leaves_nothing(tmp_path):
    packed = bytearray(movies())
    packed[len(packed) // 3] ^= 255
    (tmp_path / "x.zip").write_bytes(packed)
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(StreamctlError, match="the archive is damaged"):
        unpack(tmp_path / "x.zip", folder)
    assert leftovers(folder) == []


def test_sets_are_found_by_their_category_and_misspelt_ones_named():
    assert find_set("Musical_Instruments").name == "amazon-2023-musical-instruments"
    assert find_set("ml-20m") is SETS["ml-20m"]
    with pytest.raises(UsageError, match="did you mean ml-1m"):
        find_set("ml-1n")
    for public in SETS.values():
        for remote in public.files:
            assert all(url.startswith("https://") for url in remote.urls())


def test_a_ready_made_split_is_read_as_one(tmp_path):
    for split in ("last-out", "timestamp"):
        public = SETS[f"amazon-2023-video-games-{split}"]
        folder = tmp_path / split
        folder.mkdir()
        for remote in public.files:
            header = b"user_id,parent_asin,rating,timestamp\n"
            (folder / remote.name).write_bytes(gzip.compress(header))
        kind, files = find_source(folder)
        assert kind.name == "amazon2023"
        assert [path.name for path in (*files.parts, files.items)] == [
            remote.name for remote in public.files
        ]


def test_the_command_lists_fetches_from_a_mirror_and_says_what_comes_next(server, tmp_path):
    app = typer.Typer()
    app.command()(command)
    call = partial(CliRunner().invoke, app)
    assert "ml-100k" in json.loads(call(["--json"]).stdout)["sets"]
    packed = gzip.compress(b"user_id,parent_asin,rating,timestamp\n")
    server.behaviour = lambda handler: handler.piece(packed)
    answer = call(["Gift_Cards", "--into", str(tmp_path), "--mirror", server.url])
    assert answer.exit_code == 0, answer.output
    assert f"streamctl data prepare {tmp_path}" in answer.stdout
    assert {path for path, _ in server.requests} == {
        "/Gift_Cards.csv.gz", "/meta_Gift_Cards.jsonl.gz",
    }  # fmt: skip
    assert isinstance(call(["ml-1m", "--mirror", "ftp://x"]).exception, UsageError)
