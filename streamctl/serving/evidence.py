"""The evidence thinker in service: who had these, and what they took next."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from streamctl.decode.evidence import EvidenceThinker, EvidenceTrace
from streamctl.decode.questions import VIEWS
from streamctl.decode.ranking import rank_scores
from streamctl.device import resolve_device
from streamctl.model.ranker import states_of
from streamctl.runs import RunDir
from streamctl.serving.explain import EXAMPLES, Explained, Meaning, Meanings, Reason, ThoughtStep
from streamctl.serving.job import Job, Reply, padded
from streamctl.serving.model import model_name
from streamctl.tokenizer import PrefixTrie
from streamctl.training.evidence import load_thinker

SHOWN = 3  # reasons of a look-up
READ = 20  # reasons whose items give the look-up its words
HAD = 3  # items of a reason
MOST_WAITING = 512  # interactions that wait for the next answer before they join the memory


class Evidence:
    """An evidence stage that answers jobs.

    It knows the items of its run: those added since are neither read nor recommended. What users
    take while it serves joins its memory; the weights stay.

    Attributes:
        think: look-ups where the caller leaves it open: as many as validation preferred.
        most: the most look-ups that a thought may have, those of its training.
    """

    def __init__(self, run: RunDir, meanings: Meanings, device: str, history: int):
        """Load the stage.

        Args:
            history: the most items that a state is made of.

        Raises:
            StreamctlError: it is missing, stale or damaged.
        """
        self._thinker = load_thinker(run, resolve_device(device))  # and checks the stage
        stage = run.stage("evidence")
        self.model = model_name(run, stage)
        self.think = stage.json("report.json")["look_ups"]
        self.most = stage.manifest["config"]["look_ups"]
        self._askings: dict[int, EvidenceThinker] = {}
        self._meanings, self._history = meanings, history
        self._news: dict[int, list[np.ndarray]] = {}  # user: what was before, then what was taken
        self._waiting = 0  # items in there
        self._open: dict[int, list[int]] = {}  # user: rows that have room for what comes later

    def _asking(self, count: int) -> EvidenceThinker:
        """The thinker with so many look-ups; weights and memory are shared."""
        if count not in self._askings:
            self._askings[count] = copy.copy(self._thinker)
            self._askings[count].look_ups = count
        return self._askings[count]

    def readable(self, history: np.ndarray) -> np.ndarray:
        """The items of a history that were there when the evidence was gathered."""
        return history[history < len(self._thinker.vectors)]

    def learn(self, user: int, before: np.ndarray, items: np.ndarray) -> None:
        """Have what a user took be evidence for others, from the next answer on.

        Args:
            before: int64 (H,) what the user had taken, oldest first. items: int64 (n,).
        """
        _, recent = self._thinker.memory.recent.shape
        known = self.readable(before)[-max(self._history, recent) :]
        self._news.setdefault(user, [known]).append(self.readable(items))
        self._waiting += len(items)
        if self._waiting >= MOST_WAITING:
            self._remember()

    @torch.inference_mode()
    def _remember(self) -> None:
        """Put what was learned into the memory: a row an item, like that of a training prefix."""
        memory = self._thinker.memory
        (_, after), (_, width) = memory.taken.shape, memory.recent.shape
        prefixes: list[np.ndarray] = []
        taken: list[np.ndarray] = []
        users: list[int] = []
        opened: dict[int, list[int]] = {}
        for user, (before, *parts) in self._news.items():
            whole = np.concatenate([before, *parts])
            for place in range(max(1, len(before)), len(whole)):
                opened.setdefault(user, []).append(len(memory) + len(prefixes))
                prefixes.append(whole[:place])
                taken.append(whole[place:])
                users.append(user)
        if prefixes:
            read = [prefix[-self._history :] for prefix in prefixes]
            keys = states_of(
                self._thinker.ranker,
                np.array([len(prefix) for prefix in read]),
                lambda rows: np.stack([read[row] for row in rows]),
            )
            recent = _filled([prefix[::-1] for prefix in prefixes], width)
            memory.append(keys, _filled(taken, after), np.array(users), recent)
        for user, (_, *parts) in self._news.items():
            self._go_on(self._open.get(user, []), np.concatenate(parts))
            rows = self._open.get(user, []) + opened.get(user, [])
            self._open[user] = rows[-(after - 1) :]
        self._news, self._waiting = {}, 0

    def _go_on(self, rows: list[int], items: np.ndarray) -> None:
        """Write what a user took later into the latest rows that earlier interactions made."""
        taken = self._thinker.memory.taken
        for row in rows:
            free = np.flatnonzero(taken[row] < 0)[: len(items)]
            taken[row, free] = items[: len(free)]

    def answer(self, jobs: Sequence[Job], trie: PrefixTrie, removed: np.ndarray) -> list[Reply]:
        """Replies to jobs of one group; the trie is not used."""
        self._remember()
        thinker = self._asking(jobs[0].think)
        history = padded([job.history for job in jobs]).to(thinker.vectors.device)
        users = np.array([job.user for job in jobs])
        trace = thinker.think(thinker.ranker.states(history), history, users)
        barred = self._barred(jobs, removed)
        k = max(job.k for job in jobs)
        items, scores = _best(thinker.log_scores(history, trace), barred, k)
        replies = []
        for row, job in enumerate(jobs):
            explained = None
            if job.explain:
                one = slice(row, row + 1)
                explained = self._explained(
                    thinker, history[one], trace.row(row), barred[one], job.k
                )
            replies.append(Reply(items[row, : job.k], scores[row, : job.k], explained))
        return replies

    def _barred(self, jobs: Sequence[Job], removed: np.ndarray) -> torch.Tensor:
        """(B, N) bool: what each job may not be shown."""
        known = len(self._thinker.vectors)
        barred = np.zeros((len(jobs), known), bool)
        for row, job in zip(barred, jobs, strict=True):
            if job.allow is not None:
                row[:] = True
                row[job.allow[job.allow < known]] = False
            row[job.exclude[job.exclude < known]] = True
        barred[:, removed[removed < known]] = True
        return torch.from_numpy(barred).to(self._thinker.vectors.device)

    def _explained(
        self,
        thinker: EvidenceThinker,
        history: torch.Tensor,
        trace: EvidenceTrace,
        barred: torch.Tensor,
        k: int,
    ) -> Explained:
        """One user's look-ups in words, each with the ranking after it."""
        rankings = []
        for done in range(len(trace.look_ups) + 1):
            items, scores = _best(thinker.log_scores(history, trace.first(done)), barred, k)
            rankings.append((items[0], scores[0]))
        steps = []
        for number, look_up in enumerate(trace.look_ups):
            reasons = thinker.reasons(look_up, 0, READ)
            taken = list(dict.fromkeys(took for _, took in reasons))
            words = self._meanings.telling(np.array(taken, np.int64)) if taken else []
            items, scores = rankings[number + 1]
            steps.append(
                ThoughtStep(
                    title=f"Look-up {number + 1}: {VIEWS[look_up.question.view].asks}",
                    meaning=Meaning(words, taken[:EXAMPLES]),
                    items=items,
                    scores=scores,
                    reasons=[Reason(had[:HAD], took) for had, took in reasons[:SHOWN]],
                )
            )
        return Explained(*rankings[0], steps)


def _filled(rows: list[np.ndarray], width: int) -> np.ndarray:
    """(R, width) int64: the first items of each row, -1 on the right."""
    filled = np.full((len(rows), width), -1, np.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row[:width]
    return filled


def _best(scores: torch.Tensor, barred: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best items that are not barred, and their scores, both (B, k); item -1 for none."""
    ranking = rank_scores(scores.masked_fill(barred, -torch.inf), k)
    return ranking.items.cpu().numpy(), ranking.scores.cpu().numpy()
