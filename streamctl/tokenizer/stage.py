"""The tokenizer stage: every item's vector, Semantic ID and neighbours."""

from __future__ import annotations

import string
import time
from typing import Any

import numpy as np
import torch

from streamctl.config import TokenizeConfig
from streamctl.data import load_data
from streamctl.device import derive_seed, resolve_device
from streamctl.errors import StreamctlError, UsageError
from streamctl.progress import progress_bar, say, warn
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer.collaborative import join, taken_together
from streamctl.tokenizer.collisions import dedup_digit, reassign
from streamctl.tokenizer.encoders import SentenceEncoder
from streamctl.tokenizer.neighbours import neighbours
from streamctl.tokenizer.projection import Projection
from streamctl.tokenizer.rqkmeans import RQKMeans
from streamctl.tokenizer.rqvae import RQVAE, RQVAETrainer
from streamctl.tokenizer.semantic_ids import SemanticIds, describe
from streamctl.tokenizer.tfidf import TfidfEncoder
from streamctl.tokenizer.tokenizer import Quantized, quantize

FEWEST_ITEMS = 8
ITEMS_A_CODE = 4  # below this many items a code, k-means only copies the items
HEALTHY_USAGE = 0.95
CHECKPOINT_S = 20.0
TEXTS_A_CHUNK = 4096  # texts encoded between two checkpoints at the closest
_ENCODED = ("item_vectors.npy", "projection.safetensors", "encoder.json", "tfidf.safetensors")


def tokenize(
    run: RunDir, config: TokenizeConfig, *, device: str = "auto", force: bool = False
) -> Stage:
    """Text -> vectors -> Semantic IDs, and each item's nearest by text (Eqs. 4-8).

    With `collaborative` the quantizer also reads who took what together, in training interactions
    alone; neighbours stay those of the texts.

    Writes item_vectors.npy (N, dim) float32, codes.npy (N, m) int64, codebooks.npy (L, K, D)
    float32, neighbours.npy (N, 50) int64, collaborative.npy (N, 64) float32 where it is used,
    index.json (LC-Rec's form), report.json, and what a new item's text needs: encoder.json,
    tfidf.safetensors, projection.safetensors, quantizer.safetensors. An interrupted run continues
    from its last checkpoint.

    Raises:
        StreamctlError: the data stage is missing or stale, no text encoder is reachable, there
            are too few items, or too few codes for them.
    """
    with run.begin("tokenizer", config, parents=["data"], force=force) as stage:
        if stage is None:
            say("tokenize: complete already")
            return run.stage("tokenizer")
        catalog, split = load_data(run)
        codes = choose_codes(len(catalog), config)
        target = resolve_device(device)
        state = stage.load_checkpoint() or ({}, {"phase": "begin"})
        if state[1]["phase"] in ("begin", "texts"):
            encode_items(stage, catalog.texts, config, target, state)
            stage.save_checkpoint({}, {"phase": "encoded"})
            state = ({}, {"phase": "encoded"})
        for name in _ENCODED:
            if (stage.path / name).exists():
                stage.adopt(name)
        vectors = np.load(stage.path / "item_vectors.npy", allow_pickle=False)
        described = vectors
        if config.collaborative:
            together = taken_together(split, derive_seed(config.seed, "collaborative"))
            stage.save_array("collaborative.npy", together)
            described = join(vectors, together, config.collaborative)
        x = torch.from_numpy(described).to(target)
        if config.method == "rqvae":
            quantizer = train_rqvae(stage, x, config, codes, state)
        else:
            quantizer = RQKMeans.fit(x, config, codes)
        semantic_ids = assign(quantize(quantizer, x), quantizer.codebooks.detach(), config)
        report = semantic_ids.report()
        for text in complaints(report, config):
            warn(text)

        stage.save_array("codes.npy", semantic_ids.codes)
        stage.save_array("codebooks.npy", quantizer.codebooks.detach().cpu().numpy())
        tensors = {name: tensor.cpu() for name, tensor in quantizer.state_dict().items()}
        stage.save_tensors("quantizer.safetensors", tensors)
        stage.save_array("neighbours.npy", neighbours(vectors, config.neighbours))
        stage.save_json("index.json", lc_rec_index(catalog.ids, semantic_ids.codes))
        stage.save_json("report.json", report)
        stage.publish()
    return run.stage("tokenizer")


