"""The stage tokenizer: its settings, what it writes, collaborative vectors, and its resumption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tokenizer import SMALL

from streamctl.config import TokenizeConfig
from streamctl.data import Catalog, Split, load_data, synthesize
from streamctl.data.log import InteractionLog
from streamctl.errors import StreamctlError, UsageError
from streamctl.runs import RunDir, StageWriter
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer import vectors as unit_vectors
from streamctl.tokenizer.collaborative import join, taken_together
from streamctl.tokenizer.rqkmeans import kmeans
from streamctl.tokenizer.semantic_ids import collision_rate
from streamctl.tokenizer.stage import choose_codes, tokenize
from streamctl.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("items", "change", "error", "message"),
    [
        (100, {"levels": 1, "codes": 64}, StreamctlError, "--levels 2"),
        (10**6, {"levels": 2, "codes": 32}, StreamctlError, "--levels 4"),
        (10**6, {"levels": 8}, UsageError, "more than can be numbered"),
    ],
)
def test_settings_that_cannot_name_the_items_are_refused(items, change, error, message):
    with pytest.raises(error, match=message):
        choose_codes(items, TokenizeConfig(**change))


def test_a_small_catalogue_gets_fewer_codes_and_says_so(capsys):
    assert choose_codes(200, TokenizeConfig(codes=256)) == 32
    assert "tokenize.codes=32" in " ".join(capsys.readouterr().err.split())
    assert choose_codes(12, TokenizeConfig(codes=256, levels=2)) == 4
    capsys.readouterr()
    assert choose_codes(1024, TokenizeConfig(codes=256)) == 256
    assert not capsys.readouterr().err


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("tokenize") / "run")
    synthesize(run, users=60, items=200, seed=1)
    return run


def copy_of(shop: RunDir, path) -> RunDir:
    shutil.copytree(shop.path / "data", path / "data")
    return RunDir(path)


@pytest.mark.parametrize("change", [{}, {"method": "rqkmeans", "collisions": "dedup"}])
def test_the_stage_writes_what_later_stages_read(shop, tmp_path, change):
    stage = tokenize(copy_of(shop, tmp_path), replace(SMALL, **change), device="cpu")
    ids = SemanticIds.load(stage)
    dedup = bool(change)
    assert ids.codes.shape == (200, 3 + dedup)
    assert (ids.levels, ids.sizes[:3]) == (3 + ids.dedup, (8, 8, 8))
    assert collision_rate(ids.codes) == 0.0
    assert ids.report() == stage.json("report.json")
    assert ids.report()["quantizer"]["reconstruction_error"] < 1
    assert stage.array("codebooks.npy").shape[:2] == (3, 8)
    vectors = stage.array("item_vectors.npy")
    assert vectors.shape == (200, 16)
    rows = unit_vectors(RunDir(stage.root))
    assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert np.allclose(rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5)
    assert stage.array("neighbours.npy").shape == (200, 50)

    catalog = Catalog.load(RunDir(stage.root).stage("data"))
    index = stage.json("index.json")
    assert index[catalog.ids[3]][1] == f"<b_{ids.codes[3, 1]}>"
    tokenizer = Tokenizer.load(stage)
    codes = tokenizer.encode(catalog.texts)
    changed = (codes != ids.codes[:, :3]).any(1)
    assert changed.sum() == ids.report()["moved"]
    assert tokenizer.encode([]).shape == (0, 3)
    assert np.allclose(tokenizer.vectors(catalog.texts[:5]), vectors[:5], atol=1e-4)
    assert tokenizer.encode(["a text of words nobody knows: qwxz"]).shape == (1, 3)


@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_a_collaborative_tokenizer_gives_new_items_codes_too(shop, tmp_path, method):
    settings = replace(SMALL, method=method, collaborative=1.0)
    stage = tokenize(copy_of(shop, tmp_path), settings, device="cpu")
    assert SemanticIds.load(stage).codes.shape == (200, 3)
    assert Tokenizer.load(stage).encode(["walnut desk", "brass lamp"]).shape == (2, 3)


def test_what_is_taken_together_shares_its_first_code():
    random = np.random.default_rng(0)
    groups = np.arange(80) // 10
    taken = [random.choice(np.flatnonzero(groups == number % 8), 6) for number in range(400)]
    offsets = 6 * np.arange(401)
    log = InteractionLog(np.concatenate(taken).astype(np.int32), offsets, [""] * 400, None)
    together = taken_together(Split(log, n_items=80), 0)
    text = random.standard_normal((80, 16)).astype(np.float32)

    def purity(weight: float) -> float:
        joined = torch.from_numpy(join(text, together, weight))
        first = torch.cdist(joined, kmeans(joined, 8, 20, 0)).argmin(1).numpy()
        same = first[:, None] == first
        return float((groups[:, None] == groups)[same].mean())

    assert purity(0.0) < 0.3 and purity(2.0) > 0.9


def test_collaborative_vectors_read_training_interactions_alone(shop):
    split = load_data(shop)[1]
    log = split.log
    changed = log.items.copy()
    for last in (1, 2):
        changed[log.offsets[1:] - last] = changed[log.offsets[1:] - last][::-1]
    assert not np.array_equal(changed, log.items)
    other = Split(replace(log, items=changed), split.history, split.n_items)
    assert np.array_equal(taken_together(split, 0), taken_together(other, 0))


def test_items_without_company_have_no_collaborative_vector(shop):
    split = load_data(shop)[1]
    larger = Split(split.log, split.history, split.n_items + 3)
    vectors = taken_together(larger, 0)
    assert (vectors[-3:] == 0).all() and np.abs(vectors[:-3]).sum() > 0


class Killed(BaseException):
    pass


def test_a_stage_stopped_at_any_checkpoint_ends_bit_identical(shop, tmp_path, monkeypatch):
    import streamctl.tokenizer.stage as stage_module

    monkeypatch.setattr(stage_module, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(stage_module, "TEXTS_A_CHUNK", 64)
    expected = tokenize(copy_of(shop, tmp_path / "whole"), SMALL, device="cpu")
    run = copy_of(shop, tmp_path / "stopped")
    save = StageWriter.save_checkpoint
    phases = set()

    def save_then_stop(self, tensors, meta):
        save(self, tensors, meta)
        phases.add(meta["phase"])
        raise Killed

    monkeypatch.setattr(StageWriter, "save_checkpoint", save_then_stop)
    for _ in range(40):
        try:
            stage = tokenize(run, SMALL, device="cpu")
            break
        except Killed:
            assert not run.stage("tokenizer").complete
    assert phases == {"texts", "encoded", "rqvae"}
    assert stage.manifest["artifacts"] == expected.manifest["artifacts"]
    records = (stage.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in records] == list(range(1, SMALL.epochs + 1))
