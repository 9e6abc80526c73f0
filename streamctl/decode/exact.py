"""Exact top-k: best-first search with an admissible bound over the catalogue's trie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamctl.decode.items import best_items, legal_nodes
from streamctl.decode.think import greedy_thought
from streamctl.model.policy import DecoderName, Encoded, Policy
from streamctl.ranking import Ranking
from streamctl.tokenizer.trie import PrefixTrie

CHUNK = 64  # users searched together
TOGETHER = 16  # prefixes of a user that one pass of the decoder expands


class _Search:
    """One user's open prefixes and complete ones.

    A prefix's log-probability bounds that of every item below it, since each further code can
    only lower it. So the search is over when the k-th best leaf is no worse than the best prefix.
    """

    def __init__(self, trie: PrefixTrie, k: int):
        self.k, self.levels = k, trie.levels
        self.node = np.array([trie.root])
        self.score = np.zeros(1)
        self.depth = np.zeros(1, np.int64)
        self.tokens = np.zeros((1, trie.levels), np.int64)
        self.leaf, self.leaf_score = np.empty(0, np.int64), np.empty(0)
        self.expansions = 0

    @property
    def floor(self) -> float:
        """What a leaf must score to count among the k best so far."""
        if len(self.leaf) < self.k:
            return -np.inf
        return float(np.partition(self.leaf_score, -self.k)[-self.k])

    def pop(self) -> tuple[np.ndarray, ...]:
        """The best open prefixes that may still lead to one of the k best: node, score, tokens.

        They are of one depth, that of the very best, so that they are decoded together.
        """
        alive = self.score > self.floor
        self.node, self.score = self.node[alive], self.score[alive]
        self.depth, self.tokens = self.depth[alive], self.tokens[alive]
        if not len(self.node):
            return self.node, self.score, self.tokens[:, :0]
        depth = self.depth[self.score.argmax()]
        alike = np.flatnonzero(self.depth == depth)
        best = alike[np.argsort(-self.score[alike], kind="stable")[:TOGETHER]]
        popped = self.node[best], self.score[best], self.tokens[best, :depth]
        rest = np.ones(len(self.node), bool)
        rest[best] = False
        self.node, self.score = self.node[rest], self.score[rest]
        self.depth, self.tokens = self.depth[rest], self.tokens[rest]
        self.expansions += len(best)
        return popped

    def push(self, prefix: np.ndarray, token: np.ndarray, node: np.ndarray, score: np.ndarray):
        """Children of an expanded prefix (depth,): their tokens, nodes and log-probabilities."""
        depth = len(prefix) + 1
        if depth == self.levels:
            self.leaf = np.concatenate([self.leaf, node])
            self.leaf_score = np.concatenate([self.leaf_score, score])
            return
        tokens = np.zeros((len(node), self.levels), np.int64)
        tokens[:, : depth - 1], tokens[:, depth - 1] = prefix, token
        self.node = np.concatenate([self.node, node])
        self.score = np.concatenate([self.score, score])
        self.depth = np.concatenate([self.depth, np.full(len(node), depth)])
        self.tokens = np.concatenate([self.tokens, tokens])


@torch.no_grad()
def exact_top(
    policy: Policy,
    trie: PrefixTrie,
    history: torch.Tensor,
    k: int,
    *,
    think: int = 0,
    decoder: DecoderName = "slow",
    thoughts: torch.Tensor | None = None,
    exclude: Sequence[np.ndarray] | None = None,
    allow: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> tuple[Ranking, np.ndarray]:
    """The true k best items of the whole catalogue, in fp32: what no beam can guarantee.

    Arguments are those of `decode.recommend`; a thought of the model's own is greedy, and scores
    are conditioned on it.

    Returns:
        the ranking, and int64 (B,): how many prefixes each user's search had to expand.
    """
    device = policy.item_tokens.device
    history = torch.as_tensor(history, device=device)
    items = torch.full((len(history), k), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(history), k), -torch.inf, device=device)
    expansions = np.zeros(len(history), np.int64)
    lengths = (history >= 0).sum(1)
    order = torch.argsort(lengths, stable=True)
    for rows in order.split(CHUNK) if len(order) else ():
        encoded = policy.encode(history[rows, : int(lengths[rows].max())])
        if decoder == "direct":
            thought = None
        elif thoughts is None:
            thought = greedy_thought(policy, encoded, think, decoder)
        else:
            thought = thoughts[rows].to(device)
        legal = legal_nodes(trie, rows, exclude, allow)
        searches = _run(policy, trie, encoded, thought, k, decoder, legal)
        width = max(k, *(len(search.leaf) for search in searches))
        leaves = torch.full((len(rows), width), -1, dtype=torch.int64)
        values = torch.full((len(rows), width), -torch.inf)
        for row, search in enumerate(searches):
            leaves[row, : len(search.leaf)] = torch.from_numpy(search.leaf)
            values[row, : len(search.leaf)] = torch.from_numpy(search.leaf_score)
        numbers = rows.tolist()
        barred = None if exclude is None else [exclude[number] for number in numbers]
        wanted = None if allow is None else [allow[number] for number in numbers]
        found = best_items(trie, leaves, values, k, barred, wanted, seed)
        items[rows], scores[rows] = (part.to(device) for part in found)
        expansions[rows.cpu().numpy()] = [search.expansions for search in searches]
    return Ranking(items, scores), expansions


def _run(
    policy: Policy,
    trie: PrefixTrie,
    encoded: Encoded,
    think: torch.Tensor | None,
    k: int,
    decoder: DecoderName,
    legal: torch.Tensor | None,
) -> list[_Search]:
    """Search for every user of a chunk until all are done; each round is a pass a depth."""
    hidden, prompt = policy.prompt(encoded, think, decoder)
    first = _logprobs(policy, hidden[:, -1:])
    open_nodes = None if legal is None else legal.cpu().numpy()
    searches = [_Search(trie, k) for _ in range(len(encoded))]
    while True:
        by_depth: dict[int, list[tuple[int, tuple[np.ndarray, ...]]]] = {}
        for row, search in enumerate(searches):
            popped = search.pop()
            if len(popped[0]):
                by_depth.setdefault(popped[2].shape[1], []).append((row, popped))
        if not by_depth:
            return searches
        for depth, work in by_depth.items():
            users = [row for row, _ in work]
            table = first[users]
            if depth:
                width = max(len(node) for _, (node, _, _) in work)
                prefixes = np.zeros((len(work), width, depth), np.int64)
                for place, (_, (_, _, tokens)) in enumerate(work):
                    prefixes[place, : len(tokens)] = tokens
                index = torch.tensor(users, device=encoded.states.device)
                feed = torch.from_numpy(prefixes).to(index.device)
                some = encoded.rows(index)
                hidden, _ = policy.extend(some, feed, decoder, prompt.rows(index))
                table = _logprobs(policy, hidden[:, :, -1])
            for place, (row, (nodes, scores, tokens)) in enumerate(work):
                for number, node in enumerate(nodes):
                    edges = slice(trie.child_start[node], trie.child_start[node + 1])
                    token, child = trie.child_token[edges], trie.child_node[edges]
                    value = table[place, number, token]
                    if policy.config.softmax == "catalogue":
                        value = value - np.logaddexp.reduce(value)
                    value = scores[number] + value
                    if open_nodes is not None:
                        keep = open_nodes[row, child]
                        token, child, value = token[keep], child[keep], value[keep]
                    searches[row].push(tokens[number], token, child, value)


def _logprobs(policy: Policy, hidden: torch.Tensor) -> np.ndarray:
    """(U, W, d) decoder states -> (U, W, V) float64 log-probabilities of the next token."""
    return torch.log_softmax(policy.logits(hidden).double(), -1).cpu().numpy()
