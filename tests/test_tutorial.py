"""The notebook runs as it stands."""

from __future__ import annotations

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

import streamctl as sc


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(str(output.get("data", "")) for output in cell.outputs) for cell in code]
    for wanted, part in (("rec.recommend(", "item_id"), ("recommend_many", "nobody"),
                         (".explain(", "reason"), ("rec.similar", "alike"),
                         ("run.results", "stream_sft")):  # fmt: skip
        shown = [text for cell, text in zip(code, texts, strict=True) if wanted in cell.source]
        assert shown and all(part in text for text in shown), wanted
    # What answers is what won on validation users.
    run = sc.Run(tmp_path / "runs" / "tutorial")
    best = [row["method"] for row in run.results.to_pylist() if row["best"]]
    assert best == [sc.load(run).method]
