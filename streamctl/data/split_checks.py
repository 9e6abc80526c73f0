"""What is wrong with a log as it would be prepared: filters, order, cold items, leakage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from streamctl.data.catalog import Catalog
from streamctl.data.columns import forget
from streamctl.data.findings import Finding, count_of
from streamctl.data.log import InteractionLog, ranges
from streamctl.data.split import HELD_OUT
from streamctl.data.statistics import id_rank, is_sorted_by_id, is_tie_biased

_ID_TIME = 0.5  # rank correlation of id and first appearance from which ids tell the time
_NEVER = np.iinfo(np.int64).max


def filters(facts: dict[str, Any]) -> Iterator[Finding]:
    """What each filter takes."""
    removed, read = facts["removed"], facts["read"]
    if not removed["users"] and not removed["items"]:
        yield Finding("filters", "good", "no filter takes anything")
        return
    lost = 1 - facts["interactions"] / read["interactions"]
    yield Finding(
        "filters",
        "warning" if lost > 0.5 else "note",
        f"in {count_of(removed['rounds'], 'round')} go {removed['users']:,} of {read['users']:,} "
        f"users, {removed['items']:,} of {read['items']:,} items, {lost:.1%} of interactions",
        "--min-user and --min-item keep more; state them with results",
        [
            f"{count_of(removed[which], noun)} with fewer than {removed[least]} interactions, and "
            f"{count_of(removed[f'interactions_of_{which}'], 'interaction')} with them"
            for which, noun, least in (
                ("short_users", "user", "min_user"),
                ("rare_items", "item", "min_item"),
            )
        ],
    )


def order(log: InteractionLog, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the sequences are in the order of time, or of something else."""
    ascending, above = facts["ascending_ids"], facts["test_id_above_valid_id"]
    timed = log.timestamps is not None
    if is_sorted_by_id(facts):
        yield Finding(
            "order",
            "error",
            f"the sequences are sorted by item id ({ascending:.0%} of neighbours ascend), not by "
            "time: every result on them is meaningless",
            "get the log with its timestamps",
        )
    elif is_tie_biased(facts):
        yield Finding(
            "order",
            "warning",
            f"P(id of the test item > id of the valid item) is {above:.2f}, 0.50 is unbiased: "
            "items taken at the same time were sorted by id, or ids follow the time",
            "--ties shuffle" if timed else "state it with results, or get the timestamps",
        )
    else:
        yield Finding("order", "good", "the order of items has nothing to do with their ids")
    if timed:
        tied = log.timestamps[log.offsets[1:] - 1] == log.timestamps[log.offsets[1:] - 2]
        share = float(tied.mean())
        yield Finding(
            "order",
            "warning" if share > 0.1 else "good",
            f"{share:.1%} of users have their valid and test item at the same time; "
            f"{facts['tied_neighbours']:.1%} of all neighbours are at the same time",
            "which of them is the test item is chance: --ties shuffle, and state it"
            if share > 0.1
            else "",
        )


def leakage(catalog: Catalog, log: InteractionLog) -> Iterator[Finding]:
    """Test items that no model can know, and those that every model can copy or guess."""
    popularity, own, first = _count_items(log, len(catalog))
    targets = log.items[log.offsets[1:] - 1]
    cold = int((popularity[targets] == 0).sum())
    if cold:
        yield Finding(
            "cold items",
            "warning" if cold > 0.05 * log.n_users else "note",
            f"{count_of(cold, 'test item')} ({cold / log.n_users:.1%}) never occur in training",
            "only a model that reads text can find them; a higher --min-item leaves fewer",
        )
    else:
        yield Finding("cold items", "good", "every test item occurs in training")
    if own:
        yield Finding(
            "leakage",
            "warning" if own > 0.05 * log.n_users else "note",
            f"{count_of(own, 'test item')} ({own / log.n_users:.1%}) are in the user's own history",
            "repeat purchases: a model scores by copying. Report results with seen items masked",
        )
    else:
        yield Finding("leakage", "good", "no test item is in its user's own history")
    taken = np.flatnonzero(first < _NEVER)
    if len(taken) > 2:
        ranks = [np.argsort(np.argsort(v[taken])) for v in (id_rank(catalog.ids), first)]
        tie = float(np.corrcoef(*ranks)[0, 1])
        if abs(tie) > _ID_TIME:
            yield Finding(
                "leakage",
                "note",
                f"item ids follow the time of first appearance (rank correlation {tie:.2f})",
                "nothing here: `data prepare` numbers items at random; other tools may not",
            )


def _count_items(log: InteractionLog, n_items: int) -> tuple[np.ndarray, int, np.ndarray]:
    """(int64 (N,) training interactions, users whose test item they took before, first times).

    A range of users at a time. The first time of an item is _NEVER where there are no times.
    """
    popularity = np.zeros(n_items, np.int64)
    first = np.full(n_items, _NEVER)
    own = 0
    for start, last in ranges(log.offsets):
        bounds = log.offsets[start : last + 1]
        items, lengths = log.items[bounds[0] : bounds[-1]], np.diff(bounds)
        from_end = np.repeat(bounds[1:], lengths) - np.arange(bounds[0], bounds[-1])
        popularity += np.bincount(items[from_end > HELD_OUT], minlength=n_items)
        again = (items == np.repeat(items[bounds[1:] - bounds[0] - 1], lengths)) & (from_end > 1)
        own += int(np.logical_or.reduceat(again, bounds[:-1] - bounds[0]).sum())
        if log.timestamps is not None:
            np.minimum.at(first, items, log.timestamps[bounds[0] : bounds[-1]])
            forget(log.timestamps)
        forget(log.items)
    return popularity, own, first


def as_published(facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether a known public set has the sizes that were published of it."""
    known = facts["published"]
    if known is None:
        return
    names = [n for n in ("users", "items", "interactions") if known[n] != facts[n]]
    if names:
        found = ", ".join(f"{n} {facts[n]:,} (published {known[n]:,})" for n in names)
        yield Finding(
            "published",
            "warning",
            f"not {known['name']} as in {known['source']}: {found}",
            "check the copy and the filters before comparing with published results",
        )
    else:
        yield Finding("published", "good", f"as {known['name']} in {known['source']}")
