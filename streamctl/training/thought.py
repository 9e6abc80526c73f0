"""Choosing a thought: which questions to ask, in which order, by forward selection on validation.

The next question is the one whose gain in ndcg@10 over the thought so far, less its standard error
over users, is highest: a gain that a few users make is no gain. In the same way the thought is as
long as its gain over no look-up is surest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numba
import numpy as np
import torch

from streamctl.data import Examples
from streamctl.decode.evidence import (
    EvidenceSettings,
    EvidenceThinker,
    LookUp,
    Question,
    repeats,
    weigh,
)
from streamctl.decode.questions import VIEWS, Asker, LookAlikes, ViewName, latest_first
from streamctl.evaluation.metrics import gains
from streamctl.kernels import threads
from streamctl.model.ranker import StateRanker, states_of
from streamctl.retrieval.memory import Memory

TEMPERATURES = (0.1, 0.2, 0.4)
DECAYS = (0.0, 0.5)
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
REPEATS = (1.0, 0.0, -1.0, -2.0, -4.0, -8.0)
_DEPTH = 10  # of the ndcg that decides
_USERS = 512  # ranked at a time
_RANGE = 32  # of them that one thread takes at a time


@dataclass(frozen=True)
class Trial:
    """A question that was tried after others.

    Attributes:
        question: the question.
        ranks: (U,) the target's rank for every user, exact below 10.
        ndcg: mean over users of ndcg@10.
        gain: its mean gain over the thought before, less the standard error of that mean.
    """

    question: Question
    ranks: np.ndarray
    ndcg: float
    gain: float


class Chooser:
    """Validation users, whose states and look-ups are computed once for many settings."""

    def __init__(
        self,
        ranker: StateRanker,
        memory: Memory,
        look_alikes: LookAlikes,
        examples: Examples,
        *,
        neighbours: int,
        look_ups: int,
    ):
        """Look everything up that does not depend on what was found before.

        Args:
            examples: of validation.
            neighbours: rows of a look-up.
            look_ups: the most questions of a thought.
        """
        self.ranker, self.memory = ranker, memory
        self.neighbours, self.look_ups = neighbours, look_ups
        device = ranker.item_tokens.device
        history = examples.histories(np.arange(len(examples)))
        states = states_of(ranker, examples.lengths, examples.histories)
        self.states = torch.from_numpy(states).to(device)
        self.history = torch.from_numpy(history).to(device)
        self.recent, self.users = latest_first(history), examples.users
        self.targets = examples.targets
        self.thinker = EvidenceThinker(ranker, memory, EvidenceSettings(), look_alikes)
        # As many rows as all look-ups together may find: each takes the nearest that are new.
        self._nearest = {
            name: self._ask(name, neighbours * look_ups)
            for name, view in VIEWS.items()
            if not view.found
        }

    def _ask(
        self,
        name: ViewName,
        k: int,
        known: np.ndarray | None = None,
        found: Sequence[LookUp] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (U, k) int32 and cosines (U, k) of every user."""
        rows = np.empty((len(self.users), k), np.int32)
        cosine = np.empty((len(self.users), k), np.float32)
        for part in self._parts():
            evidence = self.thinker.total([_cut(x, part) for x in found]) if found else None
            asker = Asker(
                self.memory, self.thinker.look_alikes, self.states[part], self.recent[part],
                self.users[part],
            )  # fmt: skip
            answer = asker.ask(name, k, None if known is None else known[part], evidence)
            rows[part], cosine[part] = answer.rows, answer.cosine
        return rows, cosine

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.users), _USERS):
            yield slice(start, min(start + _USERS, len(self.users)))

    def _base(self, part: slice, repeat: float) -> torch.Tensor:
        """(n, N): the scores of the state alone."""
        history = self.history[part]
        scores = self.ranker.opinion(self.states[part], self.thinker.vectors, history)
        return repeats(scores, history, repeat)

    def repeat(self) -> tuple[float, np.ndarray]:
        """The repeat term of highest ndcg@10 on the state alone, and the ranks with it."""
        values = (round(self.ranker.repeat.item(), 3), *REPEATS)
        ranks = np.empty((len(values), len(self.users)), np.int32)
        for part in self._parts():
            wanted = torch.from_numpy(self.targets[part, None]).to(self.states.device)
            for number, value in enumerate(values):
                scores = self._base(part, value)
                better = (scores > scores.gather(1, wanted)).sum(1)
                ranks[number, part] = better.cpu().numpy()
        best = int(np.argmax(gains(ranks, _DEPTH).mean(1)))
        return values[best], ranks[best]

    def candidates(self, found: Sequence[LookUp]) -> dict[ViewName, tuple[np.ndarray, np.ndarray]]:
        """Rows and cosines (U, k) that each view brings after these look-ups."""
        if not found:
            return {name: _head(*near, self.neighbours) for name, near in self._nearest.items()}
        known = np.concatenate([look_up.rows for look_up in found], 1)
        answers = {
            name: _new(*near, known, self.neighbours) for name, near in self._nearest.items()
        }
        follows = (name for name, view in VIEWS.items() if view.found)
        return answers | {name: self._ask(name, self.neighbours, known, found) for name in follows}

    def wide(self) -> dict[ViewName, tuple[np.ndarray, np.ndarray]]:
        """What each view finds that asks once, for as many rows as all look-ups together."""
        return {
            name: _head(*near, self.neighbours * self.look_ups)
            for name, near in self._nearest.items()
        }

    def best(
        self,
        answers: dict[ViewName, tuple[np.ndarray, np.ndarray]],
        found: Sequence[LookUp],
        repeat: float,
        ranks_before: np.ndarray,
    ) -> list[Trial]:
        """Each view's best question after `found`, which led to `ranks_before`; best first."""
        ways = list(product(answers, TEMPERATURES, DECAYS))
        shape = len(ways), len(STRENGTHS), len(self.users)
        ranks = np.empty(shape, np.int32)
        for part in self._parts():
            base = self._base(part, repeat)
            total = (
                self.thinker.total([_cut(look_up, part) for look_up in found])
                if found
                else torch.zeros_like(base)
            )
            before = base + torch.log1p(total)
            top = before.topk(min(_DEPTH, before.shape[1]), dim=1).indices.cpu().numpy()
            arrays = [x.cpu().numpy() for x in (base, total, before)]
            for number, (name, temperature, decay) in enumerate(ways):
                rows, cosine = (array[part] for array in answers[name])
                weights = weigh(cosine, Question(name, temperature=temperature)).numpy()
                ranks[number, :, part] = self._ranks(
                    arrays, top, self.targets[part], rows, weights, decay
                )
        old = gains(ranks_before, _DEPTH)
        gained = np.array([[surely(gains(row, _DEPTH) - old) for row in way] for way in ranks])
        trials = []
        for name in answers:
            own = [number for number, way in enumerate(ways) if way[0] == name]
            number, level = max(product(own, range(len(STRENGTHS))), key=lambda at: gained[at])
            _, temperature, decay = ways[number]
            size = answers[name][0].shape[1]
            question = Question(name, size, temperature, decay, STRENGTHS[level])
            chosen = ranks[number, level]
            ndcg, gain = float(gains(chosen, _DEPTH).mean()), float(gained[number, level])
            trials.append(Trial(question, chosen, ndcg, gain))
        return sorted(trials, key=lambda trial: -trial.gain)

    def _ranks(
        self,
        scores: Sequence[np.ndarray],
        top: np.ndarray,
        targets: np.ndarray,
        rows: np.ndarray,
        weights: np.ndarray,
        decay: float,
    ) -> np.ndarray:
        """(strengths, n) int32."""
        taken = self.memory.taken
        shares = np.array([decay**after for after in range(taken.shape[1])], np.float32)
        out = np.empty((len(STRENGTHS), len(targets)), np.int32)
        strengths = np.array(STRENGTHS, np.float32)

        def run(first: int, last: int) -> None:
            _rank(
                *scores, top, targets, rows, weights, taken, shares, strengths, first, last, out
            )  # fmt: skip

        threads.over_ranges(run, len(targets), _RANGE)
        return out

    def look_up(self, trial: Trial, answer: tuple[np.ndarray, np.ndarray]) -> LookUp:
        """What the question found, of every user."""
        rows, cosine = answer
        device = self.states.device
        return LookUp(trial.question, rows.astype(np.int64), weigh(cosine, trial.question, device))


