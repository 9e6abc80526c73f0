"""Stage 3: group-relative policy optimisation of what is thought (GRPO, Eqs. 20-27)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from streamctl.config import RlConfig
from streamctl.decode.evidence import FULL, NOTHING, Weighed, weigh
from streamctl.decode.think import draw
from streamctl.device import autocast, resolve_device
from streamctl.errors import UsageError
from streamctl.model.policy import Policy
from streamctl.progress import say, warn
from streamctl.retrieval.evidence import Pieces
from streamctl.runs import RunDir, Stage
from streamctl.training import rewards
from streamctl.training.gathered import Gathered, last_positions
from streamctl.training.letter import rl as letter
from streamctl.training.loop import Batch, constant, fit
from streamctl.training.losses import advantages, grpo_loss
from streamctl.training.material import Material, save_policy
from streamctl.training.sft import choice_logprobs, only_thinking, target_logprob, weighing_loss
from streamctl.training.validation import Validator, validate


def sample_places(
    weighed: Weighed, group: int, length: int, temperature: float, batch: Batch
) -> torch.Tensor:
    """(B, G, l) int64, -1 for none: G thoughts of each user, chosen piece by piece without
    replacement from the weights."""
    generator = batch.generator("thoughts")
    logits = (weighed.logits / temperature)[:, None].expand(-1, group, -1)
    left = logits.masked_fill(torch.isinf(logits), -1e9)
    places = []
    for _ in range(min(length, logits.shape[-1])):
        place = draw(torch.log_softmax(left, -1), generator, batch.share)[..., None]
        there = left.gather(-1, place) > -1e8
        places.append(torch.where(there, place, -1))
        left = left.scatter(-1, place, -1e9)
    return torch.cat(places, -1)


@dataclass
class Explorer:
    """GRPO on which evidence to choose (Eq. 20), in the weights.

    Encoder, decoders and the direct path stay as they are, so that l = 0 answers as before.

    Attributes:
        reference: the SFT policy, frozen.
    """

    policy: Policy
    reference: Policy
    gathered: Gathered
    config: RlConfig
    think: int

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Eq. 20 on the rewards of Eqs. 22, 26 and 27 inside the evidence, and the anchor."""
        policy, config = self.policy, self.config
        pieces = self.gathered(batch.index.cpu().numpy())
        policy.eval()  # dropout would make sampling and training two different policies
        weighed = weigh(policy, pieces)
        if batch.update == 0:
            self._explored = self._explore(batch, pieces, weighed)
        places, behaviour, reference, terms = self._explored
        reward = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
        loss, metrics = grpo_loss(
            self._logprobs(weighed, places), behaviour, reference, advantages(reward),
            clip=config.clip, kl_weight=config.kl_weight, ratio=config.ratio,
        )  # fmt: skip
        anchor = weighing_loss(weighed, batch.target) / self.gathered.known
        metrics |= {"reward": reward.mean(), "anchor": anchor.detach()}
        metrics |= {f"reward/{name}": value.mean() for name, value in terms.items()}
        metrics["zero_variance_groups"] = (reward == reward[:, :1]).all(1).float().mean()
        return loss + config.anchor_weight * anchor, metrics

    def _logprobs(self, weighed: Weighed, places: torch.Tensor) -> torch.Tensor:
        """Log-probability of each choice (B, G, l)."""
        logits = weighed.logits[:, None].expand(-1, self.config.group, -1)
        return choice_logprobs(logits / self.config.temperature, places)

    @torch.no_grad()
    def _explore(self, batch: Batch, pieces: Pieces, weighed: Weighed) -> tuple:
        """Thoughts for all updates on a batch: their places, log-probabilities of the choices when
        they were drawn and under the reference, and their rewards."""
        config = self.config
        places = sample_places(weighed, config.group, self.think, config.temperature, batch)
        behaviour = self._logprobs(weighed, places)
        reference = self._logprobs(weigh(self.reference, pieces), places)
        return places, behaviour, reference, self.rewards(batch, weighed, places)

    def rewards(
        self, batch: Batch, weighed: Weighed, places: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Each term (B, G).

        likelihood: the gain in the target's log-probability over l = 0 (Eq. 26). ranking: the
        target's rank among the user's other pieces (Eq. 27). exact: codes of the thought's best
        item that are the target's, up to the first that differs (Eqs. 22-23).
        """
        policy, target = self.policy, batch.target
        users, count, length = places.shape
        thought = weighed.chosen(places.clamp(min=0))
        chosen = places >= 0
        flat = Weighed(
            *(
                field.flatten(0, 1)
                for field in (
                    thought.items.where(chosen, -1),
                    thought.hops.where(chosen, NOTHING),
                    thought.logits.where(chosen, -torch.inf),
                )
            )
        )
        with autocast(target.device):
            encoded = policy.encode(batch.history)
            direct = policy.target_logprob(encoded, target, decoder="direct").float()
            each = encoded.rows(torch.arange(users, device=target.device).repeat_interleave(count))
            wanted = target.repeat_interleave(count)
            chance = target_logprob(policy, each, flat, wanted).view(users, count)
        mine = flat.logprob(wanted[:, None])
        rank = rewards.target_rank(
            mine[:, 0], flat.logits.masked_fill(flat.items == wanted[:, None], -torch.inf)
        ).view(users, count)
        rank = torch.where(torch.isinf(mine.view(users, count)), length + 1, rank)
        best = flat.items.gather(1, flat.logits.argmax(1, keepdim=True)).clamp(min=0)
        codes = policy.item_tokens[best[:, 0]].view(users, count, -1)
        return {
            "likelihood": rewards.likelihood_reward(chance, direct),
            "ranking": rewards.ranking_reward(rank, length),
            "exact": rewards.exact_match_reward(codes, policy.item_tokens[target]),
        }


def rl(run: RunDir, config: RlConfig, *, device: str = "auto", force: bool = False) -> Stage:
    """GRPO from the SFT policy; ends with the weights that validate best, SFT's own included.

    Every `validate_every` steps the policy ranks for validation users; after `patience` times
    without a better ndcg@10 the stage rolls back to the best and stops. Writes the policy and
    report.json.

    With evidence the weighing learns which pieces to choose. By the letter the whole policy learns
    from sampled thoughts and codes, weights count as better only with recall@50 at SFT's or above,
    and two defaults depart from the paper: codes are sampled inside the catalogue (`rollouts=free`
    samples from the whole vocabulary, where Eq. 21 is what GRPO then learns), and the target's
    cross-entropy is kept beside Eq. 20 as an anchor (`anchor_weight=0` drops it).
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
        reference = material.policy(run.stage("sft"), where).requires_grad_(False)
        options: dict[str, Any] = {"examples": material.split.train}
        if policy.config.thoughts == "evidence":
            rows = last_positions(material.split.train, 1)
            gathered = Gathered(material.evidence, material.split.train.subset(rows))
            explorer = Explorer(only_thinking(policy), reference, gathered, config, config.think)
            options["examples"] = gathered.examples
            options["validate"] = lambda: validate(policy, material, config.seed, FULL)
        else:
            length = run.stage("annotate").manifest["config"]["length"]
            explorer = _by_letter(config, material, policy, reference, length)
            validator = Validator(policy, material, config.seed)
            options["validate"] = lambda: validator(think=length, deep=True)
            options |= {"safe": letter.safe, "schedule": constant}
        result = fit(
            stage, policy, config, loss=explorer.loss, device=where, start=True,
            steps=config.steps, validate_every=config.validate_every, repeats=config.updates,
            title="rl", bf16=False, **options,
        )  # fmt: skip
        report = {
            "steps": result.steps,
            "best_step": int(result.validations[result.best_epoch + 1]["step"]),
            "valid": {"start": result.start, "best": result.best},
            "validations": result.validations,
        }
        if result.best_epoch < 0:
            warn("rl: no step validated better than SFT; the SFT weights are kept")
        save_policy(stage, policy)
        stage.save_json("report.json", report)
        stage.publish(**report)
        masked = "masked " if policy.config.thoughts == "evidence" else ""
        before, after = result.start["ndcg@10"], result.best["ndcg@10"]
        say(f"rl: {masked}ndcg@10 {before:.4f} -> {after:.4f} on validation users")
    return run.stage("rl")


def _by_letter(
    config: RlConfig, material: Material, policy: Policy, reference: Policy, length: int
) -> letter.Explorer:
    """What explores thoughts of the vocabulary, `length` tokens each."""
    if config.rollouts == "free" and policy.config.softmax == "catalogue":
        raise UsageError(
            "rollouts=free samples from the vocabulary, of which a policy trained with "
            "softmax=catalogue knows nothing; pretrain with --set softmax=vocabulary for it"
        )
    parser = rewards.ItemParser(policy.item_tokens, policy.tokens.size)
    look_alikes = material.look_alikes(policy.device, config.negatives)
    judge = letter.Judge(policy, reference, parser, look_alikes, config)
    trie = material.trie if config.rollouts == "catalogue" else None
    return letter.Explorer(policy, reference, judge, config, length, trie)
