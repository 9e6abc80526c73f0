"""A request as a job for the model: ids become indexes, and what may share a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamctl.data import stranger_note
from streamctl.errors import close_matches
from streamctl.serving.schemas import Query
from streamctl.serving.store import Refused, Store


@dataclass(frozen=True, eq=False)
class Job:
    """What a model is asked about one user.

    Attributes:
        details: of `Engine.answer`'s jobs.
        group: method, k, think, explain and diversity, which all of a batch have in common:
            nothing in a batch may change another's answer.
    """

    details: dict[str, Any]
    group: dict[str, Any]


def as_job(query: Query, store: Store, about: dict[str, Any], prefix: str = "") -> Job:
    """A query in the model's terms.

    Args:
        about: what the model says of itself.
        prefix: where the query stands in the request, for error messages.

    Raises:
        Refused: an unknown item, field or method.
    """
    note = None
    if query.user_id is None:
        seen = store.known(query.history, f"{prefix}/history")
        note = None if seen else stranger_note()
    elif (known := store.user(query.user_id)) is None:
        seen, note = [], stranger_note(query.user_id)
    else:
        seen = known
    method = about["method"] if query.method == "auto" else query.method
    if method not in about["methods"]:
        hint = close_matches(method, about["methods"])
        raise Refused("invalid", f"{prefix}/method", f"the run has no such method; {hint}")
    allow = None if query.allow is None else set(store.known(query.allow, f"{prefix}/allow"))
    for name, values in query.filter.items():
        having = set(store.with_values(name, values, f"{prefix}/filter"))
        allow = having if allow is None else allow & having
    denied = [item for item in store.indexes(query.deny) if item is not None]
    details = {
        "history": seen,
        "user_id": None if query.user_id is None else store.read_id(query.user_id),
        "exclude": sorted({*denied, *(seen if query.exclude_seen else ())}),
        "allow": None if allow is None else sorted(allow),
        "note": note,
    }
    group = {
        "method": method,
        "k": query.k,
        "think": None if query.think == "auto" else query.think,
        "explain": query.explain,
        "diversity": query.diversity,
    }
    return Job(details, group)


def in_words(answer: dict[str, Any], store: Store) -> dict[str, Any]:
    """An answer of `Engine.answer` with ids and titles in the place of indexes."""
    told = answer["explain"] or {"before": [], "steps": []}
    rankings = [answer["items"], told["before"], *(step["ranking"] for step in told["steps"])]
    mentioned = {item for ranking in rankings for item, _ in ranking}
    mentioned |= {step[which] for step in told["steps"] for which in ("item", "via")} - {None}
    names = store.names(list(mentioned))

    def listed(ranking: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{**names[item], "score": score} for item, score in ranking]

    steps = []
    for step in told["steps"]:
        items = {which: names.get(step[which]) for which in ("item", "via")}
        titles = {which: one["title"] if one else "" for which, one in items.items()}
        text = step["text"].format(**titles)
        steps.append({**step, **items, "text": text, "ranking": listed(step["ranking"])})
    explain = {"before": listed(told["before"]), "steps": steps} if answer["explain"] else None
    return {**answer, "items": listed(answer["items"]), "explain": explain}
