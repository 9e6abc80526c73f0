"""The prefix trie against a dictionary of dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamctl.kernels import trie_topk

from streamctl.errors import StreamctlError
from streamctl.tokenizer import PrefixTrie

LEVELS = 3
paths = st.lists(st.lists(st.integers(0, 4), min_size=LEVELS, max_size=LEVELS), max_size=25)


def walk_all(trie: PrefixTrie) -> dict:
    """Every prefix of the trie -> (tokens that may follow, items), by following the CSR arrays."""
    seen = {}

    def visit(node, prefix):
        low, high = trie.on("cpu").child_start[node : node + 2].tolist()
        tokens = trie.on("cpu").child_token[low:high].tolist()
        seen[prefix] = (tokens, trie.items_at(node).tolist())
        for token, child in zip(tokens, trie.on("cpu").child_node[low:high].tolist(), strict=True):
            assert int(trie.parent[child]) == node
            visit(child, (*prefix, token))

    visit(trie.root, ())
    assert len(seen) == trie.n_nodes
    return seen


def as_dict(rows: dict[int, list[int]]) -> dict:
    """The same from a plain dictionary."""
    following, items = {(): set()}, {}
    for item, path in rows.items():
        for length, token in enumerate(path):
            following.setdefault(tuple(path[:length]), set()).add(token)
        following.setdefault(tuple(path), set())
        items.setdefault(tuple(path), []).append(item)
    return {p: (sorted(n), sorted(items.get(p, []))) for p, n in following.items()}


@settings(max_examples=60, deadline=None)
@given(paths.filter(len), paths, st.booleans())
def test_building_and_adding_agree_with_a_dictionary(first, later, together):
    trie = PrefixTrie(np.array(first))
    rows = dict(enumerate(first))
    assert walk_all(trie) == as_dict(rows)
    nodes = {tuple(path): trie.walk(path) for path in first}
    added = {100 - number: path for number, path in enumerate(later)}
    if together and added:
        trie.add(np.array(list(added)), np.array(list(added.values())))
    else:
        for item, path in added.items():
            trie.add(item, np.array(path))
    rows |= added
    assert walk_all(trie) == as_dict(rows)
    assert nodes == {path: trie.walk(path) for path in nodes}, "nodes keep their numbers"
    for item, path in rows.items():
        assert trie.walk(path) == trie.leaf[item]


@settings(max_examples=60, deadline=None)
@given(paths.filter(len), st.none() | st.sets(st.integers(0, 30)), st.sets(st.integers(-1, 30)))
def test_a_node_is_legal_when_a_wanted_item_lies_below(rows, allow, deny):
    trie = PrefixTrie(np.array(rows))
    wanted = [
        path
        for item, path in enumerate(rows)
        if (allow is None or item in allow) and item not in deny
    ]
    expected = torch.zeros(trie.n_nodes, dtype=torch.bool)
    for path in wanted:
        for length in range(LEVELS + 1):
            expected[trie.walk(path[:length])] = True
    given_allow = None if allow is None else np.array(sorted(allow), np.int64)
    mask = trie.mask(given_allow, np.array(sorted(deny), np.int64))
    assert torch.equal(mask, expected)


def test_what_is_no_prefix_leads_nowhere():
    trie = PrefixTrie(np.array([[3, 7], [3, 8]]))
    assert trie.walk([3]) > 0
    assert [trie.walk(p) for p in ([4], [3, 9], [3, 7, 1])] == [-1, -1, -1]
    assert trie.items_at(trie.walk([3])).tolist() == []


def test_the_kernel_walks_the_trie_before_and_after_an_item_is_added():
    trie = PrefixTrie(np.array([[3, 7], [5, 8]]))
    logits = torch.zeros(1, 1, 10)
    logits[0, 0, 4] = 5.0

    def best():
        roots = torch.zeros(1, 1, dtype=torch.int64)
        return trie_topk(logits, roots, torch.zeros(1, 1), trie.on("cpu"), 2)[2].tolist()

    assert best() == [[3, 5]]
    trie.add(2, np.array([4, 9]))
    assert best() == [[4, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: PrefixTrie(np.empty((0, 3))), "needs tokens"),
        (lambda t: PrefixTrie(np.array([[0, -1]])), "needs tokens"),
        (lambda t: t.add(0, np.array([3, 7])), "item 0 is in the trie already"),
        (lambda t: t.add(9, np.array([3, 7, 1])), r"must be \(1, 2\)"),
        (lambda t: t.add(np.array([8, 8]), np.array([[3, 7], [3, 8]])), "each once"),
    ],
)
def test_wrong_use_is_named(call, message):
    with pytest.raises(StreamctlError, match=message):
        call(PrefixTrie(np.array([[3, 7], [3, 8]])))
