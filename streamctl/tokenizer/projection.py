"""Text vectors -> item vectors: principal components, each with mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from streamctl.runs import Stage, StageWriter

# A direction with less than this share of the first one's variance is rounding, not text.
NEGLIGIBLE = 1e-5
SHARE = 4  # vectors that a direction needs
ROWS = 65_536  # vectors that are turned into float64 at once


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
        """PCA of (N, d_w) vectors to `dim`, or fewer where they span fewer, standardised.

        No more than N / 4: as many standardised directions as there are vectors leave all of them
        equally far from each other. Vectors that are all the same become zeros.
        """
        mean = vectors.mean(0, dtype=np.float64)
        covariance = np.zeros((len(mean), len(mean)))
        for rows in _chunks(vectors):
            covariance += (rows - mean).T @ (rows - mean)
        variance, axes = np.linalg.eigh(covariance / len(vectors))
        variance, axes = variance[::-1], axes[:, ::-1]
        # What rounding alone makes of equal vectors is no direction either.
        least = max(NEGLIGIBLE * variance[0], NEGLIGIBLE**2 * float(np.square(mean).sum()))
        kept = min(dim, max(1, len(vectors) // SHARE), int((variance > least).sum()))
        if not kept:
            return cls(mean, np.zeros((1, len(mean))))
        axes = axes[:, :kept].T
        # An axis has no sign of its own: make the largest entry positive.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
        return cls(mean, axes * np.sign(largest) / np.sqrt(variance[:kept])[:, None])

    @property
    def dim(self) -> int:
        """Width of the vectors that come out."""
        return len(self.components)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n, d_w) -> (n, dim) float32."""
        out = np.empty((len(vectors), self.dim), np.float32)
        done = 0
        for rows in _chunks(vectors):
            out[done : done + len(rows)] = (rows - self.mean) @ self.components.T
            done += len(rows)
        return out

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


def _chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), ROWS):
        yield vectors[start : start + ROWS].astype(np.float64)
