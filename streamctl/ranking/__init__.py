"""Rankings, metrics and the Recommender interface, shared by all layers above."""

from streamctl.ranking.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_seeds,
    paired_difference,
)
from streamctl.ranking.evaluate import Evaluation, evaluate, sample_users
from streamctl.ranking.metrics import gains, ranking_metrics, target_ranks
from streamctl.ranking.ranking import Ranking, Thought, rank_scores
from streamctl.ranking.recommender import Recommender

__all__ = [
    "Evaluation",
    "Interval",
    "Ranking",
    "Recommender",
    "Thought",
    "bootstrap_mean",
    "bootstrap_seeds",
    "evaluate",
    "gains",
    "paired_difference",
    "rank_scores",
    "ranking_metrics",
    "sample_users",
    "target_ranks",
]
