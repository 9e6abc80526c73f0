"""The decoding engine: think, then search the catalogue's trie for the best items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from streamctl import kernels
from streamctl.decode.items import best_items, legal_nodes, together
from streamctl.decode.think import (
    Thought,
    beam_thoughts,
    converged_thoughts,
    given_thought,
    no_thought,
    sample_thoughts,
)
from streamctl.decode.trace import Trace
from streamctl.device import autocast, derive_seed
from streamctl.distributed import Share
from streamctl.errors import UsageError
from streamctl.model.frozen import Branches
from streamctl.model.past import Past
from streamctl.model.policy import DecoderName, Encoded, Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.trie import PrefixTrie

Mode = Literal["greedy", "joint", "marginal"]


@torch.no_grad()
def recommend(
    policy: Policy,
    trie: PrefixTrie,
    history: torch.Tensor,
    k: int,
    *,
    think: int = 0,
    mode: Mode = "greedy",
    beam: int = 50,
    decoder: DecoderName = "slow",
    thoughts: torch.Tensor | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
    samples: int = 8,
    exact: bool = False,
    margin: float | None = None,
) -> tuple[Ranking, Trace]:
    """The k best items of each user, and what the model thought.

    An item's score is log P(its codes | history, thought), each code normalised over the
    vocabulary (Eq. 11) or the trie's continuations, as the policy was trained (`softmax`);
    `joint` and `marginal` sum it over thoughts. Items that share their codes share a score; their
    order is random, fixed by the seed.

    Args:
        history: (B, H) int64 items, oldest first, -1 on the right.
        think: l, think tokens before the codes.
        mode: `greedy`: the likeliest thought token by token; `joint`: one beam over thoughts and
            codes; `marginal`: `samples` sampled thoughts, score = logsumexp over them.
        beam: prefixes kept a level; raised to k.
        decoder: "slow", or "direct", which never thinks.
        thoughts: (B, l) int64 given think tokens, used instead of the model's own.
        exclude: for each user, items that must not be recommended.
        allow: for each user the only items wanted, or None for all.
        exact: fp32 throughout; otherwise bf16 where the device has it.
        margin: a greedy thought ends before l tokens once a token turns the state by less (1 less
            the cosine of the states around it); the trace repeats the last token and state.

    Raises:
        UsageError: an unknown mode, or a history without items.
    """
    if mode not in ("greedy", "joint", "marginal"):
        raise UsageError(f"unknown mode {mode!r}; known: greedy, joint, marginal")
    device = policy.item_tokens.device
    history = torch.as_tensor(history, device=device)
    lengths = (history >= 0).sum(1)
    if len(history) and not bool(lengths.min() > 0):
        raise UsageError("a history needs an item or more")
    if decoder == "direct":
        think, thoughts = 0, None
    width = think if thoughts is None else thoughts.shape[1]
    items = torch.full((len(history), k), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(history), k), -torch.inf, device=device)
    tokens = torch.zeros(len(history), width, dtype=torch.int64, device=device)
    states = torch.zeros(len(history), width + 1, policy.config.d_model, device=device)
    # Users of similar lengths side by side: little of a chunk is padding.
    order = torch.argsort(lengths, stable=True)
    for rows in order.split(together(trie, exclude, allow)) if len(order) else ():
        part = history[rows, : int(lengths[rows].max())]
        legal = legal_nodes(trie, rows, exclude, allow)
        with autocast(device, enabled=not exact):
            encoded = policy.encode(part)
            given = None if thoughts is None else thoughts[rows].to(device)
            if margin is not None and mode == "greedy" and think and given is None:
                groups = converged_thoughts(policy, encoded, think, margin, decoder)
            else:
                every = torch.arange(len(rows), device=device)
                thought = _think(
                    policy, encoded, given, think, mode, max(beam, k), decoder, samples, seed
                )
                groups = [(every, thought)]
            found = []
            for some, thought in groups:
                users = encoded if len(groups) == 1 else encoded.rows(some)
                open_nodes = None if legal is None else legal[some]
                shared = policy, trie, users, thought
                settings = max(beam, k), decoder, open_nodes
                if mode == "marginal" and thought.tokens.shape[1] > 1:
                    found.append(_search_each(*shared, *settings))
                else:
                    chance = thought.logprob
                    start = chance if mode == "joint" else torch.zeros_like(chance)
                    found.append(_search(*shared, start, *settings))
                chosen = torch.arange(len(some), device=device), thought.logprob.argmax(1)
                walked = thought.tokens[chosen]
                seen = policy.states(users, thought.hidden[chosen]).float()
                if short := width - walked.shape[1]:
                    walked = torch.cat([walked, walked[:, -1:].expand(-1, short)], 1)
                    seen = torch.cat([seen, seen[:, -1:].expand(-1, short, -1)], 1)
                tokens[rows[some]], states[rows[some]] = walked, seen
        place = torch.cat([some for some, _ in groups])
        rows = rows[place]
        leaves, value = (torch.cat(part) for part in zip(*found, strict=True))
        barred = None if exclude is None else [exclude[row] for row in rows.tolist()]
        wanted = None if allow is None else [allow[row] for row in rows.tolist()]
        best, score = best_items(trie, leaves, value, k, barred, wanted, seed)
        short = (best[:, -1] < 0).nonzero()[:, 0]
        if mode != "greedy" and len(short):  # several thoughts have found the same items
            more, _ = recommend(
                policy, trie, history[rows[short]], k, think=think, beam=beam, decoder=decoder,
                exclude=barred and [barred[row] for row in short.tolist()],
                allow=wanted and [wanted[row] for row in short.tolist()], seed=seed, exact=exact,
            )  # fmt: skip
            best[short], score[short] = _filled(best[short], score[short], more)
        items[rows], scores[rows] = best, score
    return Ranking(items, scores), Trace(tokens, states)


def _filled(
    items: torch.Tensor, scores: torch.Tensor, more: Ranking
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rankings (B, k) that are too short, with others' items behind, below their last scores."""
    known = (more.items[..., None] == items[:, None]).any(-1) | (more.items < 0)
    last = scores.masked_fill(items < 0, torch.inf).amin(1, keepdim=True)
    rest = torch.minimum(more.scores, last).masked_fill(known, -torch.inf)
    every = torch.cat([items, more.items.masked_fill(known, -1)], 1)
    scores, place = torch.cat([scores, rest], 1).sort(dim=1, descending=True, stable=True)
    return every.gather(1, place)[:, : items.shape[1]], scores[:, : items.shape[1]]


