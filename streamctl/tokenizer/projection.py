"""Text vectors -> item vectors: principal components, each with mean 0 and deviation 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streamctl.runs import Stage, StageWriter

# A direction with less than this share of the first one's variance is rounding, not text.
NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Projection:
    """An affine map fitted on a catalogue and applied to any text vector.

    Attributes:
        mean: (d_w,) float64. components: (dim, d_w) float64, rows divided by their deviation.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, dim: int) -> Projection:
        """PCA of (N, d_w) vectors to `dim` (fewer where they span fewer), standardised."""
        mean = vectors.mean(0, dtype=np.float64)
        centred = vectors - mean
        variance, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
        variance, axes = variance[::-1], axes[:, ::-1]
        kept = max(1, min(dim, int((variance > NEGLIGIBLE * variance[0]).sum())))
        axes = axes[:, :kept].T
        # An axis has no sign of its own: make the largest entry positive.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
        deviation = np.sqrt(np.maximum(variance[:kept], np.finfo(np.float64).tiny))
        return cls(mean, axes * np.sign(largest) / deviation[:, None])

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n, d_w) -> (n, dim) float32."""
        return ((vectors - self.mean) @ self.components.T).astype(np.float32)

    def save(self, stage: StageWriter) -> None:
        arrays = {"mean": self.mean, "components": self.components}
        stage.save_tensors(
            "projection.safetensors",
            {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()},
        )

    @classmethod
    def load(cls, stage: Stage) -> Projection:
        from safetensors.numpy import load_file

        arrays = load_file(stage.file("projection.safetensors"))
        return cls(arrays["mean"], arrays["components"])
