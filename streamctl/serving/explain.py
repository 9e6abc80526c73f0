"""Thoughts in words: what each think token stands for, and what the ranking was after it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from streamctl.decode import Trace, recommend
from streamctl.model import Policy
from streamctl.serving.search import words_of
from streamctl.tokenizer import PrefixTrie

WORDS = 8
EXAMPLES = 5


def decoder_for(think: int) -> Literal["slow", "direct"]:
    """The decoder that answers after so many think tokens: without any, the one trained for it."""
    return "slow" if think else "direct"


@dataclass(frozen=True)
class Meaning:
    """What a code stands for: words that tell its items from others, and some of the items."""

    words: list[str]
    items: list[int]


class Meanings:
    """The meaning of every code, worked out when it is asked for.

    Args:
        titles: N titles.
        codes: (N, m) the items' codes.
    """

    def __init__(self, titles: Sequence[str], codes: Sequence[Sequence[int]] | np.ndarray):
        self.titles = list(titles)
        self.codes = np.asarray(codes, np.int64)
        self._known: dict[tuple[int, int], Meaning] = {}

    @cached_property
    def _words(self) -> tuple[list[set[str]], Counter[str]]:
        sets = [{w for w in words_of(title) if len(w) > 1} for title in self.titles]
        return sets, Counter(word for words in sets for word in words)

    def of(self, level: int, code: int) -> Meaning:
        """The words and items of a code of a level."""
        if (level, code) not in self._known:
            items = np.flatnonzero(self.codes[:, level] == code)
            self._known[level, code] = Meaning(self.telling(items), items[:EXAMPLES].tolist())
        return self._known[level, code]

    def telling(self, items: np.ndarray) -> list[str]:
        """Words that tell these items' titles from the others', by log-likelihood ratio."""
        sets, totals = self._words
        inside = Counter(word for item in items.tolist() for word in sets[item])

        def gain(word: str) -> float:
            share = totals[word] / len(sets)
            return inside[word] * math.log(inside[word] / len(items) / share)

        ranked = sorted(inside, key=lambda word: (-gain(word), word))
        return [word for word in ranked if gain(word) > 0][:WORDS]


@dataclass(frozen=True)
class Reason:
    """Evidence: some items that another user had, latest first, and what that user took next."""

    had: list[int]
    took: int


@dataclass(frozen=True)
class ThoughtStep:
    """One step of one user's reasoning, of whichever kind.

    Attributes:
        title: what kind of step it is: `Items of level 2, code 17`.
        meaning: its words and items; empty for a token of a think codebook.
        items, scores: (k,) the ranking if thinking stopped after this step; -1 where fewer.
        token: a think token's id in the vocabulary; None for steps that are no token.
        level, code: what the token is; level None for a token of a think codebook.
        moved: how far the state moved, ||s_i - s_{i-1}||; None where it stays.
        reasons: of a look-up, the heaviest first.
    """

    title: str
    meaning: Meaning
    items: np.ndarray
    scores: np.ndarray
    token: int | None = None
    level: int | None = None
    code: int | None = None
    moved: float | None = None
    reasons: Sequence[Reason] = ()


@dataclass(frozen=True)
class Explained:
    """One user's thought: the ranking without thinking, and the steps."""

    items: np.ndarray
    scores: np.ndarray
    steps: list[ThoughtStep]


def explain_thought(
    policy: Policy,
    trie: PrefixTrie,
    meanings: Meanings,
    history: torch.Tensor,
    trace: Trace,
    k: int,
    **options: Any,
) -> Explained:
    """One user's thought in words and rankings.

    Args:
        history: (1, H) int64 items.
        trace: what `recommend` returned for this history.
        k: length of the rankings.
        options: as `recommend` was called, less `think`, `thoughts` and `decoder`.
    """
    tokens = trace.tokens
    rankings = []
    for done in range(tokens.shape[1] + 1):
        ranking, _ = recommend(
            policy,
            trie,
            history,
            k,
            thoughts=tokens[:, :done],
            decoder=decoder_for(done),
            **options,
        )
        rankings.append((ranking.items[0].cpu().numpy(), ranking.scores[0].cpu().numpy()))
    moved = (trace.states[0, 1:] - trace.states[0, :-1]).float().norm(dim=-1)
    steps = []
    for step, token in enumerate(tokens[0].tolist()):
        place = policy.tokens.locate(token)
        level, code = place or (None, token - policy.tokens.think_range[0])
        items, scores = rankings[step + 1]
        steps.append(
            ThoughtStep(
                title=f"Items of level {level + 1}, code {code}" if place else f"Thought {code}",
                token=token,
                level=level,
                code=code,
                meaning=meanings.of(level, code) if place else Meaning([], []),
                moved=float(moved[step]),
                items=items,
                scores=scores,
            )
        )
    return Explained(*rankings[0], steps)