def _think(
    policy: Policy,
    encoded: Encoded,
    given: torch.Tensor | None,
    length: int,
    mode: Mode,
    beam: int,
    decoder: DecoderName,
    samples: int,
    seed: int,
) -> Thought:
    if given is not None and given.shape[1]:
        return given_thought(policy, encoded, given, decoder)
    if given is not None or not length:
        return no_thought(encoded)
    if mode == "marginal":
        generator = torch.Generator().manual_seed(derive_seed(seed, "think"))
        # Every user gets the same uniform numbers, so that no answer depends on the others'.
        thought, _ = sample_thoughts(
            policy, encoded, length, samples, decoder, temperature=1.0, generator=generator,
            share=Share.whole(1),
        )  # fmt: skip
        return thought
    return beam_thoughts(policy, encoded, length, 1 if mode == "greedy" else beam, decoder)


def _search(
    policy: Policy,
    trie: PrefixTrie,
    encoded: Encoded,
    thought: Thought,
    score: torch.Tensor,
    beam: int,
    decoder: DecoderName,
    legal: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search over codes: leaves (B, beam) int64, -1 where fewer, and their scores."""
    feed = torch.full((*score.shape, 1), policy.tokens.BOS, device=score.device)
    past = thought.past
    if past is not None and score.shape[1] == 1:
        past = past.share()
    hidden, past = policy.extend(encoded, feed, decoder, past)
    if score.shape[1] == 1:
        past = past.share()
    return search_after(policy, trie, hidden[:, :, -1], past, encoded, beam, legal, score, decoder)


def search_after(
    policy: Policy,
    trie: PrefixTrie,
    hidden: torch.Tensor,
    past: Past | Branches,
    encoded: Encoded,
    beam: int,
    legal: torch.Tensor | None = None,
    score: torch.Tensor | None = None,
    decoder: DecoderName = "slow",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search over the codes that follow BOS.

    Args:
        hidden: (B, W, d), the states at BOS. past: what is before the first code; shared if W = 1.
        legal: (B, nodes) bool, the nodes that lead to a wanted item; None for all.
        score: (B, W) to start from; zeros if None.

    Returns:
        leaves (B, beam) int64, -1 where fewer, and their scores (B, beam).
    """
    device = hidden.device
    score = torch.zeros(hidden.shape[:2], device=device) if score is None else score.float()
    node = torch.full_like(score, trie.root, dtype=torch.int64)
    feed = node[..., None]  # of the level before; the first follows BOS
    csr = trie.on(device)
    normalize = "legal" if policy.config.softmax == "catalogue" else "vocabulary"
    for level in range(policy.tokens.levels):
        if level:
            states, past = policy.extend(encoded, feed, decoder, past)
            hidden = states[:, :, -1]
        logits = policy.logits(hidden).float()
        score, parent, token, node = kernels.trie_topk(
            logits, node, score, csr, beam, allowed=legal, normalize=normalize
        )
        past = past.reorder(parent)
        feed = token[..., None]
    return node, score


def _search_each(
    policy: Policy,
    trie: PrefixTrie,
    encoded: Encoded,
    thought: Thought,
    beam: int,
    decoder: DecoderName,
    legal: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A search for each sampled thought; scores are log-shares of the mean over thoughts."""
    leaves, scores = [], []
    count = thought.tokens.shape[1]
    for number in range(count):
        only = torch.full((len(encoded), 1), number, device=encoded.states.device)
        one = Thought(
            thought.tokens[:, number : number + 1],
            thought.logprob[:, number : number + 1],
            thought.hidden[:, number : number + 1],
            thought.past.reorder(only),
        )
        zero = torch.zeros_like(one.logprob)
        leaf, score = _search(policy, trie, encoded, one, zero, beam, decoder, legal)
        leaves.append(leaf)
        scores.append(score - np.log(count))
    return torch.cat(leaves, 1), torch.cat(scores, 1)
