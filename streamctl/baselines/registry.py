"""The baselines by name; a new one is added here."""

from __future__ import annotations

from collections.abc import Sequence

from streamctl.baselines.base import Baseline
from streamctl.baselines.bert4rec import BERT4Rec
from streamctl.baselines.caser import Caser
from streamctl.baselines.gru4rec import GRU4Rec
from streamctl.baselines.hops import KNN, Transitions
from streamctl.baselines.popularity import Popularity
from streamctl.baselines.ranker import Ranker
from streamctl.baselines.sasrec import SASRecBCE, SASRecCE
from streamctl.baselines.tiger import Tiger
from streamctl.config import BaselineConfig
from streamctl.errors import UsageError, close_matches

BASELINES: dict[str, type[Baseline]] = {
    "popularity": Popularity,
    "transitions": Transitions,
    "knn": KNN,
    "ranker": Ranker,
    "caser": Caser,
    "gru4rec": GRU4Rec,
    "sasrec_bce": SASRecBCE,
    "sasrec_ce": SASRecCE,
    "bert4rec": BERT4Rec,
    "tiger": Tiger,
}


def baseline_class(name: str) -> type[Baseline]:
    """The class of a baseline.

    Raises:
        UsageError: there is none of that name; names those that are near.
    """
    if name not in BASELINES:
        raise UsageError(f"unknown baseline {name!r}; {close_matches(name, BASELINES)}")
    return BASELINES[name]


def own_settings(config: BaselineConfig) -> BaselineConfig:
    """What was set for all baselines, without the settings that this one does not have."""
    return BaselineConfig(**{name: getattr(config, name) for name in _settings(config.name)})


def applicable(name: str, sets: Sequence[str]) -> list[str]:
    """`--set` texts for all baselines, without those of settings that this one does not have."""
    known, prefix = _settings(name), "baseline."
    return [
        text
        for text in sets
        if not text.startswith(prefix) or text.partition("=")[0].removeprefix(prefix) in known
    ]


def _settings(name: str) -> set[str]:
    return baseline_class(name).defaults.keys() | {"seed", "name", "loss"}
