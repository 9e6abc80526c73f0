"""Thinking with evidence: weigh what the history brings to mind, then answer with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from streamctl.decode import beam as codes
from streamctl.decode.items import best_items, denied, legal_nodes, of_rows, together
from streamctl.device import autocast, derive_seed
from streamctl.model.past import Past
from streamctl.model.policy import Encoded, Policy
from streamctl.ranking import Ranking, Thought
from streamctl.retrieval.evidence import HOPS, Evidence, Pieces
from streamctl.tokenizer.trie import PrefixTrie

POSITIONS = 8  # items of a thought that the decoder reads, the heaviest first
FULL = 64  # items of a thought unless somebody asks for another length
NOTHING = len(HOPS)  # the hop of no item


@dataclass(frozen=True)
class Weighed:
    """Pieces of evidence and what they weigh."""

    items: torch.Tensor  # (B, C) int64, -1 where there is none
    hops: torch.Tensor  # (B, C) int64, `NOTHING` where there is none
    logits: torch.Tensor  # (B, C) float32, -inf where there is none or it is barred

    def heaviest(self, length: int) -> Weighed:
        """The thought of the `length` heaviest items, whose weights sum to one over them."""
        length = min(length, self.logits.shape[1])
        return self.chosen(self.logits.topk(length, 1).indices)

    def chosen(self, place: torch.Tensor) -> Weighed:
        """The thought of the pieces at `place` (B, [G,] l) int64, in that order."""
        shape = place.shape
        take = [
            field.view(len(field), *(1,) * (place.ndim - 2), -1).expand(*shape[:-1], -1)
            for field in (self.items, self.hops, self.logits)
        ]
        items, hops, logits = (field.gather(-1, place) for field in take)
        there = torch.isfinite(logits)
        weights = torch.log_softmax(logits.masked_fill(~there, -1e9), -1)
        weights = weights.masked_fill(~there, -torch.inf)
        return Weighed(items.where(there, -1), hops.where(there, NOTHING), weights)

    def cut(self, lengths: torch.Tensor) -> Weighed:
        """Each thought's first `lengths` (B,) pieces."""
        there = torch.arange(self.logits.shape[1], device=self.logits.device) < lengths[:, None]
        weights = torch.log_softmax(self.logits.masked_fill(~there, -torch.inf), -1)
        return Weighed(self.items.where(there, -1), self.hops.where(there, NOTHING), weights)

    def logprob(self, items: torch.Tensor) -> torch.Tensor:
        """log-weight of items (B, K), -inf where they are no piece; of a thought's weights."""
        same = (self.items[:, None] == items[..., None]) & (items >= 0)[..., None]
        return torch.where(same, self.logits[:, None], -torch.inf).amax(-1)


def weigh(policy: Policy, pieces: Pieces) -> Weighed:
    """What the policy makes of the evidence."""
    device = policy.device
    items = torch.from_numpy(pieces.items.astype(np.int64)).to(device)
    hops = torch.from_numpy(pieces.hops.astype(np.int64)).to(device)
    features = torch.from_numpy(pieces.features()).to(device)
    real = items >= 0
    return Weighed(items, hops.where(real, NOTHING), policy.weighing(features, real))


def read_thought(policy: Policy, encoded: Encoded, thought: Weighed) -> tuple[torch.Tensor, Past]:
    """Run `[think, o_1..o_p, bos]` over the first `POSITIONS` items; see `Policy.prompt`."""
    vectors = policy.piece_vectors(thought.items[:, :POSITIONS], thought.hops[:, :POSITIONS])
    return policy.prompt(encoded, vectors)


def log_odds(policy: Policy, thought: Weighed, logits: torch.Tensor) -> torch.Tensor:
    """log odds of the codes against the thought, from the logits (..., V) at `bos`."""
    low, high = policy.tokens.level_range(0)
    first = policy.first_logprobs(logits)[..., low:high]
    return policy.weighing.trust(thought.logits, first)


