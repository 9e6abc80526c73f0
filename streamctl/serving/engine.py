"""The engine: a run's thinkers, live items and live users. It answers queries and knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.progress import warn
from streamctl.runs import RunDir
from streamctl.serving.catalogue import LiveCatalogue, Refused
from streamctl.serving.explain import Explained, Meanings, Reason
from streamctl.serving.job import STRANGER, Job, Reply
from streamctl.serving.model import servable
from streamctl.serving.report import run_report
from streamctl.serving.schemas import Query
from streamctl.serving.stream import Stream
from streamctl.serving.users import LiveUsers
from streamctl.tokenizer import SemanticIds

STREAM, EVIDENCE = "stream", "evidence"


class Engine:
    """One run in service.

    Questions may be asked from any thread; `recommend` and the catalogue's changes belong to one.

    Attributes:
        thinkers: by name; the first is the one that answers where a query names none.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        journal: Path,
        device: str = "auto",
        beam: int = 20,
        only_evidence: bool = False,
    ):
        """Load the best finished stage of a run, its evidence, and what came since.

        Args:
            only_evidence: leave out, and do not check, what does not think by evidence.

        Raises:
            StreamctlError: the run cannot be served, or the journal is damaged.
        """
        self.run, self.name, self.beam = run, run.path.resolve().name, beam
        self.stage = run.require(EVIDENCE) if only_evidence else servable(run)
        catalog, self.split = load_data(run)
        ids = SemanticIds.load(run.stage("tokenizer"))
        meanings = Meanings(catalog.titles, ids.codes)
        self.thinkers: dict[str, Any] = {}
        if self.stage.name != EVIDENCE:
            self.thinkers[STREAM] = Stream(run, self.stage, ids, meanings, device)
        if run.stage(EVIDENCE).complete:
            self._load_evidence(meanings, device)
        # Nothing below may refer to the engine: after a reload its memory must be free at once.
        joined = self.thinkers[STREAM].join if STREAM in self.thinkers else _not_read
        learn = self.thinkers[EVIDENCE].learn if EVIDENCE in self.thinkers else _not_learned
        self.users = LiveUsers(self.split.log, learn)
        self.catalogue = LiveCatalogue(
            catalog, ids, ids.tokens(), run.stage("tokenizer"), journal, joined, self.users
        )
        self._report: dict[str, Any] | None = None

    @property
    def model(self) -> dict[str, Any]:
        """The stage that answers where a query names no thinker."""
        return next(iter(self.thinkers.values())).model

    def _load_evidence(self, meanings: Meanings, device: str) -> None:
        from streamctl.serving.evidence import Evidence

        try:
            self.thinkers[EVIDENCE] = Evidence(self.run, meanings, device, self.split.history)
        except StreamctlError as error:
            if not self.thinkers:
                raise
            warn(f"served without its evidence: {error}")

    def warm_up(self, batch: int) -> dict[Hashable, float]:
        """Run the paths that queries take, so that the first ones find everything compiled.

        Returns:
            seconds that a job of a full batch takes, by the job's kind.
        """
        longest, base = self.split.history, self.catalogue.items.base
        costs = {}
        for name, thinker in self.thinkers.items():
            for think in sorted({0, thinker.think}):
                rows = np.arange(batch * longest).reshape(batch, longest) % base
                self.recommend([self._trial(rows[0], name, think, explain=True)])
                jobs = [self._trial(row, name, think, explain=False) for row in rows]
                began = time.perf_counter()
                self.recommend(jobs)
                costs[jobs[0].kind] = (time.perf_counter() - began) / batch
        return costs

    def _trial(self, history: np.ndarray, thinker: str, think: int, explain: bool) -> Job:
        none = np.empty(0, np.int64)
        return Job(
            self, history, none, None, 10, think, "greedy", explain, thinker, self._width(10)
        )

    def prepare(self, query: Query, prefix: str = "") -> Job:
        """A query as a job.

        Args:
            prefix: where the query stands in the request, for error messages.

        Raises:
            Refused: an unknown item, user or field; an empty history; a thinker that the run
                does not have.
        """
        catalogue, user = self.catalogue, STRANGER
        if query.user_id is not None:
            user = self._user(query.user_id, f"{prefix}/user_id", "invalid")
            seen = self.users.taken(user)
        else:
            seen = catalogue.known(query.history, f"{prefix}/history")
        if not len(seen):
            raise Refused("invalid", f"{prefix}/history", "a history needs an item or more")
        name, thinker = self._thinker(query, prefix)
        history = thinker.readable(seen)[-self.split.history :]
        if not len(history):
            raise Refused(
                "invalid",
                f"{prefix}/history",
                "the evidence knows none of these items: they were added after it was gathered",
            )
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
            thinker=name,
            beam=self._width(query.k),
            user=user,
        )

    def _thinker(self, query: Query, prefix: str) -> tuple[str, Any]:
        name = next(iter(self.thinkers)) if query.thinker == "auto" else query.thinker
        if name not in self.thinkers:
            hint = f"this run has no such thinker in service; it has {', '.join(self.thinkers)}"
            raise Refused("invalid", f"{prefix}/thinker", hint)
        return name, self.thinkers[name]

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
        thinker = self.thinkers[jobs[0].thinker]
        with torch.inference_mode():
            replies: list[Reply] = thinker.answer(wanted, self.catalogue.trie, removed)
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
                "reasons": [self._reason(reason) for reason in step.reasons],
                "ranking": self._ranked(step.items, step.scores),
            }
            for step in explained.steps
        ]
        return {"before": self._ranked(explained.items, explained.scores), "steps": steps}

    def _reason(self, reason: Reason) -> dict[str, Any]:
        had, took = [self._named(item) for item in reason.had], self._named(reason.took)
        *first, last = [item["title"] for item in had]
        what = f"{', '.join(first)} and {last}" if first else last
        text = f"A user who had {what} took {took['title']}."
        return {"text": text, "had": had, "took": took}

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


def _not_read(item: int, tokens: np.ndarray) -> None:
    """What an added item means to thinkers that do not read it."""


def _not_learned(user: int, before: np.ndarray, items: np.ndarray) -> None:
    """What a user has taken, to thinkers that remember nobody."""
