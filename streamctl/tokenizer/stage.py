"""The tokenizer stage: every item's vector, Semantic ID and neighbours."""

from __future__ import annotations

import math
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamctl.config import TokenizeConfig
from streamctl.data import Catalog, Split, load_data
from streamctl.device import derive_seed, resolve_device
from streamctl.errors import StreamctlError, UsageError, count_of
from streamctl.files import disk_errors, file_hash
from streamctl.progress import progress_bar, say, warn
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer.collaborative import join, taken_together
from streamctl.tokenizer.collisions import dedup_digit, reassign
from streamctl.tokenizer.encoders import SentenceEncoder
from streamctl.tokenizer.inputs import OwnVectors, read_semantic_ids
from streamctl.tokenizer.neighbours import VECTORS, neighbours, unit
from streamctl.tokenizer.projection import Projection
from streamctl.tokenizer.rqkmeans import RQKMeans
from streamctl.tokenizer.rqvae import RQVAE, RQVAETrainer
from streamctl.tokenizer.semantic_ids import SemanticIds, describe
from streamctl.tokenizer.tfidf import TfidfEncoder
from streamctl.tokenizer.tokenizer import Quantized, quantize

ITEMS_A_CODE = 4  # below this many items a code, k-means only copies the items
HEALTHY_USAGE = 0.95
DIVERGED = 2.0  # reconstruction error, of the variance; predicting the mean has 1
PAIRS = 20_000  # of items taken in one go, whose likeness is compared with chance
STEPS = 5  # apart at most
SURELY = 3.0  # standard errors
CHECKPOINT_S = 20.0
TEXTS_A_CHUNK = 4096  # texts encoded between two checkpoints at the closest
_ENCODED = (VECTORS, "projection.safetensors", "encoder.json", "tfidf.safetensors")

State = tuple[dict[str, torch.Tensor], dict[str, Any]]  # of a checkpoint: tensors, meta


def tokenize(
    run: RunDir, config: TokenizeConfig, *, device: str = "auto", force: bool = False
) -> Stage:
    """Text -> vectors -> Semantic IDs, and each item's nearest by text (Eqs. 4-8).

    The vectors are those of `vectors` where the user brings some, the codes those of
    `semantic_ids`. With `collaborative` the quantizer also reads who took what together, in
    training interactions alone; neighbours stay those of the texts.

    Writes item_vectors.npy (N, dim) float32, codes.npy (N, m) int64, codebooks.npy (L, K, D)
    float32, neighbours.npy (N, 50) int64, collaborative.npy (N, 64) float32 where it is used,
    index.json (LC-Rec's form), report.json, and what a new item's text needs: encoder.json,
    tfidf.safetensors, projection.safetensors, quantizer.safetensors. An interrupted run continues
    from its last checkpoint.

    Raises:
        StreamctlError: the data stage is missing or stale, no text encoder is reachable, there
            are too few items, too few codes for them, or training diverged.
    """
    with run.begin("tokenizer", config, parents=["data"], force=force) as stage:
        if stage is None:
            say("tokenize: complete already")
            made = run.stage("tokenizer")
            made.check_sources(made.json("report.json").get("files", {}))
            return made
        catalog, split = load_data(run)
        if len(catalog) < 2:
            raise StreamctlError(
                f"the catalogue has {len(catalog)} item: there is nothing to choose from",
                run="data prepare with more of the log, or a lower --min-item and --min-user",
            )
        target = resolve_device(device)
        state = stage.load_checkpoint() or ({}, {"phase": "begin"})
        if state[1]["phase"] in ("begin", "texts"):
            encode_items(stage, catalog, config, target, state)
            stage.save_checkpoint({}, {"phase": "encoded"})
            state = ({}, {"phase": "encoded"})
        for name in _ENCODED:
            if (stage.path / name).exists():
                stage.adopt(name)
        vectors = np.load(stage.path / VECTORS, allow_pickle=False)
        described = vectors
        if config.collaborative:
            together = taken_together(split, derive_seed(config.seed, "collaborative"))
            stage.save_array("collaborative.npy", together)
            described = join(vectors, together, config.collaborative)
        x = torch.from_numpy(described).to(target)
        quantizer, quantized = fit(stage, x, catalog, config, state)
        semantic_ids = assign(quantized, quantizer.codebooks.detach(), config)
        near, semantic_ids.details["neighbours"] = neighbours(vectors, config.neighbours)
        semantic_ids.details["texts"] = text_report(catalog.texts, vectors, split, config.seed)
        report = semantic_ids.report()
        for text in complaints(report, config):
            warn(f"{text}, with `{stage.redo()}`")

        stage.save_array("codes.npy", semantic_ids.codes)
        stage.save_array("codebooks.npy", quantizer.codebooks.detach().cpu().numpy())
        tensors = {name: tensor.cpu() for name, tensor in quantizer.state_dict().items()}
        stage.save_tensors("quantizer.safetensors", tensors)
        stage.save_array("neighbours.npy", near)
        stage.save_json("index.json", lc_rec_index(catalog.ids, semantic_ids.codes))
        stage.save_json("report.json", report)
        stage.publish()
    return run.stage("tokenizer")


