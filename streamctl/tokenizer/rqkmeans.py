"""Residual k-means: codebooks fitted level by level on what the levels before left over."""

from __future__ import annotations

import warnings

import torch
from torch.nn import functional

from streamctl.config import TokenizeConfig
from streamctl.device import derive_seed
from streamctl.kernels import residual_quantize

ROWS_A_CODEWORD = 256  # of a larger catalogue k-means reads a sample


def kmeans(x: torch.Tensor, k: int, iterations: int, seed: int) -> torch.Tensor:
    """scikit-learn's k-means (k-means++, then Lloyd's steps; empty clusters take far rows).

    Args:
        x: (N, D) float32, of which at most 256 rows a centroid are read.
        k: centroids. iterations: at most so many. seed: decides the result, on one thread.

    Returns:
        (k, D) float32 centroids on x's device; repeated ones only where x has fewer than k
        distinct rows.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if len(x) > ROWS_A_CODEWORD * k:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(x), generator=generator)[: ROWS_A_CODEWORD * k]
        x = x[rows.to(x.device)]
    fewer = min(k, len(x))
    model = KMeans(fewer, n_init=1, max_iter=max(1, iterations), random_state=seed % 2**32)
    with warnings.catch_warnings(), threadpool_limits(1):  # threads would add in any order
        warnings.simplefilter("ignore")  # fewer distinct rows than centroids: said of the codes
        centroids = model.fit(x.cpu().numpy()).cluster_centers_
    found = torch.from_numpy(centroids).to(x)
    return found[torch.arange(k, device=x.device) % fewer]


def residual_kmeans(
    x: torch.Tensor, levels: int, codes: int, iterations: int, seed: int
) -> torch.Tensor:
    """Codebooks (levels, codes, D): each level's are the k-means of the residuals before it."""
    codebooks = torch.empty(levels, codes, x.shape[1], device=x.device)
    residual = x
    for level in range(levels):
        codebooks[level] = kmeans(residual, codes, iterations, derive_seed(seed, "kmeans", level))
        _, residual = residual_quantize(residual, codebooks[level : level + 1])
    return codebooks


class RQKMeans:
    """Residual k-means of the first principal components of the item vectors.

    As many components as an RQ-VAE's latent vector has: standardised to one deviation, the later
    ones are mostly noise, on which k-means spends its codes (on Amazon Scientific, 128 components
    left 27% of the items without a code of their own and the last level a perplexity of 12;
    32 components 15% and 117).
    """

    def __init__(self, codebooks: torch.Tensor, dim: int):
        """codebooks: (L, K, D) float32, D <= dim. dim: width of the item vectors."""
        self.codebooks, self.dim = codebooks, dim

    @classmethod
    def fit(cls, x: torch.Tensor, config: TokenizeConfig, codes: int) -> RQKMeans:
        """From item vectors (N, dim) float32; codes: K, at most `config.codes`."""
        seed = derive_seed(config.seed, "rqkmeans")
        latents = x[:, : config.latent].contiguous()
        codebooks = residual_kmeans(latents, config.levels, codes, config.kmeans_iterations, seed)
        return cls(codebooks, x.shape[1])

    @classmethod
    def from_codes(cls, x: torch.Tensor, codes: torch.Tensor, width: int) -> RQKMeans:
        """Codebooks of codes that are there already: each codeword the mean of its residuals.

        Args:
            x: (N, dim) float32 item vectors, of which the first `width` components count.
            codes: (N, L) int64. A code nobody has gets a codeword that is nobody's nearest.
        """
        residual = x[:, :width].clone()
        size = int(codes.max()) + 1
        codebooks = []
        for level in codes.to(x.device).T:
            count = torch.bincount(level, minlength=size)[:, None]
            sums = residual.new_zeros(size, residual.shape[1]).index_add_(0, level, residual)
            far = 1e3 * (1 + residual.abs().max())
            codebooks.append(torch.where(count > 0, sums / count.clamp_min(1), far))
            residual = residual - codebooks[-1][level]
        return cls(torch.stack(codebooks), x.shape[1])

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """What the codebooks quantize: (N, dim) -> (N, D)."""
        return x[:, : self.codebooks.shape[2]]

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Sums of codewords (N, D) -> vectors (N, dim); the other components are zero."""
        return functional.pad(quantized, (0, self.dim - quantized.shape[1]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"codebooks": self.codebooks}
