"""The docs are true: every block runs, every link leads somewhere, every figure has a receipt."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from test_cli import commands

from benchmarks.readme import PAGES, markdown, render
from docs import draw
from streamctl import cli
from streamctl.data.synthetic import synthesize
from streamctl.errors import close_matches

README = (ROOT / "README.md").read_text()
DOCS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md",
                 *sorted(ROOT.glob("docs/*.md")))
}  # fmt: skip
COMMANDS = {words: command for words, command in commands()}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """What blocks and code spans say to run of streamctl, without comments."""
    spans = re.findall(r"`(streamctl [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for _, content in blocks(text):
        joined = content.replace("\\\n", " ")
        spans += re.findall(r"(?:^|-m -- |&& )(streamctl .+?)(?=$| && )", joined, flags=re.M)
    return [re.sub(r"\s+#.*| &$|\.\.\.$", "", " ".join(span.split())) for span in spans]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_is_in_the_readme(words):
    assert f"`streamctl {' '.join(words)}`" in README


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_has_an_example_that_its_options_allow(words):
    found = re.search(r"Example: `streamctl (.+?)`", COMMANDS[words].help.replace("\n", " "))
    assert found, f"{' '.join(words)} has no example in its help"
    given = shlex.split(found[1])
    assert tuple(given[: len(words)]) == words
    parse(words, given[len(words) :])


def parse(words: tuple[str, ...], given: list[str]) -> None:
    """Read a command line as click does, without running it.

    Raises:
        click.UsageError: an unknown option, a missing argument, a wrong value.
    """
    command = COMMANDS[words]
    arguments = command.make_parser(command.make_context("x", [], resilient_parsing=True))
    values, rest, _ = arguments.parse_args(list(given))
    assert not rest, rest
    needed = [one.name for one in command.params if one.required]
    assert not [name for name in needed if values.get(name) is None], f"{given}: needs {needed}"


@pytest.mark.parametrize("page", list(DOCS))
def test_the_command_lines_of_every_page_are_commands_with_such_options(page):
    for line in lines(DOCS[page]):
        given = shlex.split(line)[1:]
        if not given or given[0].startswith("-"):
            continue
        words = next((w for w in COMMANDS if tuple(given[: len(w)]) == w), None)
        assert words or given == ["data"], (
            f"{page}: {line}: {close_matches(given[0], [' '.join(w) for w in COMMANDS])}"
        )
        if any(option.startswith("-") for option in given) and "..." not in line:
            parse(words, given[len(words) :])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with sales.csv and goods.csv, as the README has them."""
    from streamctl.data import load_data
    from streamctl.runs import RunDir

    folder = tmp_path_factory.mktemp("readme")
    run = RunDir(folder / "made")
    synthesize(run, users=80, items=40, seed=0)
    catalog, split = load_data(run)
    with open(folder / "goods.csv", "w", newline="") as file:
        names = {item: f"i{number}" for number, item in enumerate(catalog.ids)}
        csv.writer(file).writerows(
            [["item_id", "title"], *zip(names.values(), catalog.titles, strict=True)]
        )
    with open(folder / "sales.csv", "w", newline="") as file:
        rows = [["user_id", "item_id", "timestamp"]]
        for user in range(split.log.n_users):
            for time, item in enumerate(split.log.of(user).tolist()):
                rows.append([f"u{user}", f"i{item}", 1_700_000_000 + time])
        csv.writer(file).writerows(rows)
    return folder


# In the place of `streamctl run`, whose stages take minutes and have tests of their own.
QUICK = (
    "streamctl tokenize --run {run} --encoder tfidf --set epochs=2 --set codes=16 --set levels=2",
    "streamctl baseline transitions --run {run}",
    "streamctl eval --run {run} --methods popularity,transitions --set bootstrap=20",
)