def choose_codes(items: int, config: TokenizeConfig) -> int:
    """K: `config.codes`, or for a small catalogue the highest power of two with 4 items a code
    (and more where so few could not name the items).

    Raises:
        StreamctlError: fewer codes than items even with all levels.
        UsageError: more codes than can be numbered.
    """
    codes = config.codes
    if codes * ITEMS_A_CODE > items:
        codes = 2 ** max(1, (items // ITEMS_A_CODE).bit_length() - 1)
        while codes**config.levels < items:
            codes *= 2
        codes = min(codes, config.codes)
    if codes < config.codes:
        warn(
            f"{items} items are too few for {config.codes} codes a level "
            f"(under {ITEMS_A_CODE} items a code); {codes} are used, as with "
            f"--set tokenize.codes={codes}"
        )
    if codes**config.levels >= 2**62:
        raise UsageError(
            f"{codes} codes on {config.levels} levels are more than can be numbered",
            run="--set with a smaller tokenize.levels or tokenize.codes",
        )
    if config.collisions == "reassign" and codes**config.levels < items:
        more = math.ceil(math.log(items, codes) - 1e-9)
        raise StreamctlError(
            f"{codes} codes on {config.levels} levels name {codes**config.levels} items of {items}",
            run=f"--levels {more}, or --set tokenize.codes={2 * codes}",
        )
    return codes


def encode_items(
    stage: StageWriter, catalog: Catalog, config: TokenizeConfig, device: torch.device, state: State
) -> None:
    """Texts -> item_vectors.npy, with the encoder and the projection beside it (Eq. 4).

    state: a checkpoint of phase "texts" says how many texts have their vectors in .progress.
    """
    texts = catalog.texts
    if config.vectors:
        encoder = OwnVectors.read(config.vectors, catalog.ids)
        raw = encoder.rows
    else:
        if config.encoder == "tfidf":
            say("tokenize: word counts (TF-IDF)")
            encoder = TfidfEncoder.fit(texts, derive_seed(config.seed, "tfidf"))
        else:
            encoder = SentenceEncoder(config.encoder, device, config.text_batch)
        raw = _encode_texts(stage, encoder, texts, state)
    projection = Projection.fit(raw, config.dim)
    encoder.save(stage)
    projection.save(stage)
    stage.save_array(VECTORS, projection(raw))


def _encode_texts(
    stage: StageWriter, encoder: TfidfEncoder | SentenceEncoder, texts: list[str], state: State
) -> np.ndarray:
    """(N, d_w) float32, on disk while they grow."""
    file = stage.path / ".progress" / "texts.npy"
    done = state[1]["done"] if state[1]["phase"] == "texts" else 0
    raw = np.load(file, mmap_mode="r+") if done else None
    saved = time.monotonic()
    with progress_bar("text vectors", len(texts), "items") as bar:
        bar.start_at(done)
        while bar.done < len(texts):
            part = encoder.encode(texts[bar.done : bar.done + TEXTS_A_CHUNK])
            if raw is None:
                shape = (len(texts), part.shape[1])
                with disk_errors(file):
                    raw = np.lib.format.open_memmap(file, "w+", np.float32, shape)
            raw[bar.done : bar.done + len(part)] = part
            bar.advance(len(part))
            if time.monotonic() - saved > CHECKPOINT_S:
                raw.flush()
                stage.save_checkpoint({}, {"phase": "texts", "done": bar.done})
                saved = time.monotonic()
    return raw


def fit(
    stage: StageWriter, x: torch.Tensor, catalog: Catalog, config: TokenizeConfig, state: State
) -> tuple[RQVAE | RQKMeans, Quantized]:
    """The quantizer of item vectors (N, dim), and what it makes of them.

    Raises:
        StreamctlError: training diverged; names the setting.
    """
    if config.semantic_ids:
        codes = torch.from_numpy(read_semantic_ids(config.semantic_ids, catalog.ids))
        quantizer = RQKMeans.from_codes(x, codes, config.latent)
        quantized = quantize(quantizer, x)
        return quantizer, Quantized(codes.numpy(), quantized.latents, quantized.error)
    codes = choose_codes(len(x), config)
    if config.method == "rqkmeans":
        quantizer = RQKMeans.fit(x, config, codes)
        return quantizer, quantize(quantizer, x)
    quantizer = train_rqvae(stage, x, config, codes, state)
    quantized = quantize(quantizer, x)
    check_error(stage, quantized.error, config)
    return quantizer, quantized


def check_error(stage: Stage, error: float, config: TokenizeConfig) -> None:
    """Raise if the quantizer is worse than none."""
    if not error < DIVERGED:  # NaN, too
        raise StreamctlError(
            f"the RQ-VAE's training diverged: its reconstruction error is {error:.3g} of the "
            f"variance (tokenize.lr is {config.lr:g})",
            run=stage.again([f"tokenize.lr={min(config.lr / 10, TokenizeConfig.lr):g}"]),
        )


def train_rqvae(
    stage: StageWriter, x: torch.Tensor, config: TokenizeConfig, codes: int, state: State
) -> RQVAE:
    """Train an RQ-VAE to its last epoch, with a checkpoint every 20 seconds.

    state: a checkpoint of phase "rqvae" is continued from.
    """
    model = RQVAE.build(x.shape[1], config, codes).to(x.device)
    trainer = RQVAETrainer(model, x, config)
    if state[1]["phase"] == "rqvae":
        trainer.restore(*state)
    else:
        trainer.initialise()
    variance = float(x.var(0, correction=0).sum())
    saved = time.monotonic()
    with progress_bar("RQ-VAE", config.epochs * len(x), "items") as bar:
        bar.start_at(trainer.epoch * len(x))
        while trainer.epoch < config.epochs:
            metrics = trainer.run_epoch(bar.advance)
            if not math.isfinite(metrics["recon"]):
                check_error(stage, math.inf, config)
            stage.log(epoch=trainer.epoch, **metrics)
            share = metrics["recon"] / max(variance, 1e-12)
            bar.note(f"error {share:.2f} used {metrics['used']:.0%}")
            if time.monotonic() - saved > CHECKPOINT_S:
                tensors, meta = trainer.state()
                stage.save_checkpoint(tensors, {"phase": "rqvae", **meta})
                saved = time.monotonic()
    return model.eval()


def assign(quantized: Quantized, codebooks: torch.Tensor, config: TokenizeConfig) -> SemanticIds:
    """Semantic IDs from the quantizer's codes, collisions resolved as `config.collisions` says."""
    raw = quantized.codes
    levels, size, _ = codebooks.shape
    sizes = (size,) * levels
    dedup = config.collisions == "dedup"
    if dedup:
        codes = dedup_digit(raw, quantized.latents, codebooks)
        sizes = (*sizes, int(codes[:, -1].max()) + 1)
    elif size**levels < len(raw) or size**levels >= 2**62:
        raise StreamctlError(
            f"{levels} levels of {size} codes cannot give {len(raw)} items a code each",
            run="--collisions dedup",
        )
    else:
        codes = reassign(raw, quantized.latents, codebooks)
    before = describe(raw, sizes[: raw.shape[1]])
    own = [name for name in (config.vectors, config.semantic_ids) if name]
    details = {
        "dedup": dedup,
        "moved": int((codes[:, : raw.shape[1]] != raw).any(1).sum()),
        "files": {name: file_hash(Path(name)) for name in own},
        "quantizer": {
            "method": "own" if config.semantic_ids else config.method,
            **{key: before[key] for key in ("levels", "distinct", "collision_rate")},
            "reconstruction_error": quantized.error,
        },
    }
    return SemanticIds(codes, sizes, dedup, details)


def text_report(
    texts: list[str], vectors: np.ndarray, split: Split, seed: int
) -> dict[str, int | float]:
    """Whether the item vectors say anything: how many there are, and if who takes one follows it.

    Returns:
        "items", "empty" (texts), "distinct" (vectors), "pairs" (of training interactions of one
        user at most 5 apart, 20,000 of them), "closer" (share whose vectors are more alike than
        those of the first and another pair's second, half where equal) and its standard "error".
    """
    rows = unit(vectors)
    report: dict[str, int | float] = {
        "items": len(rows),
        "empty": sum(not text.strip() for text in texts),
        "distinct": len(np.unique((rows.round(3) + 0.0).view(f"V{4 * rows.shape[1]}"))),
    }
    items, offsets = split.training_sequences()
    random = np.random.default_rng(derive_seed(seed, "pairs"))
    first = random.integers(0, max(1, len(items)), PAIRS)
    second = first + random.integers(1, STEPS + 1, PAIRS)
    user = np.searchsorted(offsets, np.stack([first, second]), side="right")
    together = (user[0] == user[1]) & (second < len(items))
    before, after = items[first[together]], items[second[together]]
    other = random.permutation(after)
    different = (other != before) & (other != after) & (before != after)
    before, after, other = before[different], after[different], other[different]
    near = (rows[before] * rows[after]).sum(1)
    far = (rows[before] * rows[other]).sum(1)
    closer = np.where(np.abs(near - far) < 1e-5, 0.5, near > far)
    count = len(closer)
    report["pairs"] = count
    report["closer"] = float(closer.mean()) if count else 0.5
    report["error"] = 0.5 / max(count, 1) ** 0.5
    return report


def complaints(report: dict[str, Any], config: TokenizeConfig) -> list[str]:
    """What is wrong with a report, each with remedies that can help; empty when all is well."""
    found = []
    texts, levels = report["texts"], report["quantizer"]["levels"]
    ways = [
        "richer item texts",
        *(["--encoder MODEL that reads their language"] * (config.encoder == "tfidf")),
        "--vectors FILE",
        *(["--set tokenize.collaborative=1"] * (not config.collaborative)),
    ]
    ways = ["other vectors", *ways[-1:]] if config.vectors else ways
    ways = "Remedy: " + " or ".join(ways)
    if texts["empty"]:
        found.append(f"no text: {count_of(texts['empty'], 'item')} of {texts['items']:,}. {ways}")
    if texts["pairs"] and texts["closer"] < 0.5 + SURELY * texts["error"]:
        found.append(
            "items that users take together are no more alike by their vectors than chance "
            f"(closer than a random pair in {texts['closer']:.1%} of {texts['pairs']:,} pairs): "
            f"neighbours by text and codes say little here. {ways}"
        )
    few = texts["distinct"] < min(texts["items"] / 2, ITEMS_A_CODE * levels[0]["codes"])
    if few and not config.collaborative:
        found.append(
            f"the {texts['items']:,} items have only {texts['distinct']:,} different vectors: "
            f"codes within one of them are arbitrary. {ways}"
        )
    for number, level in enumerate(levels, 1):
        if level["usage"] >= HEALTHY_USAGE or few or config.semantic_ids:
            continue
        fewer = 2 ** (max(2, level["used"]).bit_length() - 1)
        other = "rqkmeans" if config.method == "rqvae" else "rqvae"
        remedies = [f"--set tokenize.epochs={2 * config.epochs}"] * (config.method == "rqvae")
        remedies += [f"--set tokenize.codes={fewer}"] * (fewer < level["codes"])
        remedies += [f"--set tokenize.method={other}"]
        found.append(
            f"level {number} uses {level['used']} of its {level['codes']} codes "
            f"({level['usage']:.0%}): the codebook has collapsed in part. "
            f"Remedy: {' or '.join(remedies)}"
        )
    return found


def lc_rec_index(ids: list[str], codes: np.ndarray) -> dict[str, list[str]]:
    """LC-Rec's index.json: item id -> ["<a_12>", "<b_3>", ...]."""
    letters = string.ascii_lowercase
    return {
        item: [f"<{letters[level]}_{code}>" for level, code in enumerate(row)]
        for item, row in zip(ids, codes.tolist(), strict=True)
    }
