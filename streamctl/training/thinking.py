"""Thinking with evidence: its part of each stage (pretrain, annotate, SFT, RL)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from streamctl.config import AnnotateConfig, RlConfig, SftConfig
from streamctl.data.split import Examples
from streamctl.decode.evidence import (
    FULL,
    NOTHING,
    EvidenceRecommender,
    Weighed,
    log_odds,
    mixed,
    read_thought,
    weigh,
)
from streamctl.decode.think import draw
from streamctl.device import autocast, derive_seed
from streamctl.distributed import ranks
from streamctl.model.policy import Encoded, Policy
from streamctl.ranking import evaluate, gains, target_ranks
from streamctl.ranking.evaluate import batches_by_length
from streamctl.retrieval.evidence import SIZES, Evidence, Pieces
from streamctl.training import rewards
from streamctl.training.loop import Batch
from streamctl.training.losses import advantages, grpo_loss, quantization_loss, state_target_loss
from streamctl.training.material import Material

BUDGETS = (1, 2, 4, 8, 16, 32, 64)  # a batch draws one, so that one model serves every length
TOGETHER = 1024  # histories gathered at a time
KEPT = 2 << 30  # bytes of evidence kept in memory; above it is gathered again for every batch
VALIDATION_USERS = 2000
REPEATS_OF, REPEATED = 20_000, 0.01  # examples looked at; share of repeats that makes own a hop
OWN = 8  # its pieces
SAMPLE = 4096


def last_positions(examples: Examples, count: int) -> np.ndarray:
    """int64: the rows of each user's last `count` training targets."""
    ends = np.flatnonzero(np.append(examples.users[1:] != examples.users[:-1], True))
    last = np.repeat(ends, np.diff(ends, prepend=-1))
    return np.flatnonzero(last - np.arange(len(examples)) < count)


def suitable_hops(examples: Examples) -> tuple[int, ...]:
    """The sizes of the hops; own items are evidence where one target in a hundred is one."""
    some = np.random.default_rng(0).permutation(len(examples))[:REPEATS_OF]
    had = (examples.histories(some) == examples.targets[some][:, None]).any(1).mean()
    return (*SIZES[:-1], OWN if had >= REPEATED else SIZES[-1])


