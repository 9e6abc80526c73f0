"""GRPO on thoughts of the vocabulary and codes, judged by five rewards (Eqs. 20-27)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamctl.config import RlConfig
from streamctl.decode.sample import Rollout, rollout, rollout_logprobs
from streamctl.device import autocast, derive_seed
from streamctl.errors import StreamctlError
from streamctl.model.candidates import thoughts_logprob
from streamctl.model.policy import Encoded, Policy
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training import rewards
from streamctl.training.loop import Batch
from streamctl.training.losses import advantages, grpo_loss

SMALLEST_POOL = 128  # representations that Eq. 25 compares with
RANKED_TOGETHER = 64  # rollouts whose negatives are scored in one call
FIRST_RATIO = 1e-3  # how far rounding may carry the first ratio from 1
FIRST_KL = 1e-6


@dataclass(frozen=True)
class Judge:
    """Scores rollouts with the five rewards; nothing here carries a gradient."""

    policy: Policy  # in training; Eqs. 26 and 27 ask its current likelihoods
    reference: Policy  # the frozen SFT policy; its direct decoder is Eq. 26's reference
    parser: rewards.ItemParser
    look_alikes: torch.Tensor  # (N, K) hard negatives of Eq. 27
    config: RlConfig

    @torch.no_grad()
    def __call__(
        self,
        history: torch.Tensor,
        target: torch.Tensor,
        rollouts: Rollout,
        encoded: Encoded,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        seed: int,
    ) -> dict[str, torch.Tensor]:
        """Each term (B, G), unweighted, and `items` (B, G), -1 where codes spell none.

        encoded and hidden (B, G, T, d), at the positions that predicted the rollouts' tokens, are
        the policy's; targets (T,) are the whole batch's; seed is of the pool of Eq. 25.
        """
        policy = self.policy
        items = self.parser(rollouts.codes)
        pool = self._pool(targets, seed)
        share = rewards.win_share(
            hidden.mean(2), policy.item_vectors(target), target, policy.item_vectors(pool), pool
        )
        seen = self.reference.encode(history)
        with autocast(target.device):  # as the thoughts' likelihoods, which it is taken from
            direct = self.reference.target_logprob(seen, target, decoder="direct")
        thought, rank = self._rank(target, rollouts, encoded)
        return {
            "items": items,
            "format": rewards.format_reward(items),
            "exact": rewards.exact_match_reward(rollouts.codes, policy.item_tokens[target]),
            "similarity": rewards.similarity_reward(share),
            "likelihood": rewards.likelihood_reward(thought, direct),
            "ranking": rewards.ranking_reward(rank, self.look_alikes.shape[1]),
        }

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of the terms, (B, G)."""
        return sum(getattr(self.config, f"{name}_weight") * terms[name] for name in rewards.TERMS)

    def _pool(self, targets: torch.Tensor, seed: int) -> torch.Tensor:
        """The batch's users' targets, or catalogue samples where they are few."""
        if len(targets) >= SMALLEST_POOL:
            return targets
        generator = torch.Generator().manual_seed(seed)
        count = len(self.policy.item_tokens)
        return torch.randperm(count, generator=generator)[:SMALLEST_POOL].to(targets.device)

    def _rank(
        self, target: torch.Tensor, rollouts: Rollout, encoded: Encoded
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log P(target | thought) and the target's rank among its look-alikes, both (B, G)."""
        candidates = torch.cat([target[:, None], self.look_alikes[target]], 1)
        scores = []
        users = torch.arange(len(target), device=target.device)
        for rows in users.split(max(1, RANKED_TOGETHER // rollouts.group)):
            with autocast(target.device):
                scores.append(
                    thoughts_logprob(
                        self.policy, encoded.rows(rows), candidates[rows], rollouts.think[rows]
                    )
                )
        scores = torch.cat(scores)
        return scores[..., 0], rewards.target_rank(scores[..., 0], scores[..., 1:])


@dataclass
class Explorer:
    """GRPO on sampled thoughts and codes (Eq. 20).

    Dropout is off in rollouts and updates alike, and both run in fp32, so that the ratio is 1 and
    the KL 0 at the first step; anything else is an error in the arithmetic and raises.

    Attributes:
        reference: the SFT policy, frozen. think: l, think tokens of a rollout.
        trie: codes are sampled inside it; None: from the whole vocabulary.
    """

    policy: Policy
    reference: Policy
    judge: Judge
    config: RlConfig
    think: int
    trie: PrefixTrie | None

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Eq. 20 on a group of rollouts for each user, the anchor, and the direct decoder's loss.

        All updates on a batch learn from the rollouts of the first.
        """
        config, policy, target = self.config, self.policy, batch.target
        policy.eval()
        if batch.update == 0:
            self._rollouts = rollout(
                policy, batch.history, group=config.group, think=self.think,
                temperature=config.temperature, seed=derive_seed(batch.seed, "rollout"),
                bf16=False, trie=self.trie, share=batch.share,
            )  # fmt: skip
        rollouts = self._rollouts
        encoded = policy.encode(batch.history)
        logprobs, hidden = rollout_logprobs(
            policy, encoded, rollouts, temperature=config.temperature
        )
        if batch.update == 0:
            self._judged = self._judge(batch, encoded.detach(), hidden)
        frozen, reward, described = self._judged
        loss, metrics = grpo_loss(
            logprobs, rollouts.logprobs, frozen, advantages(reward), clip=config.clip,
            kl_weight=config.kl_weight, ratio=config.ratio,
        )  # fmt: skip
        if batch.step == batch.update == 0:
            check_first(logprobs, rollouts.logprobs, metrics)
        anchor = -policy.target_logprob(encoded, target, rollouts.think[:, 0]).mean()
        # The direct decoder follows the encoder that it shares, and does not pull at it.
        direct = -policy.target_logprob(encoded.detach(), target, decoder="direct").mean()
        metrics |= described | {"grpo": loss, "anchor": anchor, "direct": direct}
        return loss + config.anchor_weight * anchor + direct, metrics

    @torch.no_grad()
    def _judge(
        self, batch: Batch, encoded: Encoded, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Of the batch's rollouts: log-probabilities (B, G, l + m) under the reference, rewards
        (B, G), and what is logged of them."""
        frozen, _ = rollout_logprobs(
            self.reference, self.reference.encode(batch.history), self._rollouts,
            temperature=self.config.temperature,
        )  # fmt: skip
        terms = self.judge(
            batch.history, batch.target, self._rollouts, encoded, hidden, batch.targets,
            derive_seed(batch.seed, "pool"),
        )  # fmt: skip
        reward = self.judge.total(terms)
        return frozen, reward, _describe(terms, reward, self._rollouts)


def safe(metrics: Mapping[str, float], start: Mapping[str, float]) -> bool:
    """Whether weights may be kept: not where a higher ndcg@10 was paid for with recall@50."""
    return metrics["recall@50"] >= start["recall@50"]


def _describe(
    terms: dict[str, torch.Tensor], reward: torch.Tensor, rollouts: Rollout
) -> dict[str, torch.Tensor]:
    """Mean of each term, groups that teach nothing, failures to parse, and the entropy."""
    return {
        "reward": reward.mean(),
        **{f"reward/{name}": terms[name].mean() for name in rewards.TERMS},
        "zero_variance_groups": (reward == reward[:, :1]).all(1).float().mean(),
        "format_failures": (terms["items"] < 0).float().mean(),
        # The mean negative log-probability of sampled tokens estimates the entropy per token.
        "entropy": -rollouts.logprobs.mean(),
    }


def check_first(
    logprobs: torch.Tensor, behaviour: torch.Tensor, metrics: dict[str, torch.Tensor]
) -> None:
    """Refuse a first step (B, G, T) that is not on-policy, or not at its reference."""
    ratio = (logprobs.detach() - behaviour).sum(2).exp()
    off = float((ratio - 1).abs().max())
    if off > FIRST_RATIO or float(metrics["kl"]) > FIRST_KL:
        raise StreamctlError(
            f"GRPO must begin at its own reference, but the first ratio is off by {off:.1e} and "
            f"the KL is {float(metrics['kl']):.1e}: sampling and training disagree",
            run="report it, with the output of `streamctl doctor`",
        )
