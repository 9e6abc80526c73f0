"""Imports go downward: a layer is one folder, and nothing imports in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Lowest first. A file of the package's own folder is a layer by itself.
LAYERS = (
    "cache", "checkpoint", "errors", "progress", "distributed", "device", "files", "config",
    "provenance", "stage", "runs",
    "kernels", "data", "tokenizer", "retrieval", "ranking", "model", "decode", "training", "rerank",
    "baselines", "evaluation", "pipeline", "recommender", "bulk", "api", "serving", "commands",
    "cli", "__init__", "__main__",
)  # fmt: skip


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted names of all files of the package; those of kernels/ are installed below it."""
    found = {}
    for folder, prefix in (
        (root / "streamctl", "streamctl"),
        (root / "kernels", "streamctl.kernels"),
    ):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, in functions and for types, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in known)


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    place = {name: number for number, name in enumerate(LAYERS)}
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if place[layer(other)] > place[layer(name)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, if there is any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_folder_is_a_layer_and_every_layer_is_there(graph):
    there = {layer(name) for name in graph}
    assert there == set(LAYERS)


def test_no_layer_imports_one_above_it(graph):
    assert not upward(graph)


def test_no_files_import_one_another_in_a_circle(graph):
    assert not circle(graph)


def test_the_page_s_modules_are_a_tree_of_imports():
    page = {path.name: path.read_text() for path in (ROOT / "streamctl/serving/page").glob("*.js")}
    graph = {name: {*re.findall(r"""from ["']\./(.+?)["']""", text)} for name, text in page.items()}
    assert {name for names in graph.values() for name in names} <= set(page)
    assert graph["main.js"] and not circle(graph)


def test_a_wrong_import_would_be_seen():
    assert upward({"streamctl.model.policy": {"streamctl.training.loop"}})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
