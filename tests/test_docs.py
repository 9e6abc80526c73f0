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
    from benchmarks.readme import render

    for name, block in render().items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        assert begin in README, f"README lacks the generated block {name}"
        shown = README.split(begin)[1].split(end)[0].strip()
        assert shown == block.strip(), f"run `python benchmarks/readme.py` ({name} differs)"
