"""The README is true: every command documented, every path there, every figure from a receipt."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from test_cli import commands

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_every_command_is_in_the_readme(words):
    assert f"`streamctl {' '.join(words)}" in README or f"streamctl {' '.join(words)} " in README


def test_the_file_map_names_files_that_exist():
    block = README.split("## File map")[1].split("\n## ")[0]
    paths = re.findall(r"^\| `([^`]+)`", block, flags=re.MULTILINE)
    assert len(paths) > 20
    missing = [path for path in paths if not list(ROOT.glob(path))]
    assert not missing


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_result_tables_are_those_of_the_receipts():
    from benchmarks.readme import PAGES, render

    pages = [(ROOT / page).read_text() for page in PAGES]
    for name, block in render().items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        shown = [text.split(begin)[1].split(end)[0].strip() for text in pages if begin in text]
        assert shown, f"no page has the generated block {name}"
        assert set(shown) == {block.strip()}, f"run `python benchmarks/readme.py` ({name} differs)"


def test_no_generated_block_is_empty_or_without_its_receipt():
    from benchmarks.readme import PAGES, render

    receipts = render()
    for page in PAGES:
        text = (ROOT / page).read_text()
        begun = re.findall(r"<!-- ([\w-]+) -->", text)
        assert begun or page != "README.md"
        for name in begun:
            block = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
            assert block.strip(), f"{page}: the block {name} is empty"
            assert name in receipts, f"{page}: no receipt makes the block {name}"


def test_every_json_file_that_a_page_names_is_a_receipt_or_written_by_the_package():
    source = "".join(path.read_text() for path in (ROOT / "streamctl").rglob("*.py"))
    results, named = ROOT / "benchmarks" / "results", 0
    for page in ("README.md", "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))):
        for name in re.findall(r"([\w./*-]+\.json)(?![\w.])", (ROOT / page).read_text()):
            receipt = name.rpartition("results/")[2].lstrip("/")
            there = list(results.glob(receipt))
            written = "results/" not in name and name in source
            assert there or written, f"{page} names {name}, which no command has written"
            named += bool(there)
    assert named >= 8


def test_every_promise_points_to_tests_and_receipts_that_are_there():
    rows = README.split("| promise | tested by |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 15
    for row in rows:
        proof = row.split(" | ", 1)[1]
        files = re.findall(r"`(?:python )?((?:tests|benchmarks|\.ci)/[\w/]+\.py)", proof)
        receipts = re.findall(r"`(?:results/)?(\w+\.json)`", proof)
        assert any(name.startswith(("tests/", "benchmarks/")) for name in files), row
        for name in (*files, *(f"benchmarks/results/{receipt}" for receipt in receipts)):
            assert (ROOT / name).is_file(), f"{name} is not there: {row}"
