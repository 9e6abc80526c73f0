"""The engine: a trained model and a live catalogue that answer queries. It knows no HTTP."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamctl.data import load_data
from streamctl.decode import recommend
from streamctl.runs import RunDir
from streamctl.serving.catalogue import LiveCatalogue, Refused
from streamctl.serving.explain import Explained, Meanings, decoder_for, explain_thought
from streamctl.serving.model import load_policy, servable, thought_length
from streamctl.serving.report import run_report
from streamctl.serving.schemas import Query
from streamctl.tokenizer import SemanticIds


@dataclass(frozen=True, eq=False)
class Job:
    """A query in the engine's terms.

    Attributes:
        history: int64 (H,) what the model reads, oldest first.
        exclude: int64, items that must not be recommended.
        allow: int64, the only items wanted; None for all.
    """

    engine: Engine
    history: np.ndarray
    exclude: np.ndarray
    allow: np.ndarray | None
    k: int
    think: int
    mode: str
    explain: bool

    @property
    def group(self) -> Hashable:
        """Jobs that can share a batch."""
        return id(self.engine), self.think, self.mode


class Engine:
    """One run in service.

    Questions may be asked from any thread; `recommend` and the catalogue's changes belong to one.
    """

    def __init__(self, run: RunDir, *, journal: Path, device: str = "auto", beam: int = 20):
        """Load the best finished stage of a run, and the items added since.

        Raises:
            StreamctlError: the run cannot be served, or the journal is damaged.
        """
        self.run, self.name, self.beam = run, run.path.resolve().name, beam
        self.stage = servable(run)
        self.model = {"run": self.name, "stage": self.stage.name, "hash": self.stage.hash}
        self.think = thought_length(run, self.stage)
        catalog, self.split = load_data(run)
        ids = SemanticIds.load(run.stage("tokenizer"))
        self.policy = load_policy(self.stage, ids, device)
        self.catalogue = LiveCatalogue(
            catalog, ids, self.policy.tokens, run.stage("tokenizer"), journal, self._joined
        )
        self._meanings = Meanings(catalog.titles, ids.codes)
        self._users = {user: index for index, user in enumerate(self.split.log.user_ids)}
        self._report: dict[str, Any] | None = None

    def _joined(self, item: int, tokens: np.ndarray) -> None:
        """Make an added item readable in histories: the model knows its codes and no more."""
        known = self.policy.item_tokens
        row = torch.from_numpy(tokens).to(known)[None]
        self.policy.item_tokens = torch.cat([known[:item], row])

    def warm_up(self, batch: int) -> None:
        """Run the paths that queries take, so that the first ones find everything compiled."""
        longest, none = self.split.history, np.empty(0, np.int64)
        for think in sorted({0, self.think}):
            for size in sorted({1, batch}):
                rows = np.arange(size * longest).reshape(size, longest) % self.catalogue.items.base
                explain = size == 1
                self.recommend(
                    [Job(self, row, none, None, 10, think, "greedy", explain) for row in rows]
                )

    def prepare(self, query: Query, prefix: str = "") -> Job:
        """A query as a job.

        Args:
            prefix: where the query stands in the request, for error messages.

        Raises:
            Refused: an unknown item, user or field; an empty history.
        """
        catalogue = self.catalogue
        if query.user_id is not None:
            user = self._user(query.user_id, f"{prefix}/user_id", "invalid")
            seen = self.split.log.of(user).astype(np.int64)
        else:
            seen = catalogue.known(query.history, f"{prefix}/history")
        if not len(seen):
            raise Refused("invalid", f"{prefix}/history", "a history needs an item or more")
        denied = [catalogue.items.index_ever(item) for item in query.deny]
        exclude = [np.array([item for item in denied if item is not None], np.int64)]
        if query.exclude_seen:
            exclude.append(seen)
        return Job(
            engine=self,
            history=seen[-self.split.history :],
            exclude=np.unique(np.concatenate(exclude)),
            allow=self._allowed(query, prefix),
            k=query.k,
            think=self.think if query.think == "auto" or not self.think else query.think,
            mode=query.mode,
            explain=query.explain,
        )

    def _allowed(self, query: Query, prefix: str) -> np.ndarray | None:
        catalogue = self.catalogue
        allowed = None
        if query.allow is not None:
            allowed = np.unique(catalogue.known(query.allow, f"{prefix}/allow"))
        for name, values in query.filter.items():
            if name not in catalogue.items.field_names:
                raise Refused("invalid", f"{prefix}/filter/{name}", catalogue.no_field(name))
            having = catalogue.items.with_values(name, values)
            allowed = having if allowed is None else np.intersect1d(allowed, having)
        return allowed

    def _user(self, user_id: str, field: str, kind: str) -> int:
        if user_id not in self._users:
            raise Refused(kind, field, f"no such user: {user_id}")
        return self._users[user_id]

    def recommend(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Answers to jobs of one group: {"items": [...]} and, where wanted, "explain"."""
        self.catalogue.refresh()
        answers: list[dict[str, Any]] = [{"items": []} for _ in jobs]
        # A job that allows nothing has an empty answer; the trie would have no legal path.
        live = [place for place, job in enumerate(jobs) if job.allow is None or len(job.allow)]
        if not live:
            return answers
        wanted = [jobs[place] for place in live]
        with torch.inference_mode():
            ranking, trace = recommend(
                self.policy,
                self.catalogue.trie,
                self._histories(wanted),
                max(job.k for job in wanted),
                think=jobs[0].think,
                decoder=decoder_for(jobs[0].think),
                **self._options(wanted),
            )
            for row, job in enumerate(wanted):
                answer = answers[live[row]]
                answer["items"] = self._ranked(ranking.items[row], ranking.scores[row], job.k)
                if job.explain:
                    answer["explain"] = self._explain(job, trace.row(row))
        return answers

    def _options(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What `recommend` is told beside histories and lengths."""
        removed = np.array(sorted(self.catalogue.items.removed), np.int64)
        return {
            "mode": jobs[0].mode,
            "beam": max(self.beam, *(job.k for job in jobs)),
            "exclude": [np.union1d(job.exclude, removed) for job in jobs],
            "allow": [job.allow for job in jobs],
        }

    def _histories(self, jobs: Sequence[Job]) -> torch.Tensor:
        width = max(len(job.history) for job in jobs)
        history = torch.full((len(jobs), width), -1, dtype=torch.int64)
        for row, job in enumerate(jobs):
            history[row, : len(job.history)] = torch.from_numpy(job.history)
        return history

    def _ranked(self, items: Any, scores: Any, k: int) -> list[dict[str, Any]]:
        known = self.catalogue.items
        return [
            {"id": known.ids[item], "title": known.titles[item], "score": score}
            for item, score in zip(items[:k].tolist(), scores[:k].tolist(), strict=True)
            if item >= 0
        ]

    def _explain(self, job: Job, trace: Any) -> dict[str, Any]:
        [explained] = explain_thought(
            self.policy,
            self.catalogue.trie,
            self._meanings,
            self._histories([job]),
            trace,
            job.k,
            **self._options([job]),
        )
        return self._described(explained, job.k)

    def _described(self, explained: Explained, k: int) -> dict[str, Any]:
        known = self.catalogue.items
        steps = [
            {
                "title": step.title,
                "token": step.token,
                "level": step.level,
                "code": step.code,
                "words": step.meaning.words,
                "items": [
                    {"id": known.ids[item], "title": known.titles[item]}
                    for item in step.meaning.items
                ],
                "moved": step.moved,
                "ranking": self._ranked(step.items, step.scores, k),
            }
            for step in explained.steps
        ]
        return {"before": self._ranked(explained.items, explained.scores, k), "steps": steps}

    def users(self, beginning: str, limit: int) -> dict[str, Any]:
        """Users of the log, evenly over it, whose ids begin so."""
        ids = self.split.log.user_ids
        found = [user for user in ids if user.startswith(beginning)] if beginning else ids
        step = max(1, len(found) // limit)
        return {"users": found[::step][:limit], "total": len(found)}

    def user(self, user_id: str) -> dict[str, Any]:
        """What the model reads of a user.

        Raises:
            Refused: there is no such user.
        """
        seen = self.split.log.of(self._user(user_id, "id", "unknown"))
        read = seen[-self.split.history :].tolist()
        return {
            "id": user_id,
            "history": [self.catalogue.describe(item) for item in read],
            "interactions": len(seen),
        }

    def report(self) -> dict[str, Any]:
        """The run's report for the page; read once."""
        if self._report is None:
            self._report = run_report(self.run, self.name, self.stage.name)
        return self._report
