"""The faster of two ways is found once and remembered; compiled code is waited for or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from streamctl.kernels import KernelError, choice, compiled, nearest_codeword

from benchmarks.cases import random_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(choice.places, "folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "_answers", {})
    return tmp_path


def ways(counts, **seconds):
    def run(name):
        counts[name] = counts.get(name, 0) + 1
        time.sleep(seconds[name])

    return {name: lambda name=name: run(name) for name in seconds}


def test_the_faster_way_is_taken_and_remembered_by_the_next_process(folder, monkeypatch):
    counts = {}
    both = ways(counts, usual=0.02, other=0.002)
    assert choice.fastest("work", both) == "other"
    assert counts["usual"] >= 3
    counts.clear()
    monkeypatch.setattr(choice, "_answers", {})  # as the next process begins
    assert choice.fastest("work", both) == "other" and not counts
    assert list(json.loads((folder / "choices.json").read_text()).values()) == ["other"]


def test_the_usual_way_stays_unless_another_is_clearly_faster(folder):
    assert choice.fastest("work", ways({}, usual=0.0105, other=0.010)) == "usual"


def test_what_another_process_has_found_meanwhile_holds_for_both(folder):
    def meanwhile():
        key = f"{choice.machine()} work"
        (folder / "choices.json").write_text(json.dumps({key: "usual"}))

    both = {"usual": lambda: time.sleep(0.01), "other": meanwhile}
    assert choice.fastest("work", both) == "usual"


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_memory_is_measured_again(folder, text):
    (folder / "choices.json").write_text(text)
    assert choice.fastest("work", ways({}, usual=0.01, other=0.001)) == "other"


def test_where_nothing_can_be_written_the_answer_is_kept_in_memory(monkeypatch):
    monkeypatch.setattr(choice.places, "folder", lambda: None)
    monkeypatch.setattr(choice, "_answers", {})
    counts = {}
    both = ways(counts, usual=0.01, other=0.001)
    assert choice.fastest("work", both) == "other"
    counts.clear()
    assert choice.fastest("work", both) == "other" and not counts


def test_an_unknown_mode_of_compiling_is_refused(monkeypatch):
    monkeypatch.setenv("STREAMCTL_COMPILE", "later")
    with pytest.raises(KernelError, match="known: wait, cached, never"):
        compiled.ready()


@pytest.mark.parametrize(("kept", "used"), [(None, True), ("other", False), ("mine", True)])
def test_a_server_uses_what_is_compiled_and_compiles_where_nothing_can_be_kept(
    tmp_path, monkeypatch, kept, used
):
    monkeypatch.setenv("STREAMCTL_COMPILE", "cached")
    monkeypatch.setattr(compiled, "_found", compiled._found.__wrapped__)
    monkeypatch.setattr(compiled, "_marker", lambda: kept and tmp_path / kept)
    (tmp_path / "mine").touch()
    assert compiled.ready() is used


@pytest.mark.parametrize(("rows", "width", "codewords"), [(256, 256, 1024), (4096, 32, 256)])
def test_the_nearest_codeword_takes_no_longer_than_plain_torch(rows, width, codewords):
    """At annotation's shape (the first) and the tokenizer's, noise and another machine allowed."""
    x, codebooks = random_rows(rows, width, 1, codewords)
    codebook = codebooks[0]

    def plain():
        bias = codebook.square().sum(1)
        return torch.addmm(bias, x, codebook.T, alpha=-2).argmin(1)

    ways = {"ours": lambda: nearest_codeword(x, codebook), "plain torch": plain}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(6):  # what else the machine does passes
        best = {name: min(best[name], took) for name, took in choice.times(ways).items()}
        if best["ours"] <= 1.15 * best["plain torch"]:
            return
    pytest.fail(f"slower than plain torch: {best}")


PROGRAM = """
import torch
from benchmarks.cases import random_beams, random_items
from streamctl.kernels import compiled, trie_topk
from streamctl.model.backbone import BackboneConfig, Decoder, Encoder
torch.manual_seed(0)
config = BackboneConfig(8, 8, 4, 2, 16, 1, 1)
encoder = Encoder(config).eval()
with torch.no_grad():
    print(float(encoder(torch.ones(2, 3, 8)).sum()))
case = random_beams(random_items(9, 2, 3), 2, 2, 1, 9, 2)
print(float(trie_topk(*case[:5])[0].sum()))
print(compiled.ready())
"""


def test_answers_do_not_wait_for_the_compiler_unless_they_are_to(tmp_path):
    found = {}
    for mode in ("never", "cached", "wait"):
        environment = {**os.environ, "STREAMCTL_COMPILE": mode}
        if mode != "wait":  # an empty cache
            environment |= {"STREAMCTL_CACHE": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
        answer = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment,
            cwd=ROOT,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        *numbers, ready = answer.stdout.splitlines()
        assert ready == str(mode == "wait")
        found[mode] = [float(number) for number in numbers]
    for mode in ("never", "cached"):
        assert found[mode] == pytest.approx(found["wait"], abs=1e-4)
