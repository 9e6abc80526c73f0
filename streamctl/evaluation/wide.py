"""The control of equal latency: a beam as wide as the slow thinker's time allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamctl.data import Examples
from streamctl.evaluation.evaluate import evaluate, sample_users
from streamctl.evaluation.generative import PolicyRecommender

TRIAL_USERS = 512
TRIALS = 3


@dataclass(frozen=True)
class Wide:
    """The recommender, and the beam it got."""

    recommender: PolicyRecommender
    beam: int


def widen(
    recommender: PolicyRecommender,
    examples: Examples,
    latency: Mapping[str, float],
    *,
    slow: str,
    fast: str,
) -> Wide:
    """The fast recommender with the beam at which it takes as long as the slow one.

    The time of a beam is taken as a line through the last two widths measured, starting from the
    width and time that `fast` was evaluated with; a few trials on a sample refine it. A fast
    recommender that is already slower keeps its beam.

    Args:
        latency: milliseconds a user of each evaluated row, measured on these examples.
    """
    n_items = recommender.policy.item_tokens.shape[0]
    sample = sample_users(examples, TRIAL_USERS, recommender.seed)
    wanted = latency[slow]
    beam, spent = recommender.beam, latency[fast]
    if spent >= wanted:
        return Wide(recommender, beam)
    width = round(beam * wanted / spent)
    for _ in range(TRIALS):
        width = min(max(width, beam), n_items)
        trial = replace(recommender, beam=width)
        took = evaluate(trial, sample, n_items=n_items, masked=False, title="wide beam")
        slope = (took.ms_per_user - spent) / max(width - beam, 1)
        if abs(took.ms_per_user - wanted) <= 0.05 * wanted or slope <= 0:
            break
        width = round(width + (wanted - took.ms_per_user) / slope)
    width = min(max(width, beam), n_items)
    return Wide(replace(recommender, beam=width), width)
