"""The tokenizer of an older run for a newer catalogue: items of both keep their codes."""

from __future__ import annotations

import shutil
from collections import defaultdict

import numpy as np

from streamctl.config import TokenizeConfig, resolve
from streamctl.data import Catalog
from streamctl.errors import StreamctlError
from streamctl.runs import RunDir, Stage
from streamctl.tokenizer.neighbours import VECTORS, neighbours
from streamctl.tokenizer.semantic_ids import SemanticIds
from streamctl.tokenizer.stage import lc_rec_index
from streamctl.tokenizer.tokenizer import Tokenizer

_MADE = {VECTORS, "codes.npy", "neighbours.npy", "collaborative.npy", "index.json", "report.json"}


def extend(old: RunDir, run: RunDir) -> Stage:
    """Make the tokenizer stage of a run from an older run's.

    Items that both know keep codes and vectors; new ones get theirs from their text by the old
    encoder and codebooks, with the last code moved to the nearest that is free under their prefix.

    Raises:
        StreamctlError: no item is in both catalogues, a stage is missing, or the run has a
            tokenizer of its own.
    """
    source = old.require("tokenizer")
    before = Catalog.load(old.require("data"))
    catalog = Catalog.load(run.require("data"))
    config = resolve(TokenizeConfig, base=source.manifest["config"])
    place = {item: number for number, item in enumerate(before.ids)}
    known = np.array([place.get(item, -1) for item in catalog.ids])
    if not (known >= 0).any():
        raise StreamctlError(
            f"no item of {run.path} is in {old.path}: there is nothing to go on from",
            run=run.command("tokenizer"),
        )
    with run.begin("tokenizer", config, parents=["data"]) as stage:
        if stage is None:
            return run.stage("tokenizer")
        ids = SemanticIds.load(source)
        fresh = np.flatnonzero(known < 0)
        codes = np.zeros((len(known), ids.levels), np.int64)
        codes[known >= 0] = ids.codes[known[known >= 0]]
        rows = source.array(VECTORS)
        vectors = np.zeros((len(known), rows.shape[1]), np.float32)
        vectors[known >= 0] = rows[known[known >= 0]]
        if len(fresh):
            tokenizer = Tokenizer.load(source)
            texts = [catalog.texts[item] for item in fresh]
            vectors[fresh] = tokenizer.vectors(texts)
            book = source.array("codebooks.npy")[-1]
            taken: dict[tuple[int, ...], set[int]] = defaultdict(set)
            for *prefix, last in ids.codes.tolist():
                taken[tuple(prefix)].add(last)
            for item, learned in zip(fresh, tokenizer.encode(texts).tolist(), strict=True):
                others = taken[tuple(learned[: ids.levels - 1])]
                codes[item] = ids.nearest_free(learned, book, others)
                others.add(int(codes[item, -1]))
        if "collaborative.npy" in source.manifest["artifacts"]:
            together = source.array("collaborative.npy")
            extended = np.zeros((len(known), together.shape[1]), np.float32)
            extended[known >= 0] = together[known[known >= 0]]
            stage.save_array("collaborative.npy", extended)
        for name in sorted(source.manifest["artifacts"].keys() - _MADE):
            shutil.copyfile(source.file(name), stage.path / name)
            stage.adopt(name)
        stage.save_array(VECTORS, vectors)
        stage.save_array("codes.npy", codes)
        stage.save_array("neighbours.npy", neighbours(vectors, config.neighbours)[0])
        stage.save_json("index.json", lc_rec_index(catalog.ids, codes))
        extended_ids = SemanticIds(codes, ids.sizes, ids.dedup, ids.details)
        stage.save_json("report.json", extended_ids.report())
        stage.publish(extended_from=source.hash, new_items=len(fresh))
    return run.stage("tokenizer")
