"""From a raw log to the catalogue and the leakage-free split that every stage reads."""

from __future__ import annotations

from streamctl.data.catalog import POPULAR, Catalog, id_reader, stranger_note
from streamctl.data.log import InteractionLog
from streamctl.data.prepare import prepare
from streamctl.data.split import Examples, Split
from streamctl.data.synthetic import synthesize
from streamctl.runs import RunDir

__all__ = [
    "POPULAR",
    "Catalog",
    "Examples",
    "InteractionLog",
    "Split",
    "id_reader",
    "load_data",
    "prepare",
    "stranger_note",
    "synthesize",
]


def load_data(run: RunDir) -> tuple[Catalog, Split]:
    """The catalogue and the split of a run.

    Raises:
        StreamctlError: the run or its data stage is missing or damaged.
    """
    stage = run.require("data")
    catalog = Catalog.load(stage)
    history = stage.manifest["config"]["history"]
    return catalog, Split(InteractionLog.load(stage), history, len(catalog))
