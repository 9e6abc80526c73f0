"""Machines as they are: any locale, no home, no locks; texts with brackets come out as they are."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from streamctl import files, progress
from streamctl.commands.options import print_json, print_table
from streamctl.config import DataConfig, TokenizeConfig, resolve
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir

TITLES = ["杭州特级绿茶", "ชาเขียว", "café [draft] [/b]", "🍵 :tea:", "чай", "naïve"]


def without_encoding(path: Path) -> list[int]:
    """Lines on which a file is opened as text in the locale's encoding."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = [ast.unparse(part) for part in (*node.args, *node.keywords)]
        plain_open = isinstance(node.func, ast.Name) and name == "open"
        binary = any("b" in word and len(word) < 6 for word in words[1:])
        text = name in ("read_text", "write_text") or (plain_open and not binary)
        if text and not any("encoding" in word for word in words):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", ["streamctl", "kernels"])
def test_every_text_file_is_utf_8_whatever_the_locale(folder):
    found = {path: without_encoding(path) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path): lines for path, lines in found.items() if lines}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A shop prepared and tokenized by a process whose locale knows ASCII alone."""
    folder = tmp_path_factory.mktemp("foreign")
    items = [{"item_id": f"i{n}", "title": TITLES[n % 6] + f" {n}"} for n in range(12)]
    (shop := folder / "shop").mkdir()
    (shop / "items.jsonl").write_text(
        "\n".join(json.dumps(item, ensure_ascii=False) for item in items), encoding="utf-8"
    )
    rows = [f"u{user},i{(user * step) % 12},{step}" for user in range(9) for step in range(1, 8)]
    (shop / "interactions.csv").write_text(
        "user_id,item_id,timestamp\n" + "\n".join(rows), encoding="utf-8"
    )
    program = (
        "import sys; from streamctl.cli import main\n"
        "for words in (['data', 'prepare', 'shop', '--run', 'run',"
        " '--min-user', '3', '--min-item', '0'],"
        " ['tokenize', '--run', 'run', '--encoder', 'tfidf', '--set', 'tokenize.epochs=2']):\n"
        "    sys.argv = ['streamctl', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end\n"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, env=os.environ | locale
    )
    assert answer.returncode == 0, answer.stderr.decode()
    return folder / "run"


def test_a_run_made_under_another_locale_is_read_here_and_keeps_its_words(foreign):
    from streamctl.data import Catalog
    from streamctl.tokenizer.tokenizer import Tokenizer

    run = RunDir(foreign)
    catalog = Catalog.load(run.require("data"))
    assert {title.rpartition(" ")[0] for title in catalog.titles} == set(TITLES)
    stage = run.require("tokenizer")
    assert Tokenizer.load(stage).vectors(["杭州特级绿茶"]).any()
    assert set(stage.json("index.json")) == set(catalog.ids)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "gbk", "utf-8"])
def test_printing_degrades_and_never_raises(encoding):
    program = (
        "import sys; from streamctl import cli, progress; from streamctl.commands import options\n"
        "from streamctl.errors import StreamctlError\n"
        f"titles = {TITLES!r}\n"
        "def app():\n"
        "    progress.say(' '.join(titles)); progress.warn(titles[0])\n"
        "    options.print_json(titles); raise StreamctlError(titles[0], where=titles[3])\n"
        "cli.build_app = lambda: app\n"
        "cli.main()"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert answer.returncode == 1 and b"Traceback" not in answer.stderr, answer.stderr
    assert json.loads(answer.stdout.decode(encoding)) == TITLES
    assert "error: " in answer.stderr.decode(encoding)


@pytest.mark.parametrize("text", ["[draft]", "[/b]", "[bold red]x[/]", ":smile:", "[link=a]b"])
def test_brackets_and_colons_are_printed_as_they_are(text, capsys, monkeypatch):
    monkeypatch.setattr(progress, "console", progress.plain_console(stderr=True, width=200))
    progress.say(f"runs/{text}")
    progress.warn(text)
    print_table(text, [text, "n"], [[text, 1]])
    with progress.progress_bar(text, 3) as bar:
        bar.advance(3)
    print_json({text: text})
    out, err = capsys.readouterr()
    assert f"runs/{text}" in err and f"warning: {text}" in err
    assert out.count(text) == 5


@pytest.mark.parametrize("text", ["[draft]", "[/b]"])
def test_a_command_takes_a_run_with_brackets_in_its_name(streamctl, tmp_path, text):
    answer = streamctl("tokenize", "--run", f"no{text}", cwd=tmp_path)
    assert answer.returncode == 1 and f"no{text}: no such run" in answer.stderr
    assert f"'no{text}'" in answer.stderr, "the command to run next"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    number, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunDir(tmp_path / "run").begin("data", DataConfig()) as stage:
        stage.save_json("report.json", {})
        stage.publish()
    assert RunDir(tmp_path / "run").require("data").complete
    assert "has no locks" in capsys.readouterr().err


def test_any_other_fault_of_a_lock_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    busy = StreamctlError("another process is here")
    with pytest.raises(OSError, match="Input/output"), files.locked(tmp_path / "x", busy):
        pass


def test_a_folder_that_cannot_be_synced_still_gets_its_file(tmp_path, monkeypatch):
    sync = os.fsync

    def only_files(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(number)

    monkeypatch.setattr(os, "fsync", only_files)
    with files.atomic_file(tmp_path / "a.txt") as path:
        path.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_compiled_code_works_where_neither_installation_nor_home_can_be_written(tmp_path):
    site = tmp_path / "site" / "streamctl"
    site.mkdir(parents=True)
    for name in ("__init__.py", "cache.py"):
        shutil.copy(ROOT / "streamctl" / name, site)
    (site / "sums.py").write_text(
        "import numba\n\n\n@numba.njit(cache=True)\ndef twice(x):\n    return 2 * x\n"
    )
    for folder in (site, site.parent):
        (folder / "__pycache__").write_text("a file, so that nobody can write below")
    (tmp_path / "tmp").mkdir()
    program = "from streamctl.sums import twice; print(twice(21)); import os; "
    program += "print(os.environ['NUMBA_CACHE_DIR'])"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null/nobody",
        "XDG_CACHE_HOME": "/dev/null/cache",
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(site.parent),
    }
    for _ in range(2):  # and once more, with what the first left
        answer = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert answer.returncode == 0, answer.stderr
        result, folder = answer.stdout.split()
        assert result == "42"
        assert Path(folder).is_relative_to(tmp_path / "tmp")
        assert not Path(folder).stat().st_mode & 0o022


def test_somebody_elses_cache_is_not_trusted(tmp_path, monkeypatch):
    from streamctl import cache

    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert not cache._writable(open_to_all)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not cache._writable(tmp_path)


def test_json_that_is_not_text_says_so(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(StreamctlError, match="UTF-8"):
        files.read_json(path)


@pytest.mark.parametrize(
    ("done", "seconds", "pace"),
    [
        (30, 120, "4.0 s/step"),
        (6, 4, "1.5 steps/s"),
        (5000, 4, "1,250 steps/s"),
        (0, 1, "starting"),
    ],
)
def test_progress_names_the_pace_of_slow_and_of_fast_steps(
    monkeypatch, capsys, done, seconds, pace
):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.progress_bar("sft", 10_000) as bar:
        bar.started -= seconds
        bar.advance(done)
    assert pace in capsys.readouterr().err


def test_a_command_that_is_asked_to_end_says_that_it_can_go_on():
    program = (
        "import os, signal, time; from streamctl import cli\n"
        "cli.build_app = lambda: lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))\n"
        "cli.main()"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 130
    assert answer.stderr == "interrupted: the same command continues\n"


def test_an_error_ends_with_one_period():
    assert str(StreamctlError("it said no.", run="again")) == "it said no. Next: again"


def test_a_table_of_another_stage_is_read_for_mistakes_too(tmp_path):
    (tmp_path / "typo.toml").write_text("[pretrain]\nepocs = 2\n")
    with pytest.raises(UsageError, match=r"unknown key 'epocs' of \[pretrain\].* epochs"):
        resolve(TokenizeConfig, file=tmp_path / "typo.toml")