def call(line: str, monkeypatch, capsys) -> str:
    """What a command line prints, which has to succeed."""
    monkeypatch.setattr("sys.argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code, f"{line}: {err}"
    return out


def test_the_sixty_seconds_in_the_terminal_run(shop, monkeypatch, capsys):
    content = next(text for language, text in blocks(README) if language == "sh")
    monkeypatch.chdir(shop)
    doctor, prepare, run, recommend = content.strip().splitlines()
    examined = call(doctor, monkeypatch, capsys)
    assert "data prepare sales.csv --items goods.csv --run runs/sales" in examined
    assert "Next: streamctl tokenize --run runs/mine" in call(prepare, monkeypatch, capsys)
    words = shlex.split(run, comments=True)
    parse(("run",), words[2:])
    for line in QUICK:
        call(line.format(run="runs/mine"), monkeypatch, capsys)
    assert "Recommended" in call(recommend, monkeypatch, capsys)


def test_the_sixty_seconds_in_python_run(shop, monkeypatch, capsys):
    content = next(text for language, text in blocks(README) if language == "python")
    fit = next(line for line in content.splitlines() if "sc.fit(" in line)
    monkeypatch.chdir(shop)
    code = content.replace("runs/mine", "runs/python")
    before, after = code.split(fit)
    (shop / "first.py").write_text(before, encoding="utf-8")
    (shop / "second.py").write_text("import streamctl as sc\nrun = 'runs/python'\n" + after)
    runpy.run_path(str(shop / "first.py"))
    for line in QUICK:
        call(line.format(run="runs/python"), monkeypatch, capsys)
    runpy.run_path(str(shop / "second.py"))
    assert "title" in capsys.readouterr().out


@pytest.mark.parametrize("page", list(DOCS))
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", DOCS[page]):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (folder / path).exists(), f"{page}: {target}"
        if anchor:
            text = DOCS[str((folder / path).resolve().relative_to(ROOT))] if path else DOCS[page]
            heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
                     for head in heads}  # fmt: skip
            assert anchor in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", list(DOCS))
def test_files_that_a_page_names_are_there(page):
    for name in re.findall(  # not what is made on the way
        r"`((?:streamctl|kernels|tests|benchmarks|docs|\.ci)/[\w/.*-]+)`", DOCS[page]
    ):
        name = name.replace("NAME", "*").replace("/__pycache__", "")
        assert list(ROOT.glob(name.rstrip("/"))), f"{page} names {name}"


@pytest.fixture(scope="module")
def rendered():
    return render()


def test_result_tables_are_those_of_the_receipts(rendered):
    pages = [(ROOT / page).read_text() for page in PAGES]
    for name, block in rendered.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        shown = [text.split(begin)[1].split(end)[0].strip() for text in pages if begin in text]
        assert shown, f"no page has the generated block {name}"
        assert set(shown) == {block.strip()}, f"run `python benchmarks/readme.py` ({name} differs)"


def test_no_generated_block_is_empty_or_without_its_receipt(rendered):
    for page in PAGES:
        text = (ROOT / page).read_text()
        begun = re.findall(r"<!-- ([\w-]+) -->", text)
        assert begun, page
        for name in begun:
            block = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
            assert block.strip(), f"{page}: the block {name} is empty"
            assert name in rendered, f"{page}: no receipt makes the block {name}"


def test_pictures_are_those_of_the_script_and_the_receipts():
    for name, picture in draw.pictures().items():
        path = ROOT / "docs" / "img" / name
        assert path.read_text() == picture, f"run `python benchmarks/readme.py` ({name} differs)"
        assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_four_decimals_in_the_readme_stand_in_generated_blocks():
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", README, flags=re.DOTALL)
    assert not re.findall(r"(?<!\d)0?\.\d{4}\b", text)
    assert markdown(["a"], [["1"]]) == "| a |\n| --- |\n| 1 |"


def test_every_json_file_that_a_page_names_is_a_receipt_or_written_by_the_package():
    source = "".join(path.read_text() for path in (ROOT / "streamctl").rglob("*.py"))
    results, named = ROOT / "benchmarks" / "results", 0
    for page, text in DOCS.items():
        for name in re.findall(r"([\w./*-]+\.json)(?![\w.])", text):
            receipt = name.rpartition("results/")[2].lstrip("/")
            there = list(results.glob(receipt))
            written = "results/" not in name and name in source
            assert there or written, f"{page} names {name}, which no command has written"
            named += bool(there)
    assert named >= 6


def test_every_receipt_is_used_by_a_page():
    text = "".join(DOCS.values())
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        kind = path.stem.split("-")[0]
        assert kind in ("thinker", "table") or path.stem in text, f"no page uses {path.name}"


def test_every_promise_points_to_tests_and_receipts_that_are_there():
    text = DOCS["docs/contributing.md"]
    rows = text.split("| promise | tested by |")[1].split("\n\n")[0].strip().splitlines()[1:]
    assert len(rows) >= 15
    for row in rows:
        proof = row.split(" | ", 1)[1]
        files = re.findall(r"`(?:python )?((?:tests|benchmarks|\.ci)/[\w/]+\.py)", proof)
        receipts = re.findall(r"`(?:results/)?(\w+\.json)`", proof)
        assert any(name.startswith(("tests/", "benchmarks/")) for name in files), row
        for name in (*files, *(f"benchmarks/results/{receipt}" for receipt in receipts)):
            assert (ROOT / name).is_file(), f"{name} is not there: {row}"