def choose(chooser: Chooser) -> tuple[EvidenceSettings, dict[str, Any]]:
    """The questions of a thought, one after the other.

    Returns:
        settings with as many questions as a thought may have; and the report: `look_ups`, how
        many of them are asked (`best_length`); `valid`, ndcg@10 after 0, 1, ... look-ups; `tried`,
        what each view would have gained at each step, less its standard error; `wide`, the control:
        the best single look-up of as many rows as all of them.
    """
    repeat, ranks = chooser.repeat()
    after = [ranks]
    valid = {"0 look-ups": {"ndcg@10": float(gains(ranks, _DEPTH).mean())}}
    found: list[LookUp] = []
    tried: list[dict[str, float]] = []
    for number in range(1, chooser.look_ups + 1):
        answers = chooser.candidates(found)
        trials = chooser.best(answers, found, repeat, ranks)
        chosen = trials[0]
        found.append(chooser.look_up(chosen, answers[chosen.question.view]))
        ranks = chosen.ranks
        after.append(ranks)
        valid[f"{number} look-ups"] = {"ndcg@10": chosen.ndcg}
        tried.append({trial.question.view: trial.gain for trial in trials})
    questions = tuple(look_up.question for look_up in found)
    wide = chooser.best(chooser.wide(), (), repeat, after[0])[0]
    return EvidenceSettings(questions, repeat), {
        "look_ups": best_length(gains(np.array(after), _DEPTH)),
        "valid": valid,
        "tried": tried,
        "wide": {"question": asdict(wide.question), "ndcg@10": wide.ndcg},
    }