def choose_codes(items: int, config: TokenizeConfig) -> int:
    """K: `config.codes`, or for a small catalogue the highest power of two with 4 items a code.

    Raises:
        StreamctlError: fewer than 8 items, or fewer codes than items even with all levels.
        UsageError: settings outside what can be computed.
    """
    if items < FEWEST_ITEMS:
        raise StreamctlError(
            f"the catalogue has {items} items; Semantic IDs need {FEWEST_ITEMS}", run="data prepare"
        )
    for name in ("codes", "levels", "dim", "latent", "epochs", "batch", "neighbours"):
        least = 2 if name == "codes" else 1
        if getattr(config, name) < least:
            value = getattr(config, name)
            raise UsageError(f"tokenize.{name} is {value}; it takes {least} or more")
    codes = config.codes
    if codes * ITEMS_A_CODE > items:
        codes = 2 ** ((items // ITEMS_A_CODE).bit_length() - 1)
        warn(
            f"{items} items are too few for {config.codes} codes a level "
            f"(under {ITEMS_A_CODE} items a code); {codes} are used, as "
            f"--set tokenize.codes={codes} says"
        )
    if codes**config.levels >= 2**62:
        raise UsageError(f"{codes} codes on {config.levels} levels are more than can be numbered")
    if config.collisions == "reassign" and codes**config.levels < items:
        raise StreamctlError(
            f"{codes} codes on {config.levels} levels name {codes**config.levels} items of {items}",
            run=f"--levels {config.levels + 1}"
            + (f", or --set tokenize.codes={2 * codes}" if codes == config.codes else ""),
        )
    return codes


def encode_items(
    stage: StageWriter,
    texts: list[str],
    config: TokenizeConfig,
    device: torch.device,
    state: tuple[dict[str, torch.Tensor], dict[str, Any]],
) -> None:
    """Texts -> item_vectors.npy, with the encoder and the projection beside it (Eq. 4).

    state: a checkpoint of phase "texts" holds the vectors of the first texts.
    """
    if config.encoder == "tfidf":
        say("tokenize: word counts (TF-IDF)")
        encoder = TfidfEncoder.fit(texts, derive_seed(config.seed, "tfidf"))
    else:
        encoder = SentenceEncoder(config.encoder, device)
    parts = [state[0]["vectors"].numpy()] if state[1]["phase"] == "texts" else []
    saved = time.monotonic()
    with progress_bar("text vectors", len(texts), "items") as bar:
        bar.start_at(sum(map(len, parts)))
        while bar.done < len(texts):
            parts.append(encoder.encode(texts[bar.done : bar.done + TEXTS_A_CHUNK]))
            bar.advance(len(parts[-1]))
            if time.monotonic() - saved > CHECKPOINT_S:
                vectors = torch.from_numpy(np.concatenate(parts))
                stage.save_checkpoint({"vectors": vectors}, {"phase": "texts"})
                saved = time.monotonic()
    vectors = np.concatenate(parts)
    projection = Projection.fit(vectors, config.dim)
    encoder.save(stage)
    projection.save(stage)
    stage.save_array("item_vectors.npy", projection(vectors))


def train_rqvae(
    stage: StageWriter,
    x: torch.Tensor,
    config: TokenizeConfig,
    codes: int,
    state: tuple[dict[str, torch.Tensor], dict[str, Any]],
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
    saved = time.monotonic()
    with progress_bar("RQ-VAE", config.epochs * len(x), "items") as bar:
        bar.start_at(trainer.epoch * len(x))
        while trainer.epoch < config.epochs:
            metrics = trainer.run_epoch(bar.advance)
            stage.log(epoch=trainer.epoch, **metrics)
            bar.note(f"recon {metrics['recon']:.2f} used {metrics['used']:.0%}")
            if time.monotonic() - saved > CHECKPOINT_S:
                tensors, meta = trainer.state()
                stage.save_checkpoint(tensors, {"phase": "rqvae", **meta})
                saved = time.monotonic()
    return model.eval()


def assign(quantized: Quantized, codebooks: torch.Tensor, config: TokenizeConfig) -> SemanticIds:
    """Semantic IDs from the quantizer's codes, collisions resolved as `config.collisions` says."""
    raw = quantized.codes
    sizes = (codebooks.shape[1],) * codebooks.shape[0]
    dedup = config.collisions == "dedup"
    if dedup:
        codes = dedup_digit(raw, quantized.latents, codebooks)
        sizes = (*sizes, int(codes[:, -1].max()) + 1)
    else:
        codes = reassign(raw, quantized.latents, codebooks)
    before = describe(raw, sizes[: raw.shape[1]])
    details = {
        "dedup": dedup,
        "moved": int((codes[:, : raw.shape[1]] != raw).any(1).sum()),
        "quantizer": {
            "method": config.method,
            **{key: before[key] for key in ("levels", "distinct", "collision_rate")},
            "reconstruction_error": quantized.error,
        },
    }
    return SemanticIds(codes, sizes, dedup, details)


def complaints(report: dict[str, Any], config: TokenizeConfig) -> list[str]:
    """What is wrong with a report, each with its remedy; empty when all is well."""
    found = []
    for number, level in enumerate(report["quantizer"]["levels"], 1):
        if level["usage"] < HEALTHY_USAGE:
            fewer = 2 ** (max(2, level["used"]).bit_length() - 1)
            other = "rqkmeans" if config.method == "rqvae" else "rqvae"
            longer = f"--set tokenize.epochs={2 * config.epochs}, " * (config.method == "rqvae")
            found.append(
                f"level {number} uses {level['used']} of its {level['codes']} codes "
                f"({level['usage']:.0%}): the codebook has collapsed in part, or the catalogue "
                f"holds too few different texts. Remedy: {longer}--set tokenize.codes={fewer} "
                f"or --set tokenize.method={other}, with --force"
            )
    return found


def lc_rec_index(ids: list[str], codes: np.ndarray) -> dict[str, list[str]]:
    """LC-Rec's index.json: item id -> ["<a_12>", "<b_3>", ...]."""
    letters = string.ascii_lowercase
    return {
        item: [f"<{letters[level]}_{code}>" for level, code in enumerate(row)]
        for item, row in zip(ids, codes.tolist(), strict=True)
    }
