"""Training the reader of evidence on validation users, and whether it earns its place.

The loss is a smooth ndcg: the rank of the target among its candidates, with a sigmoid for every
comparison (Qin, Liu & Li 2010, "A general approximation framework for direct optimization of
information retrieval measures"). Cross-entropy would spend itself on the many targets that no
evidence brings near the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from streamctl.data import Examples
from streamctl.decode.evidence import EvidenceThinker
from streamctl.decode.reader import Clues, Reader
from streamctl.device import derive_seed
from streamctl.evaluation.metrics import gains

STEPS = 400
BATCH = 128
LR = 1e-2
WEIGHT_DECAY = 0.3
WARMUP_STEPS = 50
TEMPERATURE = 0.5  # of the sigmoids
FOLDS = 4  # of the users, to judge a reader by those that it was not trained on
_USERS = 512  # whose clues are gathered at a time
_DEPTH = 10


@dataclass(frozen=True)
class Lesson:
    """The users to learn from.

    Attributes:
        clues: of every user.
        hit: (U, C) bool, the candidate that is the target; no candidate for most users.
    """

    clues: Clues
    hit: torch.Tensor

    def rows(self, rows: torch.Tensor) -> Lesson:
        return Lesson(self.clues.rows(rows), self.hit[rows])

    def ranks(self, scores: torch.Tensor) -> np.ndarray:
        """(U,) int64 ranks of the targets by scores (U, C); C where no candidate is the target."""
        own = scores.masked_fill(~self.hit, -torch.inf).amax(1, keepdim=True)
        ranks = (scores > own).sum(1).masked_fill(~self.hit.any(1), scores.shape[1])
        return ranks.cpu().numpy()


@torch.no_grad()
def gather(thinker: EvidenceThinker, reader: Reader, examples: Examples) -> Lesson:
    """The clues of a whole thought for every user of `examples`."""
    device = thinker.vectors.device
    parts, hits = [], []
    for start in range(0, len(examples), _USERS):
        part = examples.subset(np.arange(start, min(start + _USERS, len(examples))))
        history = torch.from_numpy(part.histories(np.arange(len(part)))).to(device)
        trace = thinker.think(thinker.ranker.states(history), history, part.users)
        parts.append(thinker.clues(reader, history, trace)[0])
        targets = torch.from_numpy(part.targets).to(device)
        hits.append(parts[-1].items == targets[:, None])
    names = ("items", "summed", "own", "found")
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in names)
    return Lesson(Clues(*joined), torch.cat(hits))


def smooth_ndcg(scores: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
    """Scalar in 0..1 of scores (B, C), one target a row of hit (B, C)."""
    own = scores[hit][:, None]
    rank = 0.5 + torch.sigmoid((scores - own) / TEMPERATURE).sum(1)  # the target's own half: 1
    return (1 / torch.log2(1 + rank)).mean()


def train(reader: Reader, lesson: Lesson, seed: int) -> Reader:
    """Train the network of every length on the users whose target is a candidate."""
    lesson = lesson.rows(lesson.hit.any(1).nonzero()[:, 0])
    if len(lesson.hit):
        reader.fit_scale(lesson.clues)
        for asked in range(len(reader.networks)):
            _train_one(reader, asked, lesson, derive_seed(seed, "reader", asked))
    return reader.eval()


def _train_one(reader: Reader, asked: int, lesson: Lesson, seed: int) -> None:
    """Train the network that reads `asked` look-ups."""
    draws = torch.Generator().manual_seed(seed)
    users = len(lesson.hit)
    weights = reader.networks[asked].parameters()
    optimiser = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 1 - step / STEPS)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for _ in range(STEPS):
        rows = torch.randint(users, (min(BATCH, users),), generator=draws)
        part = lesson.rows(rows.to(lesson.hit.device))
        loss = -smooth_ndcg(reader(part.clues, asked), part.hit)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@dataclass(frozen=True)
class Reading:
    """A trained reader, and what it is worth on users that it was not trained on.

    Attributes:
        reader: trained on all users.
        gained: (l + 1, U) each user's ndcg@10 after 0, 1, ..., l look-ups, cross-validated, among
            the candidates of the whole thought.
        summed: (l + 1, U) the same by the summed scores.
    """

    reader: Reader
    gained: np.ndarray
    summed: np.ndarray


def learn(
    thinker: EvidenceThinker,
    examples: Examples,
    texts: np.ndarray,
    popularity: np.ndarray,
    seed: int,
) -> Reading:
    """Train a reader of the thinker's whole thought, and judge it by cross-validation.

    Args:
        thinker: without a reader; all its questions are asked.
        examples: of validation users.
        texts: (N, e) text vectors of the items. popularity: (N,) interactions in training.
    """
    count = len(thinker.settings.questions)

    def blank() -> Reader:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "reader's weights"))
            found = Reader(count, torch.from_numpy(texts), torch.from_numpy(popularity))
        return found.to(thinker.vectors.device)

    lesson = gather(thinker, blank(), examples)
    shuffled = np.random.default_rng(derive_seed(seed, "folds")).permutation(len(examples))
    folds = np.array_split(shuffled, FOLDS)
    ranks = np.empty((count + 1, len(examples)), np.int64)
    for number, fold in enumerate(folds):
        others = np.concatenate([other for place, other in enumerate(folds) if place != number])
        reader = train(blank(), lesson.rows(torch.from_numpy(others)), seed)
        held_out = lesson.rows(torch.from_numpy(fold))
        for asked in range(count + 1):
            with torch.no_grad():
                ranks[asked, fold] = held_out.ranks(reader(held_out.clues, asked))
    summed = [lesson.ranks(lesson.clues.summed[:, :, asked]) for asked in range(count + 1)]
    return Reading(
        train(blank(), lesson, seed), gains(ranks, _DEPTH), gains(np.array(summed), _DEPTH)
    )
