"""The Python API: tables in, a run on disk, tables out, everything by the log's own ids.

data = sc.prepare(interactions, items)  # pandas, polars, Arrow, or paths
run = sc.fit(data, size="tiny")
sc.load("runs/mine").recommend(["i1", "i2"], k=10).to_pandas()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamctl.config import BEAM
from streamctl.errors import UsageError, close_matches
from streamctl.runs import RunDir

if TYPE_CHECKING:
    import pyarrow as pa

    from streamctl.recommender import Recommender


@dataclass(frozen=True)
class Run:
    """A run's folder, as `prepare` and `fit` leave it and every command reads it."""

    path: Path

    @property
    def statistics(self) -> dict[str, Any]:
        """What was left of the log: users, items, interactions and more."""
        return RunDir(self.path).require("data").json("statistics.json")

    @property
    def results(self) -> pa.Table:
        """The evaluation, a row a method, then its controls; `evaluation.report.rows`."""
        import pyarrow as pa

        from streamctl.evaluation.report import rows
        from streamctl.evaluation.stage import read_result

        return pa.Table.from_pylist(rows(read_result(RunDir(self.path).require("eval"))))


def prepare(
    interactions: Any, items: Any = None, run: str | Path = "runs/mine", **settings: Any
) -> Run:
    """Clean, filter, order and split a log: `streamctl data prepare` of tables.

    Args:
        interactions: a row an interaction: user_id, item_id, and timestamp or position. Anything
            with `__arrow_c_stream__` (pandas, polars, Arrow, DuckDB), or the path of a log.
        items: a row an item: item_id, title and what else describes it; or a path.
        run: the folder to make. Tables are kept in its `source/`, where commands find them, too.
        settings: columns={"user": ..., "item": ..., "time": ...} where these have other names;
            force=True to redo; and those of [data] in docs/config.md: min_user=3, split="80%,90%".

    Raises:
        UsageError: no table, or an unknown setting.
        StreamctlError: a missing column, a row without an id or a time, nothing left to train on.
    """
    from streamctl.data.tables import prepare_tables

    prepare_tables(RunDir(run), interactions, items, **settings)
    return Run(Path(run))


def fit(
    data: Run | str | Path,
    *,
    size: str | None = None,
    seed: int | None = None,
    config: str | Path | None = None,
    device: str = "auto",
    **settings: Mapping[str, Any],
) -> Run:
    """Train every stage that is not complete and evaluate: `streamctl run`.

    Interrupted, the same call goes on.

    Args:
        data: what `prepare` gave, or a run's folder.
        size: tiny, small or paper.
        config: a TOML file with a table a stage.
        settings: the same tables: tokenize={"encoder": "tfidf"}, pretrain={"epochs": 8}, ...

    Raises:
        UsageError: an unknown stage or setting.
        StreamctlError: what the stages raise.
    """
    from streamctl.config import STAGES, as_text
    from streamctl.pipeline import Settings, run_all

    known = [stage.section for stage in STAGES]
    sets = []
    for stage, table in settings.items():
        if stage not in known or not isinstance(table, Mapping):
            raise UsageError(
                f"fit: {stage}={table!r}; {close_matches(stage, known)}",
                run='a stage with a table of its settings, such as sft={"lr": 1e-3}',
            )
        sets += [f"{stage}.{key}={as_text(value)}" for key, value in table.items()]
    path = data.path if isinstance(data, Run) else Path(data)
    run_all(RunDir(path), Settings(config and Path(config), sets, seed, size), device=device)
    return Run(path)


def load(
    run: Run | str | Path, method: str | None = None, *, device: str = "auto", beam: int = BEAM
) -> Recommender:
    """A run's best method (by validation users, as `fit` found), or the one that is named.

    Args:
        beam: prefixes that a search over codes keeps, or k if that is more.

    Raises:
        UsageError: there is no method of that name.
        StreamctlError: no such run, or a stage that the method is read from is missing or damaged.
    """
    from streamctl.recommender import Recommender

    path = run.path if isinstance(run, Run) else Path(run)
    return Recommender(path, method, device=device, beam=beam)