class Gathered:
    """The evidence of training examples, each gathered without its own user's pairs and rows.

    As in serving: the history before the target, and everything that other users took.
    """

    def __init__(self, evidence: Evidence, examples: Examples):
        self.evidence, self.examples = evidence, examples

    def gather(self, index: np.ndarray) -> Pieces:
        examples = self.examples
        return self.evidence.gather(examples.histories(index), examples.users[index])

    @cached_property
    def _kept(self) -> Pieces | None:
        rows = np.arange(len(self.examples))
        one = self.gather(rows[:1])
        size = sum(getattr(one, name).nbytes for name in one.__dataclass_fields__)
        if size * len(rows) > KEPT:
            return None
        parts = [self.gather(rows[at : at + TOGETHER]) for at in range(0, len(rows), TOGETHER)]
        return Pieces(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in one.__dataclass_fields__
            )
        )

    @cached_property
    def known(self) -> float:
        """The share of examples whose target is among their evidence, by a sample of them."""
        rows = np.arange(0, len(self.examples), len(self.examples) // SAMPLE + 1)
        hit = self(rows).items == self.examples.targets[rows, None]
        return max(float(hit.any(1).mean()), 1 / SAMPLE)

    def __call__(self, index: np.ndarray) -> Pieces:
        """The pieces of the examples `index` (B,)."""
        return self.gather(index) if self._kept is None else self._kept.rows(index)


def first_pieces(evidence: Evidence, examples: Examples, count: int) -> torch.Tensor:
    """int64 (E, count, 2): items and hops of each example's first pieces, in the hops' order."""
    count = min(count, sum(evidence.sizes))
    found = torch.full((len(examples), count, 2), -1, dtype=torch.int64)
    for at in range(0, len(examples), TOGETHER):
        index = np.arange(at, min(at + TOGETHER, len(examples)))
        pieces = evidence.gather(examples.histories(index), examples.users[index])
        for column, field in enumerate((pieces.items, pieces.hops)):
            found[index, :, column] = torch.from_numpy(field[:, :count].astype(np.int64))
    return found


@torch.no_grad()
def standardise(policy: Policy, material: Material, rows: np.ndarray) -> None:
    """Give the weighing the scale of its features, from some training examples."""
    pieces = Gathered(material.evidence, material.split.train.subset(rows)).gather(
        np.arange(len(rows))
    )
    features = torch.from_numpy(pieces.features()).to(policy.device)
    policy.weighing.standardise(features, torch.from_numpy(pieces.items >= 0).to(policy.device))


def validate(
    policy: Policy, material: Material, seed: int, think: int, mix: str = "item"
) -> dict[str, float]:
    """Masked ndcg@10 and recall@10 of a fixed sample of validation users."""
    examples = material.split.valid
    random = np.random.default_rng(derive_seed(seed, "validation users"))
    rows = np.sort(random.permutation(len(examples))[:VALIDATION_USERS])
    training = policy.training
    policy.eval()
    thinker = EvidenceRecommender(
        policy, material.trie, material.evidence, think=think, beam=20, mix=mix
    )
    found = evaluate(
        thinker, examples.subset(rows), n_items=material.split.n_items, masked=True, title="valid"
    )
    policy.train(training)
    return {name: found.metrics[name] for name in ("ndcg@10", "recall@10")}


SHIFTS = (-8.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 1.0)


@torch.no_grad()
def calibrate(policy: Policy, material: Material, seed: int) -> dict[str, float]:
    """Shift the odds of the codes against the thought by what ranks best on validation users.

    Likelihood alone trusts the codes too much: it pays them for every target that no hop found,
    wherever it ranks. Returns masked ndcg@10 by shift.
    """
    examples = material.split.valid
    random = np.random.default_rng(derive_seed(seed, "validation users"))
    rows = np.sort(random.permutation(len(examples))[:VALIDATION_USERS])
    policy.eval()
    thinker = EvidenceRecommender(policy, material.trie, material.evidence, beam=20)
    total = np.zeros(len(SHIFTS))
    for index in ranks().mine(list(batches_by_length(examples.lengths[rows], 256))):
        some = rows[index]
        parts = thinker.parts(
            torch.from_numpy(examples.histories(some)), examples.users[some], 20, FULL,
            examples.seen(some),
        )  # fmt: skip
        for place, shift in enumerate(SHIFTS):
            found = parts.best(10, shift).items.cpu().numpy()
            total[place] += gains(target_ranks(found, examples.targets[some]), 10).sum()
    total = ranks().sum(total) / len(rows)
    policy.weighing.codes_trust.bias += max(zip(total, SHIFTS, strict=True))[1]
    return {f"{shift:+.1f}": float(value) for shift, value in zip(SHIFTS, total, strict=True)}


# --- annotate ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """What iterative inference inside the evidence went through.

    Attributes:
        places: (B, l) int64, which piece each step chose; -1 once none is left.
        states: (B, l + 1, d). residuals: (B, l, d). target: (B, d).
    """

    places: torch.Tensor
    states: torch.Tensor
    residuals: torch.Tensor
    target: torch.Tensor


def infer(
    policy: Policy, encoded: Encoded, found: Weighed, targets: torch.Tensor, length: int
) -> Inference:
    """Annotate users with the pieces of their own evidence that lead to their targets.

        s_0 = MLP_s(d_0);  r_i = MLP_r(t - s_{i-1});  o_i = the piece not yet chosen whose vector
        is nearest to r_i (Eq. 12);  d_i = the decoder's state at o_i;
        s_i = MLP_s(d_0 + ... + d_i)

    Vectors, states and target are taken to unit length. A step says at most log2 |evidence| bits
    of the target, and everything it says can be found again when serving.
    """
    thinker = policy.thinker
    vectors = F.normalize(policy.item_vectors(found.items.clamp(min=0)).detach().float(), dim=-1)
    free = found.items >= 0
    target = policy.item_vectors(targets).detach().float()
    total = encoded.mean().float()
    states, residuals, places = [thinker.state(total)], [], []
    feed = torch.full((len(targets), 1, 1), policy.tokens.THINK, device=targets.device)
    _, past = policy.extend(encoded, feed)
    for _ in range(length):
        residual = thinker.residual(target, states[-1])
        residuals.append(residual)
        near = (vectors - residual.detach()[:, None]).square().sum(-1)
        place = near.masked_fill(~free, torch.inf).argmin(1, keepdim=True)
        any_left = free.any(1, keepdim=True)
        free = free.scatter(1, place, False)
        places.append(torch.where(any_left, place, -1))
        item = found.items.gather(1, place).where(any_left, -1)
        hop = found.hops.gather(1, place).where(any_left, NOTHING)
        hidden, past = policy.extend(encoded, policy.piece_vectors(item, hop)[:, None], past=past)
        total = total + hidden[:, 0, 0].float()
        states.append(thinker.state(total))
    return Inference(
        torch.cat(places, 1), torch.stack(states, 1), torch.stack(residuals, 1), target
    )


def heads_loss(
    policy: Policy, batch: Batch, gathered: Gathered, config: AnnotateConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eqs. 14 and 15 for MLP_s and MLP_r alone, on thoughts that are made on the way."""
    with torch.no_grad():
        encoded = policy.encode(batch.history)
        found = weigh(policy, gathered(batch.index.cpu().numpy()))
    steps = infer(policy, encoded, found, batch.target, config.length)
    items = found.items.gather(1, steps.places.clamp(min=0)).clamp(min=0)
    vectors = F.normalize(policy.item_vectors(items).float(), dim=-1)
    targets = policy.item_vectors(batch.targets).float()
    state = state_target_loss(steps.states, targets, batch.targets, first=batch.share.first)
    quant = quantization_loss(steps.residuals, vectors)
    return state + quant, {"state": state, "quant": quant}


@torch.no_grad()
def label_all(
    policy: Policy, gathered: Gathered, length: int, batch: int
) -> tuple[np.ndarray, dict[str, float]]:
    """int32 (E, l) places among the pieces of each example, and how often the target is chosen."""
    examples = gathered.examples
    labels = np.zeros((len(examples), length), np.int32)
    counts = np.zeros(2)  # examples whose target is chosen, and whose target is there
    order = np.argsort(examples.lengths, kind="stable")
    policy.eval()
    with autocast(policy.device):
        for index in ranks().mine(np.array_split(order, max(1, -(-len(order) // batch)))):
            history = torch.from_numpy(examples.histories(index)).to(policy.device)
            targets = torch.from_numpy(examples.targets[index]).to(policy.device)
            found = weigh(policy, gathered(index))
            steps = infer(policy, policy.encode(history), found, targets, length)
            labels[index] = steps.places.cpu().numpy()
            chosen = found.items.gather(1, steps.places.clamp(min=0))
            hit = ((chosen == targets[:, None]) & (steps.places >= 0)).any(1)
            known = (found.items == targets[:, None]).any(1)
            counts += [int(hit.sum()), int(known.sum())]
    hit, known = (ranks().sum(counts) / max(len(examples), 1)).tolist()
    return ranks().sum(labels), {
        "examples": len(examples),
        "targets_in_evidence": known,
        "targets_chosen": hit,
        "collapsed": False,
    }


# --- SFT --------------------------------------------------------------------------------------


@dataclass
class Tuner:
    """The loss of SFT with evidence.

    Attributes:
        gathered: evidence of the examples. labels: (E, l) places from annotate.
        held: (E,) bool, examples whose targets pretraining has not seen: there the codes are as
            unsure as in serving, so that only these teach how far to trust them.
    """

    policy: Policy
    gathered: Gathered
    labels: torch.Tensor
    held: torch.Tensor
    config: SftConfig

    def __post_init__(self) -> None:
        # Means over all examples, not over a batch's: several processes have the loss of one.
        self._held = float(self.held.double().mean())

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-log P(target) under the policy's own thought, cross-entropy of the weights, labels.

        The thought has a length drawn for the batch; its order is that of the weights.
        """
        policy, config, index = self.policy, self.config, batch.index.cpu()
        # Only the weighing is trained: the codes are as sure as in serving.
        policy.eval().weighing.train()
        found = weigh(policy, self.gathered(index.numpy()))
        terms = {
            "weigh": weighing_loss(found, batch.target) / self.gathered.known,
            "label": label_loss(found, self.labels[index].to(batch.target.device)),
        }
        held = self.held[index].to(batch.target.device)
        terms["target"] = found.logits.new_zeros(())
        if bool(held.any()):
            generator = batch.generator("budget")
            budget = BUDGETS[int(torch.randint(len(BUDGETS), (), generator=generator))]
            rows = held.nonzero()[:, 0]
            some = Weighed(found.items[rows], found.hops[rows], found.logits[rows])
            with torch.no_grad():
                encoded = policy.encode(batch.history[rows])
            chance = target_logprob(policy, encoded, some.heaviest(budget), batch.target[rows])
            terms["target"] = -chance.sum() / (len(batch) * self._held)
        value = terms["target"] + config.weigh_weight * terms["weigh"]
        return value + config.label_weight * terms["label"], terms


def weighing_loss(found: Weighed, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the weights, 0 for users whose target is not among their evidence."""
    hit = found.items == target[:, None]
    known = hit.any(1)
    logits = found.logits.masked_fill(torch.isinf(found.logits), -1e9)
    loss = F.cross_entropy(logits, hit.int().argmax(1), reduction="none")
    return (loss * known).mean()


def label_loss(found: Weighed, labels: torch.Tensor) -> torch.Tensor:
    """-log of the chance to choose the labelled pieces one after the other, a step (Eq. 19's L_SFT
    inside the evidence). labels: (B, l) int64 places, -1 for none."""
    return -choice_logprobs(found.logits, labels).mean()


def choice_logprobs(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """log-probability of each choice without replacement.

    Args:
        logits: (..., C), -inf for no piece. places: (..., l) int64, -1 where nothing was chosen.

    Returns:
        (..., l) float32, 0 where nothing was chosen.
    """
    logits = logits.masked_fill(torch.isinf(logits), -1e9)
    chosen = []
    for step in range(places.shape[-1]):
        place = places[..., step : step + 1]
        there = place >= 0
        place = place.clamp(min=0)
        share = torch.log_softmax(logits, -1).gather(-1, place)
        chosen.append(torch.where(there, share, 0.0))
        logits = logits.scatter(-1, place, -1e9)
    return torch.cat(chosen, -1)


def target_logprob(
    policy: Policy, encoded: Encoded, thought: Weighed, target: torch.Tensor
) -> torch.Tensor:
    """log P(target | history, thought) (B,): codes, which carry no gradient, and weights mixed."""
    with torch.no_grad():
        hidden, past = read_thought(policy, encoded, thought)
        chance = policy.items_logprob(encoded, target[:, None], hidden, past).float()
    odds = log_odds(policy, thought, hidden[:, -1])
    return mixed(odds, chance, thought.logprob(target[:, None]))[:, 0]


# --- RL ---------------------------------------------------------------------------------------


@dataclass
class Group:
    """Sampled thoughts of a batch: places (B, G, l) int64, and the log-probability of each choice
    when it was drawn (B, G, l)."""

    places: torch.Tensor
    logprobs: torch.Tensor


def sample_group(
    found: Weighed, group: int, length: int, temperature: float, batch: Batch
) -> Group:
    """G thoughts of each user, chosen piece by piece without replacement from the weights."""
    generator = batch.generator("thoughts")
    logits = (found.logits / temperature)[:, None].expand(-1, group, -1)
    left = logits.masked_fill(torch.isinf(logits), -1e9)
    places = []
    for _ in range(min(length, logits.shape[-1])):
        place = draw(torch.log_softmax(left, -1), generator, batch.share)[..., None]
        there = left.gather(-1, place) > -1e8
        places.append(torch.where(there, place, -1))
        left = left.scatter(-1, place, -1e9)
    places = torch.cat(places, -1)
    return Group(places, choice_logprobs(logits, places))


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
        """Eq. 20 on the rewards of Eqs. 22-27 for thoughts inside the evidence, and the anchor."""
        policy, config = self.policy, self.config
        pieces = self.gathered(batch.index.cpu().numpy())
        policy.eval()  # dropout would make sampling and training two different policies
        found = weigh(policy, pieces)
        if batch.update == 0:
            self._explored = self._explore(batch, pieces, found)
        group, reference, terms = self._explored
        reward = sum(getattr(config, f"{name}_weight") * value for name, value in terms.items())
        logits = found.logits[:, None].expand(-1, config.group, -1) / config.temperature
        logprobs = choice_logprobs(logits, group.places)
        loss, metrics = grpo_loss(
            logprobs, group.logprobs, reference, advantages(reward), clip=config.clip,
            kl_weight=config.kl_weight, ratio=config.ratio,
        )  # fmt: skip
        anchor = weighing_loss(found, batch.target) / self.gathered.known
        metrics |= {"reward": reward.mean(), "anchor": anchor.detach()}
        metrics |= {f"reward/{name}": value.mean() for name, value in terms.items()}
        metrics["zero_variance_groups"] = (reward == reward[:, :1]).all(1).float().mean()
        return loss + config.anchor_weight * anchor, metrics

    @torch.no_grad()
    def _explore(
        self, batch: Batch, pieces: Pieces, found: Weighed
    ) -> tuple[Group, torch.Tensor, dict[str, torch.Tensor]]:
        """Thoughts for all updates on a batch, their choices' log-probabilities (B, G, l) under the
        reference, and their rewards."""
        config = self.config
        group = sample_group(found, config.group, self.think, config.temperature, batch)
        frozen = weigh(self.reference, pieces)
        logits = frozen.logits[:, None].expand(-1, config.group, -1) / config.temperature
        return group, choice_logprobs(logits, group.places), self.rewards(batch, found, group)

    def rewards(self, batch: Batch, found: Weighed, group: Group) -> dict[str, torch.Tensor]:
        """Each term (B, G).

        likelihood: the gain in the target's log-probability over l = 0 (Eq. 26). ranking: the
        target's rank among the user's other pieces (Eq. 27). exact: codes of the thought's best
        item that are the target's, up to the first that differs (Eqs. 22-23).
        """
        policy, target = self.policy, batch.target
        users, count, length = group.places.shape
        thought = found.chosen(group.places.clamp(min=0))
        chosen = group.places >= 0
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


def only_thinking(policy: Policy) -> Policy:
    """The policy with gradients for the weighing alone."""
    policy.requires_grad_(False)
    policy.weighing.requires_grad_(True)
    policy.weighing.hop.requires_grad_(False)  # read by the decoder, which stays
    return policy
