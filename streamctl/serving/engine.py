"""The engine: a run's model, live items and live users. It answers queries and knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamctl.data import load_data
from streamctl.runs import RunDir
from streamctl.serving.catalogue import LiveCatalogue, Refused
from streamctl.serving.explain import Explained, Meanings
from streamctl.serving.job import STRANGER, Job, Reply
from streamctl.serving.model import servable
from streamctl.serving.report import run_report
from streamctl.serving.schemas import Query
from streamctl.serving.stream import Stream
from streamctl.serving.users import LiveUsers
from streamctl.tokenizer import SemanticIds


class Engine:
    """One run in service.

    Questions may be asked from any thread; `recommend` and the catalogue's changes belong to one.

    Attributes:
        stream: the policy that answers.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        journal: Path,
        device: str = "auto",
        beam: int = 20,
    ):
        """Load the best finished stage of a run, and what came since.

        Raises:
            StreamctlError: the run cannot be served, or the journal is damaged.
        """
        self.run, self.name, self.beam = run, run.path.resolve().name, beam
        self.stage = servable(run)
        catalog, self.split = load_data(run)
        ids = SemanticIds.load(run.stage("tokenizer"))
        meanings = Meanings(catalog.titles, ids.codes)
        self.stream = Stream(run, self.stage, ids, meanings, device)
        # Nothing below may refer to the engine: after a reload its memory must be free at once.
        joined = self.stream.join
        self.users = LiveUsers(self.split.log)
        self.catalogue = LiveCatalogue(
            catalog, ids, ids.tokens(), run.stage("tokenizer"), journal, joined, self.users
        )
        self._report: dict[str, Any] | None = None

    @property
    def model(self) -> dict[str, Any]:
        """Which run and stage answers."""
        return self.stream.model

    def warm_up(self, batch: int) -> dict[Hashable, float]:
        """Run the paths that queries take, so that the first ones find everything compiled.

        Returns:
            seconds that a job of a full batch takes, by the job's kind.
        """
        longest, base = self.split.history, self.catalogue.items.base
        costs = {}
        for think in sorted({0, self.stream.think}):
            rows = np.arange(batch * longest).reshape(batch, longest) % base
            self.recommend([self._trial(rows[0], think, explain=True)])
            jobs = [self._trial(row, think, explain=False) for row in rows]
            began = time.perf_counter()
            self.recommend(jobs)
            costs[jobs[0].kind] = (time.perf_counter() - began) / batch
        return costs

    def _trial(self, history: np.ndarray, think: int, explain: bool) -> Job:
        none = np.empty(0, np.int64)
        return Job(self, history, none, None, 10, think, "greedy", explain, self._width(10))

    def prepare(self, query: Query, prefix: str = "") -> Job:
        """A query as a job.

        Args:
            prefix: where the query stands in the request, for error messages.

        Raises:
            Refused: an unknown item, user or field; an empty history.
        """
        catalogue, user = self.catalogue, STRANGER
        if query.user_id is not None:
            user = self._user(query.user_id, f"{prefix}/user_id", "invalid")
            seen = self.users.taken(user)
        else:
            seen = catalogue.known(query.history, f"{prefix}/history")
        if not len(seen):
            raise Refused("invalid", f"{prefix}/history", "a history needs an item or more")
        thinker = self.stream
        history = seen[-self.split.history :]
        denied = [catalogue.items.index_ever(item) for item in query.deny]
        exclude = [np.array([item for item in denied if item is not None], np.int64)]
        if query.exclude_seen:
            exclude.append(seen)
        return Job(
            engine=self,
            history=history,
            exclude=np.unique(np.concatenate(exclude)),
            allow=self._allowed(query, prefix),
            k=query.k,
            think=thinker.think if query.think == "auto" else min(query.think, thinker.most),
            mode=query.mode,
            explain=query.explain,
            beam=self._width(query.k),
            user=user,
        )

    def _width(self, k: int) -> int:
        """The engine's beam, doubled until it holds k items."""
        width = self.beam
        while width < k:
            width *= 2
        return width

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
        user = self.users.index(user_id)
        if user is None:
            raise Refused(kind, field, f"no such user: {user_id}")
        return user

    def recommend(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Answers to jobs of one group: {"items": [...]} and, where wanted, "explain"."""
        self.catalogue.follow()
        removed = np.array(sorted(self.catalogue.items.removed), np.int64)
        answers: list[dict[str, Any]] = [{"items": []} for _ in jobs]
        # A job that allows nothing has an empty answer; the trie would have no legal path.
        live = [place for place, job in enumerate(jobs) if job.allow is None or len(job.allow)]
        if not live:
            return answers
        wanted = [jobs[place] for place in live]
        with torch.inference_mode():
            replies: list[Reply] = self.stream.answer(wanted, self.catalogue.trie, removed)
        for place, reply in zip(live, replies, strict=True):
            answers[place]["items"] = self._ranked(reply.items, reply.scores)
            if reply.explained is not None:
                answers[place]["explain"] = self._described(reply.explained)
        return answers

    def _ranked(self, items: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        return [
            {**self._named(item), "score": score}
            for item, score in zip(items.tolist(), scores.tolist(), strict=True)
            if item >= 0
        ]

    def _named(self, item: int) -> dict[str, str]:
        known = self.catalogue.items
        return {"id": known.ids[item], "title": known.titles[item]}

    def _described(self, explained: Explained) -> dict[str, Any]:
        steps = [
            {
                "title": step.title,
                "token": step.token,
                "level": step.level,
                "code": step.code,
                "words": step.meaning.words,
                "items": [self._named(item) for item in step.meaning.items],
                "moved": step.moved,
                "ranking": self._ranked(step.items, step.scores),
            }
            for step in explained.steps
        ]
        return {"before": self._ranked(explained.items, explained.scores), "steps": steps}

    def user(self, user_id: str) -> dict[str, Any]:
        """What the model reads of a user.

        Raises:
            Refused: there is no such user.
        """
        seen = self.users.taken(self._user(user_id, "id", "unknown"))
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
