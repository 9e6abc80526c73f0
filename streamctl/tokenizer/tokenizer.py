"""A fitted tokenizer: text encoder, projection and quantizer, for texts of items new and old."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamctl.config import TokenizeConfig, resolve
from streamctl.kernels import residual_quantize
from streamctl.runs import Stage
from streamctl.tokenizer.collaborative import join
from streamctl.tokenizer.encoders import SentenceEncoder
from streamctl.tokenizer.inputs import OwnVectors
from streamctl.tokenizer.projection import Projection
from streamctl.tokenizer.rqkmeans import RQKMeans
from streamctl.tokenizer.rqvae import RQVAE
from streamctl.tokenizer.tfidf import TfidfEncoder

CHUNK = 4096  # vectors a pass through the quantizer's encoder


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of vectors.

    Attributes:
        codes: (N, L) int64. latents: (N, D) float32, what was quantized.
        error: mean squared error of the vectors that came back (Eq. 7), as a share of variance.
    """

    codes: np.ndarray
    latents: torch.Tensor
    error: float


@torch.no_grad()
def quantize(quantizer: RQVAE | RQKMeans, vectors: torch.Tensor) -> Quantized:
    """Vectors (N, dim) float32 -> codes, level by level the nearest codeword (kernels)."""
    chunks = vectors.split(CHUNK)
    latents = torch.cat([quantizer.latent(chunk) for chunk in chunks])
    codebooks = quantizer.codebooks.detach()
    codes, residual = residual_quantize(latents, codebooks)
    quantized = (latents - residual).split(CHUNK)
    decoded = torch.cat([quantizer.decode(chunk) for chunk in quantized])
    wrong = (vectors - decoded).double().square().mean()
    variance = vectors.double().var(0, correction=0).mean()
    error = float(wrong / variance) if variance > 1e-12 else 0.0  # equal vectors: nothing to tell
    return Quantized(codes.cpu().numpy(), latents, error)


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> item vectors -> codes, as the tokenizer stage fitted them.

    Attributes:
        collaborative: (1, d) of zeros, which say of a new item that nobody has taken it yet; d is
            0 where the quantizer reads texts alone.
        weight: of the collaborative vectors.
    """

    encoder: SentenceEncoder | TfidfEncoder | OwnVectors
    projection: Projection
    quantizer: RQVAE | RQKMeans
    collaborative: np.ndarray
    weight: float

    @classmethod
    def load(cls, stage: Stage, device: str | torch.device = "cpu") -> Tokenizer:
        """From a complete tokenizer stage.

        Args:
            device: of the text encoder; the quantizer is small and stays on the CPU.

        Raises:
            StreamctlError: an artifact is missing, or the sentence encoder is not reachable.
        """
        from safetensors.torch import load_file

        config = resolve(TokenizeConfig, base=stage.manifest["config"])
        saved = stage.json("encoder.json")
        tensors = load_file(stage.file("quantizer.safetensors"))
        if saved["kind"] == "tfidf":
            encoder = TfidfEncoder.load(stage, saved)
        elif saved["kind"] == "vectors":
            encoder = OwnVectors(saved["name"])
        else:
            encoder = SentenceEncoder(saved["name"], device, config.text_batch)
        projection = Projection.load(stage)
        width = stage.array("collaborative.npy").shape[1] if config.collaborative else 0
        unknown = np.zeros((1, width), np.float32)
        dim = len(projection.components) + width
        if config.method == "rqkmeans" or config.semantic_ids:
            quantizer = RQKMeans(tensors["codebooks"], dim)
        else:
            quantizer = RQVAE.build(dim, config, tensors["codebooks"].shape[1])
            quantizer.load_state_dict(tensors)
            quantizer.eval()
        return cls(encoder, projection, quantizer, unknown, config.collaborative)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> item vectors (n, dim) float32, as in item_vectors.npy."""
        return self.projection(self.encoder.encode(texts))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> codes (n, L) int64 of the learned levels.

        The codes are the nearest ones, taken or not: who adds an item finds it a free place.
        """
        if not len(texts):
            return np.empty((0, len(self.quantizer.codebooks)), np.int64)
        vectors = self.vectors(texts)
        if self.weight:
            vectors = join(vectors, self.collaborative.repeat(len(vectors), 0), self.weight)
        return quantize(self.quantizer, torch.from_numpy(vectors)).codes
