"""Stage 3: group-relative policy optimisation on five rewards (Eqs. 20-27)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from streamctl.config import RlConfig
from streamctl.data.split import Examples
from streamctl.decode.evidence import FULL
from streamctl.decode.sample import Rollout, rollout, rollout_logprobs
from streamctl.device import autocast, derive_seed, resolve_device
from streamctl.distributed import ranks
from streamctl.errors import StreamctlError, UsageError
from streamctl.model.candidates import thoughts_logprob
from streamctl.model.policy import Encoded, Policy
from streamctl.progress import progress_bar, say, warn
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training import checkpoint, rewards
from streamctl.training.loop import CHECKPOINT_EVERY_S, CLIP_NORM, MetricLog, batches, fit
from streamctl.training.losses import advantages, grpo_loss
from streamctl.training.material import Material, save_policy
from streamctl.training.thinking import (
    Explorer,
    Gathered,
    last_positions,
    only_thinking,
    validate,
)
from streamctl.training.validation import Validator

SMALLEST_POOL = 128  # representations that Eq. 25 compares with
RANKED_TOGETHER = 64  # rollouts whose negatives are scored in one call
FIRST_RATIO = 1e-3  # how far rounding may carry the first ratio from 1
FIRST_KL = 1e-6


@dataclass(frozen=True)
class Judge:
    """Scores rollouts with the five rewards; nothing here carries a gradient.

    Attributes:
        policy: in training; Eqs. 26 and 27 ask its current likelihoods.
        reference: the frozen SFT policy; its direct decoder is Eq. 26's reference.
        parser: from codes to items. look_alikes: (N, K) hard negatives of Eq. 27.
    """

    policy: Policy
    reference: Policy
    parser: rewards.ItemParser
    look_alikes: torch.Tensor
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

        Args:
            encoded: the users under the policy. hidden: (B, G, T, d) its states at the positions
                that predicted the rollouts' tokens. targets: (T,) of the whole batch, T = B in one
                process. seed: of the pool of Eq. 25.
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
        found = []
        users = torch.arange(len(target), device=target.device)
        for rows in users.split(max(1, RANKED_TOGETHER // rollouts.group)):
            with autocast(target.device):
                found.append(
                    thoughts_logprob(
                        self.policy, encoded.rows(rows), candidates[rows], rollouts.think[rows]
                    )
                )
        scores = torch.cat(found)
        return scores[..., 0], rewards.target_rank(scores[..., 0], scores[..., 1:])


@dataclass
class Progress:
    """Counters of an RL run; together with weights and moments the whole state."""

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    start: dict[str, float] = field(default_factory=dict)
    validations: list[dict[str, float]] = field(default_factory=list)
    misses: int = 0
    stopped: bool = False


class Trainer:
    """GRPO on one policy.

    Dropout is off in rollouts and updates alike, and both run in fp32, so that the ratio is 1 and
    the KL 0 at the first step; anything else is an error in the arithmetic and raises.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy,
        judge: Judge,
        config: RlConfig,
        think: int,
        trie: PrefixTrie,
    ):
        self.trie = trie if config.rollouts == "catalogue" else None
        self.policy, self.reference, self.judge = policy, reference, judge
        self.config, self.think = config, think
        self.optimizer = checkpoint.adamw(policy.parameters(), config.lr, config.weight_decay)
        self.progress = Progress()
        self.best_weights = checkpoint.snapshot(policy)

    def step(self, history: torch.Tensor, targets: torch.Tensor, seed: int) -> dict[str, float]:
        """Sample a group for each user, judge it, and update; histories have one length.

        Under torchrun each process does this for its share of the users.
        """
        config, policy = self.config, self.policy
        share = ranks().share(len(targets))
        history, target = share.of(history), share.of(targets)
        policy.eval()
        rollouts = rollout(
            policy, history, group=config.group, think=self.think,
            temperature=config.temperature, seed=derive_seed(seed, "rollout"), bf16=False,
            trie=self.trie,
            share=share,
        )  # fmt: skip
        with torch.no_grad():
            frozen, _ = rollout_logprobs(
                self.reference, self.reference.encode(history), rollouts,
                temperature=config.temperature,
            )  # fmt: skip
        metrics: dict[str, torch.Tensor] = {}
        for update in range(config.updates):
            encoded = policy.encode(history)
            logprobs, hidden = rollout_logprobs(
                policy, encoded, rollouts, temperature=config.temperature
            )
            if update == 0:
                terms = self.judge(
                    history, target, rollouts, encoded.detach(), hidden, targets,
                    derive_seed(seed, "pool"),
                )  # fmt: skip
                reward = self.judge.total(terms)
                advantage = advantages(reward)
                metrics = _describe(terms, reward, rollouts)
            loss, found = grpo_loss(
                logprobs, rollouts.logprobs, frozen, advantage, clip=config.clip,
                kl_weight=config.kl_weight, ratio=config.ratio,
            )  # fmt: skip
            if update == 0:
                metrics |= found
                if self.progress.step == 0:
                    _check_first(logprobs, rollouts.logprobs, found)
            anchor = -policy.target_logprob(encoded, target, rollouts.think[:, 0]).mean()
            # The direct decoder follows the encoder that it shares, and does not pull at it.
            direct = -policy.target_logprob(encoded.detach(), target, decoder="direct").mean()
            metrics |= {name: value.detach() for name, value in
                        (("anchor", anchor), ("direct", direct), ("loss", loss))}  # fmt: skip
            # A batch that came out smaller counts by its size.
            scale = share.weight / config.batch
            ((loss + config.anchor_weight * anchor + direct) * scale).backward()
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            ranks().sum_gradients(trained)
            nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)  # their memory serves the next rollouts
        self.progress.step += 1
        return {name: float(value) for name, value in ranks().mean(metrics, share).items()}

    def judge_weights(self, found: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; stop after `patience` that are not.

        Weights count as better when ndcg@10 rises and recall@50 is no lower than SFT's.
        """
        state = self.progress
        state.validations.append({"step": state.step, **found})
        if not state.start:
            state.start = state.best = found
            return
        safe = found["recall@50"] >= state.start["recall@50"]
        if safe and found["ndcg@10"] > state.best["ndcg@10"]:
            state.best, state.best_step, state.misses = found, state.step, 0
            self.best_weights = checkpoint.snapshot(self.policy)
        else:
            state.misses += 1
            state.stopped = 0 < self.config.patience <= state.misses

    def save(self, stage: StageWriter) -> None:
        tensors = checkpoint.prefixed("policy", checkpoint.weights(self.policy))
        tensors |= checkpoint.prefixed("best", self.best_weights)
        tensors |= checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer))
        stage.save_checkpoint(tensors, vars(self.progress))

    def load(self, stage: StageWriter) -> None:
        loaded = stage.load_checkpoint()
        if loaded is None:
            return
        tensors, meta = loaded
        checkpoint.restore(self.policy, checkpoint.take("policy", tensors))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.take("optimizer", tensors))
        device = self.policy.item_tokens.device
        best = checkpoint.take("best", tensors)
        self.best_weights = {name: tensor.to(device) for name, tensor in best.items()}
        self.progress = Progress(**meta)


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


def _check_first(
    logprobs: torch.Tensor, behaviour: torch.Tensor, found: dict[str, torch.Tensor]
) -> None:
    ratio = (logprobs.detach() - behaviour).sum(2).exp()
    off = float((ratio - 1).abs().max())
    if off > FIRST_RATIO or float(found["kl"]) > FIRST_KL:
        raise StreamctlError(
            f"GRPO must begin at its own reference, but the first ratio is off by {off:.1e} and "
            f"the KL is {float(found['kl']):.1e}: sampling and training disagree"
        )


def user_batches(examples: Examples, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of rows of one history length, epoch after epoch."""
    for epoch in itertools.count():
        yield from batches(examples.lengths, batch, seed, epoch)


def rl(run: RunDir, config: RlConfig, *, device: str = "auto", force: bool = False) -> Stage:
    """GRPO from the SFT policy; ends with the weights that validate best, SFT's own included.

    Every `validate_every` steps ndcg@10 and recall@50 are measured on validation users. Weights
    are kept when ndcg@10 rises and recall@50 stays at SFT's or above; after `patience` validations
    without that the stage rolls back to the best and stops. Writes the policy and report.json.

    Two defaults depart from the paper's letter: codes are sampled inside the catalogue
    (`rollouts=free` samples from the whole vocabulary, where Eq. 21 is what GRPO then learns), and
    the target's cross-entropy is kept beside Eq. 20 as an anchor (`anchor_weight=0` drops it).
    """
    parents = ["data", "tokenizer", "annotate", "sft"]
    config = config.settled(run.require("pretrain").manifest["config"]["thoughts"])
    with run.begin("rl", config, parents, force=force) as stage:
        if stage is None:
            say("rl: complete already")
            return run.stage("rl")
        where = resolve_device(device)
        material = Material.load(run)
        policy = material.policy(run.stage("sft"), where)
        if policy.config.thoughts == "evidence":
            _with_evidence(run, stage, config, material, policy, where)
            return run.stage("rl")
        if config.rollouts == "free" and policy.config.softmax == "catalogue":
            raise UsageError(
                "rollouts=free samples from the vocabulary, of which a policy trained with "
                "softmax=catalogue knows nothing; pretrain with --set softmax=vocabulary for it"
            )
        reference = material.policy(run.stage("sft"), where).requires_grad_(False)
        parser = rewards.ItemParser(policy.item_tokens, policy.tokens.size)
        look_alikes = material.look_alikes(where, config.negatives)
        think = run.stage("annotate").manifest["config"]["length"]
        judge = Judge(policy, reference, parser, look_alikes, config)
        trainer = Trainer(policy, reference, judge, config, think, material.trie)
        validator = Validator(policy, material, config.seed)
        train(stage, trainer, material.split.train, validator, where)
        checkpoint.restore(policy, trainer.best_weights)
        policy.eval()
        state = trainer.progress
        report: dict[str, Any] = {
            "steps": state.step,
            "best_step": state.best_step,
            "valid": {"start": state.start, "best": state.best},
            "validations": state.validations,
        }
        if state.best_step == 0:
            warn("rl: no step validated better than SFT; the SFT weights are kept")
        save_policy(stage, policy)
        stage.save_json("report.json", report)
        stage.publish(**report)
        say(
            f"rl: ndcg@10 {state.start['ndcg@10']:.4f} -> {state.best['ndcg@10']:.4f}, recall@50 "
            f"{state.start['recall@50']:.4f} -> {state.best['recall@50']:.4f} on validation users"
        )
    return run.stage("rl")


def train(
    stage: StageWriter,
    trainer: Trainer,
    examples: Examples,
    validator: Validator,
    device: torch.device,
) -> None:
    """Run, resume and guard the steps; the best weights are in `trainer.best_weights`."""
    config = trainer.config
    trainer.load(stage)
    log = MetricLog(stage)
    saved_at = time.monotonic()
    order = itertools.islice(
        user_batches(examples, config.batch, config.seed), trainer.progress.step, None
    )
    with progress_bar("rl", config.steps, "steps") as bar:
        bar.start_at(trainer.progress.step)
        if not trainer.progress.start:
            trainer.judge_weights(validator(think=trainer.think, deep=True))
        while trainer.progress.step < config.steps and not trainer.progress.stopped:
            rows = next(order)
            history = torch.from_numpy(examples.histories(rows)).to(device)
            target = torch.from_numpy(examples.targets[rows]).to(device)
            step = trainer.progress.step
            metrics = trainer.step(history, target, derive_seed(config.seed, "step", step))
            log(step, step=step, **metrics, wall_s=round(stage.wall_s(), 1))
            bar.note(f"reward {metrics['reward']:.3f} kl {metrics['kl']:.4f}")
            bar.advance()
            done = trainer.progress.step
            if done % config.validate_every == 0 or done == config.steps:
                found = validator(think=trainer.think, deep=True)
                trainer.judge_weights(found)
                log(done, validated=done, **found)
                trainer.save(stage)
                saved_at = time.monotonic()
            elif ranks().agree(time.monotonic() - saved_at > CHECKPOINT_EVERY_S):
                trainer.save(stage)
                saved_at = time.monotonic()


def _with_evidence(
    run: RunDir,
    stage: StageWriter,
    config: RlConfig,
    material: Material,
    policy: Policy,
    device: torch.device,
) -> None:
    """GRPO on which evidence to choose; the SFT weights stay where nothing validates better."""
    rows = last_positions(material.split.train, 1)
    gathered = Gathered(material.evidence, material.split.train.subset(rows))
    reference = material.policy(run.stage("sft"), device).requires_grad_(False)
    explorer = Explorer(only_thinking(policy), reference, gathered, config, config.think)
    result = fit(
        stage, policy, config, loss=explorer.loss, examples=gathered.examples, device=device,
        validate=lambda: validate(policy, material, config.seed, FULL), start=True,
        steps=config.steps, validate_every=config.validate_every, repeats=config.updates,
        title="rl", bf16=False,
    )  # fmt: skip
    report = {
        "steps": result.steps,
        "best_step": max(result.best_epoch + 1, 0) * config.validate_every,
        "valid": {"start": result.start, "best": result.best},
        "validations": result.validations,
    }
    if result.best_epoch < 0:
        warn("rl: no step validated better than SFT; the SFT weights are kept")
    save_policy(stage, policy)
    stage.save_json("report.json", report)
    stage.publish(**report)
    say(
        f"rl: masked ndcg@10 {result.start['ndcg@10']:.4f} -> {result.best['ndcg@10']:.4f} on "
        "validation users"
    )
