"""A fitted tokenizer: text encoder, projection and quantizer, for texts of items new and old."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamctl.config import TokenizeConfig, resolve
from streamctl.kernels import residual_quantize
from streamctl.runs import Stage
from streamctl.tokenizer.encoders import SentenceEncoder
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
    error = float(wrong / vectors.double().var(0, correction=0).mean().clamp_min(1e-12))
    return Quantized(codes.cpu().numpy(), latents, error)


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> item vectors -> codes, as the tokenizer stage fitted them."""

    encoder: SentenceEncoder | TfidfEncoder
    projection: Projection
    quantizer: RQVAE | RQKMeans

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
        else:
            encoder = SentenceEncoder(saved["name"], device)
        projection = Projection.load(stage)
        if config.method == "rqkmeans":
            quantizer = RQKMeans(tensors["codebooks"], len(projection.components))
            return cls(encoder, projection, quantizer)
        codes = tensors["codebooks"].shape[1]
        model = RQVAE.build(len(projection.components), config, codes)
        model.load_state_dict(tensors)
        return cls(encoder, projection, model.eval())

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> item vectors (n, dim) float32, as in item_vectors.npy."""
        return self.projection(self.encoder.encode(texts))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> codes (n, L) int64 of the learned levels.

        The codes are the nearest ones, taken or not: who adds an item finds it a free place.
        """
        if not len(texts):
            return np.empty((0, len(self.quantizer.codebooks)), np.int64)
        return quantize(self.quantizer, torch.from_numpy(self.vectors(texts))).codes
