"""The policy in service: the best finished stage of rl, sft and pretrain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamctl.decode import recommend
from streamctl.runs import RunDir, Stage
from streamctl.serving.explain import Meanings, decoder_for, explain_thought
from streamctl.serving.job import Job, Reply, padded
from streamctl.serving.model import load_policy, model_name, thought_length
from streamctl.serving.schemas import MAX_THINK
from streamctl.tokenizer import PrefixTrie, SemanticIds


class Stream:
    """A policy that answers jobs.

    Attributes:
        think: tokens of a thought where the caller leaves it open.
        most: the most tokens that a thought may have.
    """

    def __init__(
        self, run: RunDir, stage: Stage, ids: SemanticIds, meanings: Meanings, device: str
    ):
        """Load a stage.

        Raises:
            StreamctlError: the artifacts are damaged or do not fit the tokenizer's codes.
        """
        self.model = model_name(run, stage)
        self.think = thought_length(run, stage)
        self.most = MAX_THINK if self.think else 0
        self._policy = load_policy(stage, ids, device)
        self._meanings = meanings

    def join(self, item: int, tokens: np.ndarray) -> None:
        """Make an added item readable in histories: the model knows its codes and no more.

        Args:
            item: its number, one after the last that was known.
            tokens: int64 (m,).
        """
        known = self._policy.item_tokens
        row = torch.from_numpy(tokens).to(known)[None]
        self._policy.item_tokens = torch.cat([known[:item], row])

    def answer(self, jobs: Sequence[Job], trie: PrefixTrie, removed: np.ndarray) -> list[Reply]:
        """Replies to jobs of one group.

        Args:
            trie: of all items, added ones included.
            removed: int64, items that nobody may be shown.
        """
        think = jobs[0].think
        ranking, trace = recommend(
            self._policy,
            trie,
            padded([job.history for job in jobs]),
            max(job.k for job in jobs),
            think=think,
            decoder=decoder_for(think),
            **_options(jobs, removed),
        )
        items, scores = ranking.items.cpu().numpy(), ranking.scores.cpu().numpy()
        replies = []
        for row, job in enumerate(jobs):
            explained = None
            if job.explain:
                explained = explain_thought(
                    self._policy,
                    trie,
                    self._meanings,
                    padded([job.history]),
                    trace.row(row),
                    job.k,
                    **_options([job], removed),
                )
            replies.append(Reply(items[row, : job.k], scores[row, : job.k], explained))
        return replies


def _options(jobs: Sequence[Job], removed: np.ndarray) -> dict[str, Any]:
    """What `recommend` is told beside histories and lengths."""
    return {
        "mode": jobs[0].mode,
        "beam": jobs[0].beam,
        "exclude": [np.union1d(job.exclude, removed) for job in jobs],
        "allow": [job.allow for job in jobs],
    }
