"""Thinking as looking up evidence: one question after the other to a memory of other users."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from streamctl.decode.questions import Asker, LookAlikes, ViewName, latest_first
from streamctl.decode.ranking import Ranking, rank_scores
from streamctl.decode.reader import CANDIDATES, Clues, Reader
from streamctl.device import derive_seed
from streamctl.model.ranker import StateRanker
from streamctl.retrieval.baskets import Found
from streamctl.retrieval.memory import Memory

_STRIDE = 2_654_435_761  # a prime: users draw rows that lie far apart


@dataclass(frozen=True)
class Question:
    """One look-up of a thought, and how what it finds is weighed; chosen on validation users.

    Attributes:
        view: what is compared with the memory (`decode.questions.VIEWS`).
        neighbours: rows that it finds.
        temperature: a row counts exp((cosine - 1) / temperature): a sure look-up has more to say.
        decay: weight of the item after the next one, and again of the one after that.
        weight: w, by how much a row that is wholly alike raises the odds of what it took.
    """

    view: ViewName = "items"
    neighbours: int = 20
    temperature: float = 0.2
    decay: float = 0.5
    weight: float = 10.0


@dataclass(frozen=True)
class EvidenceSettings:
    """A thought: its questions in their order.

    Attributes:
        questions: at most one look-up each.
        repeat: added to the log-probability of an item of the history.
    """

    questions: tuple[Question, ...] = ()
    repeat: float = 0.0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> EvidenceSettings:
        """From what `dataclasses.asdict` gives."""
        return cls(tuple(Question(**entry) for entry in saved["questions"]), saved["repeat"])


@dataclass(frozen=True)
class LookUp:
    """What one question to the memory found.

    Attributes:
        question: the question.
        rows: (B, k) int64 rows of the memory, -1 where there was none.
        weights: (B, k) float32 in 0..1, 0 where there was none.
    """

    question: Question
    rows: np.ndarray
    weights: torch.Tensor

    def row(self, index: int) -> LookUp:
        """One user's look-up, its first dimension kept."""
        one = slice(index, index + 1)
        return LookUp(self.question, self.rows[one], self.weights[one])


@dataclass(frozen=True)
class EvidenceTrace:
    """The thought of each user.

    Attributes:
        state: (B, d) float32, s_0.
        look_ups: in their order.
    """

    state: torch.Tensor
    look_ups: tuple[LookUp, ...]

    def row(self, index: int) -> EvidenceTrace:
        """One user's thought, its first dimension kept."""
        look_ups = tuple(look_up.row(index) for look_up in self.look_ups)
        return EvidenceTrace(self.state[index : index + 1], look_ups)

    def first(self, count: int) -> EvidenceTrace:
        """The thought up to and with look-up number `count`."""
        return EvidenceTrace(self.state, self.look_ups[:count])


class Memo:
    """Look-ups that thinkers of the same memory share: one's thought is often another's beginning.

    Attributes:
        saved_s: seconds that the reused look-ups took when they were made; whoever measures adds
            them and sets them to 0.
    """

    def __init__(self) -> None:
        self.saved_s = 0.0
        self._found: dict[Hashable, tuple[Found, float]] = {}

    def get(self, key: Hashable, ask: Callable[[], Found]) -> Found:
        """What was found under this key, or what `ask` finds."""
        if key in self._found:
            self.saved_s += self._found[key][1]
        else:
            began = time.perf_counter()
            self._found[key] = ask(), time.perf_counter() - began
        return self._found[key][0]