def mixed(odds: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log(pi_0 P_codes + (1 - pi_0) w): log odds (B,), log-probabilities (B, K)."""
    odds = odds[:, None]
    # -inf + -inf has no gradient that is a number; a finite floor has.
    codes, weights = codes.clamp(min=-80), weights.clamp(min=-80)
    return torch.logaddexp(F.logsigmoid(odds) + codes, F.logsigmoid(-odds) + weights)


class EvidenceRecommender:
    """`ranking.Recommender`: gather, weigh, answer with codes and weights mixed at the item.

    An item's probability is pi_0 P(its codes | history, thought) + (1 - pi_0) w(item). It is exact
    for the items that the beam ends with; others of the thought have their weight alone (to score
    their codes, too, changed no ranking significantly: docs/tried.md). l = 0 is the direct decoder.

    Attributes:
        think: l if nobody asks for another.
        random: a seed: every piece is replaced by a random item (the control).
    """

    def __init__(
        self,
        policy: Policy,
        trie: PrefixTrie,
        evidence: Evidence,
        *,
        think: int = FULL,
        beam: int = 50,
        seed: int = 0,
        random: int | None = None,
        mix: str = "item",
    ):
        """Args: mix: "item", or "codes" or "weights" alone (controls)."""
        self.policy, self.trie, self.evidence = policy, trie, evidence
        self.think, self.beam, self.seed, self.random, self.mix = think, beam, seed, random, mix

    @torch.no_grad()
    def recommend(
        self,
        histories: torch.Tensor,
        k: int,
        *,
        users: np.ndarray | None = None,
        think: int | None = None,
        exclude: Sequence[np.ndarray] | None = None,
        allow: Sequence[np.ndarray | None] | None = None,
    ) -> Ranking:
        """See `ranking.Recommender`."""
        length = self.think if think is None else think
        device = self.policy.device
        histories = torch.as_tensor(histories)
        count = len(histories)
        items = torch.full((count, k), -1, dtype=torch.int64)
        scores = torch.full((count, k), -torch.inf)
        if not length:
            return codes.recommend(
                self.policy, self.trie, histories.to(device), k, decoder="direct", beam=self.beam,
                exclude=exclude, allow=allow, seed=self.seed,
            )  # fmt: skip
        users = np.full(count, -1) if users is None else np.asarray(users)
        shown = [torch.full((count, length), -1, dtype=torch.int64) for _ in range(2)]
        weights = torch.zeros(count, length)
        order = torch.argsort((histories >= 0).sum(1), stable=True)
        for rows in order.split(together(self.trie, exclude, allow)) if count else ():
            index = rows.numpy()
            part = histories[rows]
            part = part[:, : int((part >= 0).sum(1).max())]
            barred, wanted = of_rows(rows, exclude), of_rows(rows, allow)
            parts = self.parts(part, users[index], k, length, barred, wanted)
            answer, thought = parts.best(k), parts.thought
            items[rows], scores[rows] = answer.items.cpu(), answer.scores.cpu()
            width = thought.items.shape[1]
            shown[0][rows, :width] = thought.items.cpu()
            shown[1][rows, :width] = thought.hops.where(thought.items >= 0, -1).cpu()
            weights[rows, :width] = thought.logits.exp().cpu()
        return Ranking(items, scores, Thought(shown[0], weights, shown[1]))

    @torch.no_grad()
    def growing(
        self,
        history: torch.Tensor,
        k: int,
        lengths: Sequence[int],
        *,
        user: int = -1,
        exclude: np.ndarray | None = None,
        allow: np.ndarray | None = None,
    ) -> Ranking:
        """One user's rankings after each of several lengths of thought, in one batch.

        Args:
            history: int64 (1, H). lengths: n of them, each above 0. The rest: see `recommend`.

        Returns:
            (n, k): a row a length.
        """
        count = len(lengths)
        parts = self.parts(
            history.expand(count, -1), np.full(count, user), k, max(lengths),
            None if exclude is None else [exclude] * count,
            None if allow is None else [allow] * count,
            torch.tensor(lengths, device=self.policy.device),
        )  # fmt: skip
        return parts.best(k)

    def weighed(self, histories: torch.Tensor, users: np.ndarray) -> Weighed:
        """The evidence of some users, weighed; their items at random in the control."""
        pieces = self.evidence.gather(histories.cpu().numpy(), users)
        weighed = weigh(self.policy, pieces)
        if self.random is None:
            return weighed
        # The same items for a user whoever else is asked about.
        drawn = np.stack(
            [
                np.random.default_rng(derive_seed(self.random, "evidence", int(user))).integers(
                    0, self.evidence.n_items, weighed.items.shape[1]
                )
                for user in users
            ]
        )
        items = torch.from_numpy(drawn).to(weighed.items)
        return Weighed(items.where(weighed.items >= 0, -1), weighed.hops, weighed.logits)

    def parts(
        self,
        histories: torch.Tensor,
        users: np.ndarray,
        k: int,
        length: int,
        exclude: list[np.ndarray] | None = None,
        allow: list[np.ndarray | None] | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Parts:
        """What the items of an answer are weighed by; see `Parts`."""
        policy, device = self.policy, self.policy.device
        weighed = self.weighed(histories, users)
        items = weighed.items.cpu().numpy()
        closed = torch.from_numpy(denied(items, exclude, allow)).to(device)
        weighed = Weighed(
            weighed.items, weighed.hops, weighed.logits.masked_fill(closed, -torch.inf)
        )
        thought = weighed.heaviest(length)
        thought = thought if lengths is None else thought.cut(lengths)
        legal = legal_nodes(self.trie, torch.arange(len(items), device=device), exclude, allow)
        with autocast(device):
            encoded = policy.encode(histories.to(device))
            hidden, past = read_thought(policy, encoded, thought)
            logits = policy.logits(hidden)
            odds = log_odds(policy, thought, logits[:, 0])
            if self.mix != "item":
                odds = torch.full_like(odds, torch.inf if self.mix == "codes" else -torch.inf)
            leaves, chance, _ = codes.search_after(
                policy, self.trie, logits, past, encoded, max(self.beam, k), legal
            )
        other, chance = best_items(
            self.trie, leaves, chance, leaves.shape[1], exclude, allow, self.seed
        )
        # An item of the thought that the beam found, too, counts once.
        same = other[..., None] == thought.items[:, None]
        twice = same.any(-1)
        known = torch.where(same, chance[..., None], -torch.inf).amax(1)
        return Parts(
            thought,
            odds,
            torch.cat([thought.items, other.masked_fill(twice, -1)], 1),
            torch.cat([known, chance], 1),
            torch.cat([thought.logits, torch.full_like(chance, -torch.inf)], 1),
        )


@dataclass(frozen=True)
class Parts:
    """The items of some users' answers, unordered, and what each is weighed by."""

    thought: Weighed  # (B, l)
    odds: torch.Tensor  # (B,) log odds of the codes against the thought
    items: torch.Tensor  # (B, K) int64: the thought's, then the beam's others; -1 for none
    codes: torch.Tensor  # (B, K) float32, log P(codes | history, thought)
    weights: torch.Tensor  # (B, K) float32, log w

    def best(self, k: int, shift: float = 0.0) -> Ranking:
        """The k most likely items, the log odds shifted."""
        scores = mixed(self.odds + shift, self.codes, self.weights)
        scores = scores.masked_fill(self.items < 0, -torch.inf)
        best, place = scores.topk(min(k, scores.shape[1]), 1)
        ranked = self.items.gather(1, place).masked_fill(best == -torch.inf, -1)
        short = (0, k - ranked.shape[1])
        return Ranking(F.pad(ranked, short, value=-1), F.pad(best, short, value=-torch.inf))
