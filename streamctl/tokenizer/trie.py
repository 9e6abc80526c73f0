"""The trie of all items' tokens: which continuations of a prefix are legal, as flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from streamctl.errors import StreamctlError
from streamctl.kernels import CsrTrie
from streamctl.tokenizer.semantic_ids import group_rows


class PrefixTrie:
    """Prefixes of items' tokens; node 0 is the root, items sit at the leaves m tokens below.

    A node keeps its number when items are added: those of the first items are in breadth-first,
    then token order; new nodes come after them. Several items may share a leaf.

    Attributes:
        child_start: (n_nodes + 1,), child_token and child_node (n_nodes - 1,): the arrays of
            `streamctl.kernels.CsrTrie`, int64 like all others here.
        parent: (n_nodes,); the root's is -1.
        count: (n_nodes,), items at or below each node.
        item_start: (n_nodes + 1,), items: (n_items,): the items at node n are
            `items[item_start[n]:item_start[n + 1]]`, ascending; none unless n is a leaf.
        leaf: (highest item + 1,), the leaf of each item, -1 where there is no such item.
    """

    root = 0

    def __init__(self, tokens: np.ndarray):
        """Build from all items at once.

        Args:
            tokens: (n, m) int64 >= 0, the tokens of each item.

        Raises:
            StreamctlError: no items or no levels, or a negative token.
        """
        tokens = np.asarray(tokens, np.int64)
        if tokens.ndim != 2 or not tokens.size or tokens.min() < 0:
            raise StreamctlError(f"a trie needs tokens (n, m) >= 0, got shape {tokens.shape}")
        self.levels = tokens.shape[1]
        width = int(tokens.max()) + 1

        above, first = 0, 1  # the first nodes of the level above and of this one
        parents, edge_tokens = [], []
        for keys, group in group_rows(tokens, (width,) * self.levels):
            parents.append(above + keys // width)
            edge_tokens.append(keys % width)
            leaf = first + group
            above, first = first, first + len(keys)
        self.parent = np.concatenate([[-1], *parents])
        # Edges in (parent, token) order are the nodes in theirs: edge e leads to node e + 1.
        self.child_token = np.concatenate(edge_tokens)
        self.child_node = np.arange(1, first)
        self.child_start = _starts(np.bincount(self.parent[1:], minlength=first))

        self.leaf = leaf
        self.items = np.argsort(leaf, kind="stable")
        here = np.bincount(leaf, minlength=first)
        self.item_start = _starts(here)
        self.count = here.copy()
        for nodes in self._above(leaf):
            self.count += np.bincount(nodes, minlength=first)
        self._placed: dict[str, CsrTrie] = {}
        self._shared: dict[str, torch.Tensor] = {}

    @property
    def n_nodes(self) -> int:
        return len(self.parent)

    def on(self, device: str | torch.device) -> CsrTrie:
        """The arrays for `streamctl.kernels.trie_topk` on a device: copied there once, and again
        after items were added."""
        key = str(device)
        if key not in self._placed:
            arrays = (self.child_start, self.child_token, self.child_node)
            self._placed[key] = CsrTrie(*(torch.from_numpy(a).to(device) for a in arrays))
        return self._placed[key]

    def shared(self, device: str | torch.device) -> torch.Tensor:
        """(n_nodes,) bool: nodes that several items lie below. Beneath others all is certain."""
        key = str(device)
        if key not in self._shared:
            self._shared[key] = torch.from_numpy(self.count > 1).to(device)
        return self._shared[key]

    def paths(self, items: torch.Tensor) -> torch.Tensor:
        """The nodes that items' codes follow, the root first: (..., m) int64 for items (...).

        -1 for items that are not here.
        """
        index, path = items.cpu().numpy(), []
        node = np.where(index < len(self.leaf), self.leaf[index.clip(max=len(self.leaf) - 1)], -1)
        for _ in range(self.levels):
            node = np.where(node < 0, -1, self.parent[node])
            path.append(node)
        return torch.from_numpy(np.stack(path[::-1], -1)).to(items.device)

    def items_at(self, node: int) -> np.ndarray:
        """Items at a leaf, ascending, int64; none for any other node."""
        return self.items[self.item_start[node] : self.item_start[node + 1]]

    def child(self, node: int, token: int) -> int:
        """The node that a token leads to from `node`, or -1 if it is not legal there."""
        edge = self._edge(node, token)
        found = edge < self.child_start[node + 1] and self.child_token[edge] == token
        return int(self.child_node[edge]) if found else -1

    def walk(self, tokens: Sequence[int]) -> int:
        """The node that a prefix leads to, or -1 if no item begins with it."""
        node = self.root
        for token in tokens:
            node = self.child(node, token)
            if node < 0:
                return -1
        return node

    def mask(self, allow: np.ndarray | None = None, deny: np.ndarray | None = None) -> torch.Tensor:
        """Which nodes lead to an item that may be recommended: (n_nodes,) bool, on the CPU.

        A leaf that a denied item shares with a wanted one stays legal; who reads its items leaves
        the denied one out.

        Args:
            allow: the only items wanted (int64 indexes); None for all.
            deny: items not wanted. In both, items that the trie does not hold are ignored.
        """
        denied = self._held(() if deny is None else deny)
        legal = np.full(self.n_nodes, allow is None)
        if allow is not None:
            leaf = self.leaf[np.setdiff1d(self._held(allow), denied, assume_unique=True)]
            for nodes in (leaf, *self._above(leaf)):
                legal[nodes] = True
        else:
            leaf = self.leaf[denied]
            for nodes in (leaf, *self._above(leaf)):
                touched, times = np.unique(nodes, return_counts=True)
                legal[touched] = self.count[touched] > times
        return torch.from_numpy(legal)

    def add(self, items: int | np.ndarray, tokens: np.ndarray) -> None:
        """Add one item (tokens (m,)) or several (items (n,), tokens (n, m)).

        Nothing is sorted or built again: the arrays are copied once a call with the new entries
        put in their places, so add many items in one call.

        Raises:
            StreamctlError: an item that is here already, or tokens of another shape.
        """
        items = np.atleast_1d(np.asarray(items, np.int64))
        tokens = np.atleast_2d(np.asarray(tokens, np.int64))
        if tokens.shape != (len(items), self.levels) or tokens.min(initial=0) < 0:
            wanted = f"({len(items)}, {self.levels})"
            raise StreamctlError(f"tokens must be {wanted} and >= 0, got shape {tokens.shape}")
        if items.min(initial=0) < 0 or len(np.unique(items)) != len(items):
            raise StreamctlError(f"a trie needs {len(items)} item indexes >= 0, each once")
        if len(held := self._held(items)):
            raise StreamctlError(f"item {held[0]} is in the trie already")

        born: dict[tuple[int, int], int] = {}  # (parent, token) -> new node
        leaf = np.empty(len(items), np.int64)
        for row, path in enumerate(tokens.tolist()):
            node = self.root
            for token in path:
                known = self.child(node, token) if node < self.n_nodes else -1
                if known < 0:
                    known = born.setdefault((node, token), self.n_nodes + len(born))
                node = known
            leaf[row] = node
        self._insert_edges(born)
        self._insert_items(items, leaf)
        self._placed, self._shared = {}, {}

    def _insert_edges(self, born: dict[tuple[int, int], int]) -> None:
        edges = sorted(born)
        old = self.n_nodes
        place = [
            self._edge(parent, token) if parent < old else len(self.child_token)
            for parent, token in edges
        ]
        parents, tokens = np.array(edges, np.int64).reshape(-1, 2).T
        self.child_token = np.insert(self.child_token, place, tokens)
        self.child_node = np.insert(self.child_node, place, [born[edge] for edge in edges])
        self.parent = np.concatenate([self.parent, np.array([p for p, _ in born], np.int64)])
        counts = np.concatenate([np.diff(self.child_start), np.zeros(len(born), np.int64)])
        np.add.at(counts, parents, 1)
        self.child_start = _starts(counts)
        self.item_start = np.pad(self.item_start, (0, len(born)), mode="edge")
        self.count = np.pad(self.count, (0, len(born)))

    def _insert_items(self, items: np.ndarray, leaf: np.ndarray) -> None:
        order = np.lexsort((items, leaf))
        place = [
            self.item_start[node] + np.searchsorted(self.items_at(node), item)
            for node, item in zip(leaf[order].tolist(), items[order].tolist(), strict=True)
        ]
        self.items = np.insert(self.items, place, items[order])
        here = np.diff(self.item_start)
        np.add.at(here, leaf, 1)
        self.item_start = _starts(here)
        for nodes in (leaf, *self._above(leaf)):
            np.add.at(self.count, nodes, 1)
        grown = np.full(max(len(self.leaf), int(items.max(initial=-1)) + 1), -1)
        grown[: len(self.leaf)] = self.leaf
        grown[items] = leaf
        self.leaf = grown

    def _edge(self, node: int, token: int) -> int:
        """Where the edge of a token is, or would be put, among the children of a node."""
        low, high = self.child_start[node], self.child_start[node + 1]
        return int(low + np.searchsorted(self.child_token[low:high], token))

    def _above(self, leaf: np.ndarray) -> Iterator[np.ndarray]:
        """The nodes above leaves, level by level, up to the root."""
        nodes = leaf
        for _ in range(self.levels):
            nodes = self.parent[nodes]
            yield nodes

    def _held(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of `items` that are in the trie, ascending, each once."""
        items = np.unique(np.asarray(items, np.int64))
        items = items[(items >= 0) & (items < len(self.leaf))]
        return items[self.leaf[items] >= 0]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