class EvidenceThinker:
    """Ranks by the state's own opinion, raised where other users' choices speak for an item.

        score(item) = log softmax(s_0 . v) + repeat (item in history) + log(1 + sum over i w_i E_i)

    where E_i(item) sums the weights of the rows of look-up i whose users took the item. A row is
    found once: every look-up brings new evidence. This is the summed score; where there is a
    reader, it corrects that of the best `CANDIDATES` items, and the others come after them.
    """

    def __init__(
        self,
        ranker: StateRanker,
        memory: Memory | None,
        settings: EvidenceSettings,
        look_alikes: LookAlikes | None = None,
        *,
        look_ups: int | None = None,
        random: int | None = None,
        reader: Reader | None = None,
    ):
        """A recommender.

        Args:
            ranker: in evaluation mode, on its device.
            memory: its keys are the ranker's states; None where nothing is looked up.
            look_alikes: of the catalogue, for the view `alike`.
            look_ups: l, the first questions to ask; None for all, 0 answers from the state alone.
            random: a seed, to weigh rows drawn at random like the ones found: the control. What is
                asked next follows from the ones found.
            reader: of as many look-ups as there are questions, or more.
        """
        self.reader = reader
        self.ranker, self.memory, self.settings = ranker, memory, settings
        self.look_alikes = look_alikes
        self.look_ups = len(settings.questions) if look_ups is None else look_ups
        self.random = random
        self.memo: Memo | None = None
        with torch.no_grad():
            self.vectors = ranker.item_vectors().float()

    @torch.no_grad()
    def think(
        self, start: torch.Tensor, history: torch.Tensor, users: np.ndarray | None = None
    ) -> EvidenceTrace:
        """Ask the first l questions.

        Args:
            start: s_0 (B, d) float32.
            history: (B, H) int64, oldest first, -1 on the right.
            users: (B,) int64, whose own rows are left out; None for strangers.
        """
        recent = latest_first(history.cpu().numpy())
        asker = Asker(self.memory, self.look_alikes, start, recent, users)
        look_ups: list[LookUp] = []  # what is asked next depends on these
        known = np.empty((len(start), 0), np.int64)
        for number, question in enumerate(self.settings.questions[: self.look_ups]):
            so_far = self.total(look_ups) if look_ups else None
            ask = partial(asker.ask, question.view, question.neighbours, known, so_far)
            if self.memo is None:
                found = ask()
            else:
                whom = b"" if users is None else users.tobytes()
                asked = self.settings.questions[: number + 1]
                found = self.memo.get((asked, whom, recent.tobytes()), ask)
            known = np.concatenate([known, found.rows], axis=1)
            weights = weigh(found.cosine, question, start.device)
            look_ups.append(LookUp(question, found.rows, weights))
        if self.random is not None:
            look_ups = [
                self._at_random(look_up, users, number) for number, look_up in enumerate(look_ups)
            ]
        return EvidenceTrace(start, tuple(look_ups))

    def _at_random(self, look_up: LookUp, users: np.ndarray | None, number: int) -> LookUp:
        """The look-up with other rows, of the same weights."""
        rows = np.where(look_up.rows >= 0, self._drawn(look_up.rows.shape, users, number), -1)
        return LookUp(look_up.question, rows, look_up.weights)

    def _drawn(self, shape: tuple[int, ...], users: np.ndarray | None, number: int) -> np.ndarray:
        """Random rows (B, k) of others, fixed for each user by the seed; -1 for an own one."""
        rng = np.random.default_rng(derive_seed(self.random, "random evidence", number))
        first = rng.integers(0, len(self.memory), shape[1])
        whom = np.zeros(shape[0], np.int64) if users is None else users
        rows = (first + whom[:, None] * _STRIDE) % len(self.memory)
        if users is not None:
            rows[self.memory.users[rows] == users[:, None]] = -1
        return rows

    def taken(self, look_up: LookUp, shares: Sequence[float]) -> torch.Tensor:
        """(B, N) float32: the weights of the rows whose users took an item.

        Args:
            shares: of a row's weight, for the item taken next, the one after that, and so on.
        """
        found = look_up.weights.new_zeros(len(look_up.weights), len(self.vectors))
        for after, share in zip(range(self.memory.taken.shape[1]), shares, strict=False):
            if not share:
                continue
            items = self.memory.taken[look_up.rows, after].astype(np.int64)
            there = torch.from_numpy((items >= 0) & (look_up.rows >= 0)).to(found.device)
            chosen = torch.from_numpy(items.clip(min=0)).to(found.device)
            found.scatter_add_(1, chosen, share * look_up.weights * there)
        return found

    def evidence(self, look_up: LookUp) -> torch.Tensor:
        """E (B, N) float32: what the users of the rows took next, and less what they took later."""
        decay = look_up.question.decay
        return self.taken(look_up, [decay**after for after in range(self.memory.taken.shape[1])])

    def total(self, look_ups: Sequence[LookUp]) -> torch.Tensor:
        """Sum of w_i E_i (B, N) over one look-up or more."""
        return sum(look_up.question.weight * self.evidence(look_up) for look_up in look_ups)

    def log_scores(self, history: torch.Tensor, trace: EvidenceTrace) -> torch.Tensor:
        """Scores (B, N) float32, before items are left out.

        Args:
            history: (B, H) int64, -1 on the right.
        """
        if self.reader is None:
            opinion = self.ranker.opinion(trace.state, self.vectors, history)
            total = self.total(trace.look_ups) if trace.look_ups else torch.zeros_like(opinion)
            return self._summed(opinion, total, history)
        clues, scores = self.clues(self.reader, history, trace)
        read = self.reader(clues)
        unread = scores.scatter(1, clues.items, -torch.inf)
        lowest, best = read.amin(1, keepdim=True), unread.amax(1, keepdim=True)
        return (scores - best + lowest - 1).scatter(1, clues.items, read)

    def _summed(
        self, opinion: torch.Tensor, total: torch.Tensor, history: torch.Tensor
    ) -> torch.Tensor:
        """Summed scores (B, N) of the state's opinion and the look-ups' total, both (B, N)."""
        return repeats(opinion + torch.log1p(total), history, self.settings.repeat)

    def clues(
        self, reader: Reader, history: torch.Tensor, trace: EvidenceTrace
    ) -> tuple[Clues, torch.Tensor]:
        """What the reader is told about each user's candidates.

        Args:
            history: (B, H) int64, -1 on the right.

        Returns:
            the clues, and the summed scores (B, N) of all items after the last look-up.
        """
        opinion = self.ranker.opinion(trace.state, self.vectors, history)
        totals = [torch.zeros_like(opinion)]
        for look_up in trace.look_ups:
            totals.append(totals[-1] + self.total([look_up]))
        last = self._summed(opinion, totals[-1], history)
        items = last.topk(min(CANDIDATES, last.shape[1]), dim=1).indices
        own = reader.own(items, opinion.gather(1, items), self.vectors, history)
        said, seen = own[:, :, 0], own[:, :, 1]
        summed = [
            said + torch.log1p(total.gather(1, items)) + self.settings.repeat * seen
            for total in totals
        ]
        later = [0.0] + [1.0] * (self.memory.taken.shape[1] - 1) if trace.look_ups else []
        found = [
            self.taken(look_up, shares).gather(1, items)
            for look_up in trace.look_ups
            for shares in ([1.0], later)
        ]
        shape = (*items.shape, len(trace.look_ups), 2)
        pairs = torch.stack(found, 2).reshape(shape) if found else own.new_zeros(shape)
        return Clues(items, torch.stack(summed, 2), own, pairs), last

    @torch.no_grad()
    def rank(
        self,
        history: torch.Tensor,
        k: int,
        *,
        users: np.ndarray | None = None,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> Ranking:
        """The k best items of each history (`evaluation.evaluate.Recommender`)."""
        history = history.to(self.vectors.device)
        trace = self.think(self.ranker.states(history), history, users)
        return rank_scores(self.log_scores(history, trace), k, exclude)

    def reasons(self, look_up: LookUp, user: int, count: int = 3) -> list[tuple[list[int], int]]:
        """The heaviest rows of one user's look-up: (what those users had, what they took next)."""
        order = torch.argsort(look_up.weights[user], descending=True, stable=True)[:count]
        rows = look_up.rows[user, order.cpu().numpy()]
        recent, taken = self.memory.recent, self.memory.taken
        rows = rows[rows >= 0]
        return [([int(i) for i in recent[row] if i >= 0], int(taken[row, 0])) for row in rows]


def weigh(
    cosine: np.ndarray, question: Question, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Weights (B, k) float32 of rows of these cosines; 0 for -inf."""
    return torch.exp((torch.from_numpy(cosine).to(device) - 1) / question.temperature)


def repeats(scores: torch.Tensor, history: torch.Tensor, bonus: float) -> torch.Tensor:
    """Scores (B, N) with `bonus` added once to each item of the history (B, H), -1 ignored."""
    seen = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    seen.scatter_(1, history % (scores.shape[1] + 1), True)  # -1 falls on the column that goes
    return scores + bonus * seen[:, :-1]
