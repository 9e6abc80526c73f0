"""The baselines by name; a new one is added here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from streamctl.baselines.base import Baseline
from streamctl.baselines.bert4rec import BERT4Rec
from streamctl.baselines.caser import Caser
from streamctl.baselines.gru4rec import GRU4Rec
from streamctl.baselines.hops import KNN, Transitions
from streamctl.baselines.popularity import Popularity
from streamctl.baselines.ranker import Ranker
from streamctl.baselines.sasrec import SASRecBCE, SASRecCE
from streamctl.baselines.tiger import Tiger
from streamctl.config import BaselineConfig, resolve
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


def settings(name: str) -> set[str]:
    """Names of the settings that a baseline has."""
    return baseline_class(name).defaults.keys() | {"seed", "name", "loss"}


def no_setting(name: str, key: str, known: Iterable[str]) -> UsageError:
    """What is said of a setting that a baseline does not have."""
    return UsageError(
        f"{name} has no setting {key!r}; {close_matches(key, known)}",
        run="docs/config.md, [baseline], says which setting is whose",
    )


def resolved(name: str, *, sets: Sequence[str] = (), **options: Any) -> BaselineConfig:
    """A baseline's configuration: of what is set for all of them (`baseline.key=value`, a file's
    [baseline]) the settings that it has; then its own (`NAME.key=value`).

    Args:
        options: of `config.resolve`.

    Raises:
        UsageError: as `config.resolve`, or one of its own is no setting of it.
    """
    own = [f"baseline.{text.partition('.')[2]}" for text in sets if text.startswith(f"{name}.")]
    shared = [text for text in sets if text.partition(".")[0] not in BASELINES]
    given = resolve(BaselineConfig, sets=shared, name=name, **options)
    base = {setting: getattr(given, setting) for setting in settings(name)}
    for text in own:
        if (key := text.partition("=")[0].removeprefix("baseline.").strip()) not in base:
            raise no_setting(name, key, base)
    return resolve(BaselineConfig, base=base, sets=own)
