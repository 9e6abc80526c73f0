"""The RL cases of benchmarks/train.py: a GRPO step, and the ranking of negatives inside it.

`rl/ranking`: log-probabilities of a target and 50 negatives for each rollout's thought, codes
normalised over the catalogue's continuations, against one pass of encoder and decoder a candidate.
`rl/step`: a whole step (rollouts, rewards, update) against the same on transformers: the user
encoded again for every rollout, sampling by `generate`, that ranking, a plain backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import peers
import torch
from torch import nn

from streamctl.config import RlConfig
from streamctl.model import Policy
from streamctl.model.candidates import thoughts_logprob
from streamctl.tokenizer import Tokens
from streamctl.training import checkpoint, rewards
from streamctl.training.loop import CLIP_NORM
from streamctl.training.losses import advantages
from streamctl.training.rl import Judge, Trainer

NEGATIVES, THINK, USERS, GROUP = 50, 4, 2, 16


@dataclass(frozen=True)
class Naive:
    """RL on transformers' model of the same weights, nothing shared."""

    policy: Policy  # its catalogue alone is used
    oracle: nn.Module
    history: torch.Tensor  # (USERS * GROUP, H), each user once a rollout
    device: str

    def logits(self, oracle: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        given = peers.encoder_inputs(self.policy, self.history)
        return oracle(**given, decoder_input_ids=inputs).logits.float()

    @torch.no_grad()
    def ranking(self, candidates: torch.Tensor, think: torch.Tensor) -> torch.Tensor:
        """(USERS * GROUP, K): candidates (USERS, K), think (USERS * GROUP, l)."""
        scores = []
        legal_codes = self.policy.legal
        for column in candidates.T:
            column = column.repeat_interleave(GROUP)
            inputs, labels = self.policy.target_inputs(column, think)
            with peers.bf16(self.device):
                logits = self.logits(self.oracle, inputs)
            total = torch.zeros(len(column), device=self.device)
            for level in range(peers.LEVELS):
                low, high = self.policy.tokens.level_range(level)
                place = level - peers.LEVELS
                legal = legal_codes.after(legal_codes.prefix[column, level], high - low)
                table = logits[:, place, low:high].masked_fill(~legal, -torch.inf)
                total += torch.log_softmax(table, -1).gather(1, labels[:, place, None] - low)[:, 0]
            scores.append(total)
        return torch.stack(scores, 1)

    def step(self, reference: nn.Module, optimizer, candidates: torch.Tensor) -> None:
        length = THINK + 1 + peers.LEVELS
        sequence = self.oracle.generate(
            **peers.encoder_inputs(self.policy, self.history),
            decoder_start_token_id=Tokens.THINK, do_sample=True, top_k=0,
            min_new_tokens=length, max_new_tokens=length,
        )  # fmt: skip
        inputs, drawn = sequence[:, :-1], sequence[:, 1:, None]
        with torch.no_grad():
            frozen = torch.log_softmax(self.logits(reference, inputs), -1).gather(-1, drawn)
        low, high = self.policy.tokens.think_range
        scores = self.ranking(candidates, sequence[:, 1 : THINK + 1].clamp(low, high - 1))
        rank = rewards.target_rank(scores[:, 0], scores[:, 1:]).view(USERS, GROUP)
        gained = advantages(rewards.ranking_reward(rank, NEGATIVES)).flatten()
        logprobs = torch.log_softmax(self.logits(self.oracle, inputs), -1).gather(-1, drawn)
        kl = (frozen - logprobs).exp() - (frozen - logprobs) - 1
        ratio = (logprobs - logprobs.detach()).sum((1, 2)).exp()
        optimizer.zero_grad(set_to_none=True)
        (1e-3 * kl.mean() - (ratio * gained).mean()).backward()
        nn.utils.clip_grad_norm_(self.oracle.parameters(), CLIP_NORM)
        optimizer.step()


def rows(device: str, repeats: int, only: str, now) -> list[dict]:
    """Those of the two cases whose names begin with `only`."""
    policy = peers.paper_policy(device, softmax="catalogue")
    oracle = peers.transformers_model(policy)
    length = int(np.median(peers.real_lengths()[0]))
    history = peers.histories(np.full(USERS, length), 5).to(device)
    generator = torch.Generator().manual_seed(6)
    target = torch.randint(peers.ITEMS, (USERS,), generator=generator).to(device)
    look_alikes = torch.randint(peers.ITEMS, (peers.ITEMS, NEGATIVES), generator=generator)
    look_alikes = look_alikes.to(device)
    candidates = torch.cat([target[:, None], look_alikes[target]], 1)
    low, high = policy.tokens.think_range
    think = torch.randint(low, high, (USERS, GROUP, THINK), generator=generator).to(device)
    naive = Naive(policy, oracle, history.repeat_interleave(GROUP, 0), device)

    @torch.no_grad()
    def shared() -> torch.Tensor:
        with peers.bf16(device):
            return thoughts_logprob(policy, policy.encode(history), candidates, think).flatten(0, 1)

    def each() -> torch.Tensor:
        return naive.ranking(candidates, think.flatten(0, 1))

    if (shared() - each()).abs().max() > 1.0:  # sums of four bf16 log-probabilities
        raise SystemExit("log-probabilities of the negatives differ from transformers': no figures")
    cases = {"rl/ranking": {"streamctl": shared, "a pass for each candidate": each}}

    config = RlConfig(batch=USERS, group=GROUP)
    learner = peers.paper_policy(device, softmax="catalogue")
    parser = rewards.ItemParser(policy.item_tokens, policy.tokens.size)
    judge = Judge(learner, policy, parser, look_alikes, config)
    trainer = Trainer(learner, policy, judge, config, THINK, peers.catalogue(policy))
    reference = peers.transformers_model(policy)
    optimizer = checkpoint.adamw(oracle.parameters(), config.lr, config.weight_decay)
    cases["rl/step"] = {
        "streamctl": lambda: trainer.step(history, target, 7),
        "transformers, nothing shared": lambda: naive.step(reference, optimizer, candidates),
    }
    found = []
    for case, turns in cases.items():
        if case.startswith(only):
            seconds = peers.take_turns(turns, repeats, now)
            line = peers.row(case, seconds, USERS * GROUP, "rollouts/s", candidates=1 + NEGATIVES)
            line |= {"peak_mb": peers.peak_mb(turns), "profile": peers.profile(turns["streamctl"])}
            found.append(line)
    return found
