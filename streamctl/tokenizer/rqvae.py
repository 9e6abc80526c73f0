"""RQ-VAE: an autoencoder whose latent vector is a sum of codewords (Eqs. 5-8)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamctl import checkpoint
from streamctl.config import TokenizeConfig
from streamctl.device import autocast, derive_seed
from streamctl.kernels import straight_through
from streamctl.tokenizer.rqkmeans import residual_kmeans

REVIVE_UNTIL = 2 / 3  # of the epochs: after that no codeword is moved by hand


def quant_loss(z: Tensor, codebooks: Tensor, codes: Tensor, beta: float) -> Tensor:
    """Eq. 6, the mean over items: each level's codeword to its residual, and the other way.

    The gradient of the commitment term goes to the encoder alone: the codewords that were
    subtracted before are constants in h_d.

    Args:
        z: (B, D) latent vectors h_1. codebooks: (L, K, D). codes: (B, L) int64.
        beta: weight of the commitment term.
    """
    loss = z.new_zeros(())
    residual = z
    for level, codebook in enumerate(codebooks):
        codeword = functional.embedding(codes[:, level], codebook)
        loss = loss + (residual.detach() - codeword).square().sum(1).mean()
        loss = loss + beta * (residual - codeword.detach()).square().sum(1).mean()
        residual = residual - codeword.detach()
    return loss


def recon_loss(x: Tensor, decoded: Tensor) -> Tensor:
    """Eq. 7, the mean over items: squared distance of (B, dim) vectors and what came back."""
    return (x - decoded).square().sum(1).mean()


class RQVAE(nn.Module):
    """MLP encoder, L codebooks of K codewords, MLP decoder."""

    def __init__(self, dim: int, config: TokenizeConfig, codes: int):
        """Args: dim: width of the item vectors. codes: K, at most `config.codes`."""
        super().__init__()
        self.beta = config.beta
        self.encoder = _mlp([dim, *config.hidden, config.latent])
        self.decoder = _mlp([config.latent, *reversed(config.hidden), dim])
        self.codebooks = nn.Parameter(torch.zeros(config.levels, codes, config.latent))

    @classmethod
    def build(cls, dim: int, config: TokenizeConfig, codes: int) -> RQVAE:
        """A new one; `config.seed` decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "rqvae"))
            return cls(dim, config, codes)

    def latent(self, x: Tensor) -> Tensor:
        """z = E(x): (N, dim) -> (N, latent)."""
        return self.encoder(x)

    def decode(self, quantized: Tensor) -> Tensor:
        """Eq. 8: sums of codewords (N, latent) -> vectors (N, dim)."""
        return self.decoder(quantized)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 5 for a batch; codes and losses are fp32 under autocast too.

        Returns:
            the loss, and its parts "recon" (Eq. 7) and "quant" (Eq. 6), the "codes" (B, L) int64
            and the latent vectors "z" (B, latent), all without gradient.
        """
        z = self.latent(x).float()
        codes, quantized = straight_through(z, self.codebooks)
        recon = recon_loss(x, self.decode(quantized).float())
        quant = quant_loss(z, self.codebooks, codes, self.beta)
        parts = {"recon": recon, "quant": quant, "codes": codes, "z": z}
        return recon + quant, {name: value.detach() for name, value in parts.items()}


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Linear(inside, outside)]
    return nn.Sequential(*layers)


class RQVAETrainer:
    """Trains an RQ-VAE an epoch at a time; `state` and `restore` carry it over a restart."""

    def __init__(self, model: RQVAE, vectors: Tensor, config: TokenizeConfig):
        """Args: vectors: (N, dim) float32, on the model's device."""
        self.model, self.vectors, self.config = model, vectors, config
        self.epoch = 0
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)

    def initialise(self) -> None:
        """Codebooks from the k-means of the first pass's residuals, level by level."""
        config = self.config
        with torch.no_grad():
            z = self.model.latent(self.vectors)
            levels, codes, _ = self.model.codebooks.shape
            seed = derive_seed(config.seed, "rqvae")
            self.model.codebooks.copy_(
                residual_kmeans(z, levels, codes, config.kmeans_iterations, seed)
            )

    def run_epoch(self, advance: Callable[[int], None] = lambda rows: None) -> dict[str, float]:
        """One epoch in a seeded order; then unused codewords move, until two thirds of training.

        Args:
            advance: called with the number of items after each step.

        Returns:
            mean "recon" and "quant" losses, and "used", the least share of a level's codewords
            that the epoch used.
        """
        config, model = self.config, self.model
        model.train()
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", self.epoch))
        order = torch.randperm(len(self.vectors), generator=generator).to(self.vectors.device)
        levels, size, _ = model.codebooks.shape
        used = torch.zeros(levels, size, dtype=torch.bool, device=self.vectors.device)
        recon = quant = torch.zeros((), device=self.vectors.device)
        for rows in order.split(config.batch):
            with autocast(self.vectors.device):
                loss, parts = model(self.vectors[rows])
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            recon = recon + parts["recon"] * len(rows)
            quant = quant + parts["quant"] * len(rows)
            used.scatter_(1, parts["codes"].T, True)
            advance(len(rows))
        self.epoch += 1
        if self.epoch < REVIVE_UNTIL * config.epochs:
            self._revive(~used, parts["z"], parts["codes"])
        return {
            "recon": float(recon) / len(order),
            "quant": float(quant) / len(order),
            "used": float(used.float().mean(1).min()),
        }

    @torch.no_grad()
    def _revive(self, dead: Tensor, z: Tensor, codes: Tensor) -> None:
        """Move dead codewords (L, K) onto random residuals of the last batch at their level."""
        codebooks = self.model.codebooks
        seed = derive_seed(self.config.seed, "revive", self.epoch)
        generator = torch.Generator().manual_seed(seed)
        moments = [v for k, v in self.optimiser.state[codebooks].items() if k != "step"]
        residual = z
        for level in range(len(codebooks)):
            chosen = codebooks[level][codes[:, level]]
            index = dead[level].nonzero()[:, 0]
            rows = torch.randint(len(z), (len(index),), generator=generator).to(z.device)
            codebooks[level, index] = residual[rows]
            for moment in moments:
                moment[level, index] = 0
            residual = residual - chosen

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, meta) from which `restore` continues bit for bit."""
        tensors = checkpoint.prefixed("model", self.model.state_dict())
        moments = checkpoint.optimizer_tensors(self.optimiser)
        return tensors | checkpoint.prefixed("adam", moments), {"epoch": self.epoch}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.epoch = meta["epoch"]
        self.model.load_state_dict(checkpoint.take("model", tensors))
        checkpoint.restore_optimizer(self.optimiser, checkpoint.take("adam", tensors))