def best_length(gained: np.ndarray) -> int:
    """The number of look-ups, one or more, whose gain over none is surest.

    Args:
        gained: (l + 1, U) ndcg@10 of every user after 0, 1, ..., l look-ups.
    """
    return 1 + int(np.argmax([surely(after - gained[0]) for after in gained[1:]]))


def surely(gain: np.ndarray) -> float:
    """The mean of paired gains (U,) less its standard error."""
    return float(gain.mean() - gain.std() / len(gain) ** 0.5)


def _cut(look_up: LookUp, part: slice) -> LookUp:
    return LookUp(look_up.question, look_up.rows[part], look_up.weights[part])


def _head(rows: np.ndarray, cosine: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, :k], cosine[:, :k]


def _new(
    rows: np.ndarray, cosine: np.ndarray, known: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k rows that are not known, in their order, and their cosines."""
    left = np.full((len(rows), k), -1, rows.dtype)
    near = np.full((len(rows), k), -np.inf, cosine.dtype)
    size = int(max(rows.max(initial=0), known.max(initial=0))) + 1
    _leave_out(rows, cosine, known, np.zeros(size, np.bool_), left, near)
    return left, near


@numba.njit(nogil=True, cache=True)
def _leave_out(rows, cosine, known, gone, left, near):
    for user in range(len(rows)):
        for row in known[user]:
            if row >= 0:
                gone[row] = True
        count = 0
        for place in range(rows.shape[1]):
            row = rows[user, place]
            if count < left.shape[1] and row >= 0 and not gone[row]:
                left[user, count], near[user, count] = row, cosine[user, place]
                count += 1
        for row in known[user]:
            if row >= 0:
                gone[row] = False


@numba.njit(nogil=True, cache=True)
def _rank(
    base, total, before, top, targets, rows, weights, taken, shares, strengths, first, last, out
):  # fmt: skip
    """Ranks of the targets of users first..last with evidence of each strength added.

    An item without new evidence keeps its score, so only the best of those can be above the
    target while its rank is below 10.
    """
    found = np.zeros(base.shape[1], np.float32)
    touched = np.empty(rows.shape[1] * taken.shape[1], np.int32)
    for user in range(first, last):
        count = 0
        for place in range(rows.shape[1]):
            row = rows[user, place]
            if row < 0:
                continue
            for after in range(len(shares)):
                item = taken[row, after]
                value = shares[after] * weights[user, place]
                if item >= 0 and value > 0:
                    if found[item] == 0:
                        touched[count] = item
                        count += 1
                    found[item] += value
        target = targets[user]
        for level in range(len(strengths)):
            strength = strengths[level]
            goal = base[user, target] + np.log1p(total[user, target] + strength * found[target])
            rank = 0
            for item in top[user]:
                if item != target and found[item] == 0 and before[user, item] > goal:
                    rank += 1
            for place in range(count):
                item = touched[place]
                if item != target:
                    raised = total[user, item] + strength * found[item]
                    if base[user, item] + np.log1p(raised) > goal:
                        rank += 1
            out[level, user] = rank
        for place in range(count):
            found[touched[place]] = 0
