"""The engine: a run's methods plus what arrived while serving; item indexes in and out, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from streamctl.data import POPULAR
from streamctl.decode.explain import explained, pairs_of, unthinking
from streamctl.evaluation.methods import answering, known_rows, load_method, method_names
from streamctl.kernels import compiled
from streamctl.ranking import Recommender
from streamctl.ranking.mmr import Diverse
from streamctl.runs import RunDir
from streamctl.serving.live import LiveCatalog
from streamctl.serving.report import run_report
from streamctl.serving.store import Store


class Engine:
    """One run in service.

    Attributes:
        store: what it reads of items and users; what others write there it follows.
        method: that answers where nobody asks for another.
    """

    def __init__(
        self, run: RunDir, store: Store, *, method: str | None = None, device: str = "auto",
        batch: int = 1,
    ):  # fmt: skip
        """Load a method.

        Args:
            method: its name; None for the run's best.
            batch: most jobs answered together.

        Raises:
            StreamctlError: the run has no such method, or cannot be served.
        """
        self.run, self.store, self.device, self.batch = run, store, device, batch
        self.methods = method_names(run)
        _, self.method, self._why = answering(run, method)
        self._history = run.require("data").manifest["config"]["history"]
        self.live = LiveCatalog(run, store)
        self._loaded: dict[str, Recommender] = {}
        self._models: dict[str, dict[str, str]] = {}
        self._join(self.method)
        self._join(POPULAR)

    def _join(self, name: str) -> None:
        if name not in self._loaded:
            source = answering(self.run, name)[0]
            recommender = load_method(source, name, self.device)
            self.live.serve(recommender)
            self._loaded[name], self._models[name] = recommender, self._model(name, source)

    def _model(self, name: str, source: RunDir) -> dict[str, str]:
        """Which run and stage a method is read from, as they are now."""
        stage = source.stage(known_rows(source)[name].stages[-1])
        place = stage.path.relative_to(self.run.path).as_posix()  # may be in final/
        return {"run": self.run.path.resolve().name, "stage": place, "hash": stage.hash}

    def load(self, method: str) -> None:
        """Have a method loaded and warm; those that were asked for once stay.

        Raises:
            StreamctlError: it cannot be loaded.
        """
        if method not in self._loaded:
            self._join(method)
            self.warm_up(method)

    def about(self) -> dict[str, Any]:
        """What the server has to know; `compiled` is False where it computes in plain PyTorch."""
        return {
            "model": self._models[self.method],
            "method": self.method,
            "why": self._why,
            "methods": self.methods,
            "loaded": [*self._loaded],
            "history": self._history,
            "compiled": compiled.ready(),
        }

    def warm_up(self, method: str | None = None) -> None:
        """Run the paths that queries take, so that the first ones find everything compiled, and
        measured where there are two ways (`model.frozen`), by batches of three sizes."""
        method = method or self.method
        size, length = self.store.base, self._history
        rows = (np.arange(self.batch * length) % size).reshape(self.batch, length).tolist()
        jobs = [
            {"history": row, "user_id": None, "exclude": [], "allow": None, "note": None}
            for row in rows
        ]
        for think in (0, None):
            for count in (1, 4, self.batch):
                self.answer(jobs[:count], method, 10, think)
        self.answer(jobs[:1], method, 10, None, explain=True)

    def answer(
        self,
        jobs: Sequence[dict[str, Any]],
        method: str,
        k: int,
        think: int | None,
        explain: bool = False,
        diversity: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Answers to jobs in one batch.

        Args:
            jobs: each with `history` and `exclude`, lists of items; `allow`, one or None;
                `user_id` and `note`, or None.
            k: items wanted.
            think: pieces of evidence; None: as many as the method is best with.
            explain: add the thought.
            diversity: of `Diverse`; 0 leaves the method's ranking as it is.

        Returns:
            for each job `items`, (item, score) pairs, best first; `method`, and which `model` it
            is of; `think`; `note`, why the popular items stand for an answer, or None; `explain`,
            `before` and `steps`.
        """
        self.live.follow()
        self.load(method)
        known = self.live.known(self._loaded[method])
        histories, places = [], {method: [], POPULAR: []}
        for place, job in enumerate(jobs):
            history = [item for item in job["history"] if item < known][-self._history :]
            histories.append(history)
            places[method if history else POPULAR].append(place)
        answers: dict[int, dict[str, Any]] = {}
        for name, some in places.items():
            if some:
                asked = [(jobs[place], histories[place]) for place in some]
                found = self._recommend(asked, name, k, think, explain, diversity)
                answers.update(zip(some, found, strict=True))
        for place, job in enumerate(jobs):
            unread = job["history"] and answers[place]["method"] != method
            note = f"popular items: {method} knows none of the history's" if unread else None
            answers[place]["note"] = job["note"] or note
        return [answers[place] for place in range(len(jobs))]

    @torch.inference_mode()
    def _recommend(
        self, asked: list[tuple[dict[str, Any], list[int]]], method: str, k: int,
        think: int | None, explain: bool, diversity: float,
    ) -> list[dict[str, Any]]:  # fmt: skip
        recommender, jobs = self._loaded[method], [job for job, _ in asked]
        rows = [torch.tensor(history, dtype=torch.int64) for _, history in asked]
        histories = pad_sequence(rows, batch_first=True, padding_value=-1)
        known, removed = self.live.known(recommender), self.live.removed

        def within(items: Sequence[int]) -> np.ndarray:
            found = np.array(items, np.int64)
            return found[found < known]

        options = {
            "users": np.array([self.live.owner(job["user_id"]) for job in jobs]),
            "exclude": [within(np.union1d(job["exclude"], removed)) for job in jobs],
            "allow": [None if job["allow"] is None else within(job["allow"]) for job in jobs],
        }
        asking = Diverse(recommender, self.live.vectors, diversity) if diversity else recommender
        ranking = asking.recommend(histories, k, think=think, **options)
        if think is None or not hasattr(recommender, "think"):
            think = int(getattr(recommender, "think", 0) or 0)
        answers = []
        for row in range(len(jobs)):
            answer = {"items": pairs_of(ranking, row, k), "method": method, "think": think,
                      "model": self._models[method], "explain": None}  # fmt: skip
            if explain and ranking.thought is not None:
                own = {name: options[name][row] for name in options}
                answer["explain"] = {
                    "before": unthinking(recommender, histories[row], **own),
                    "steps": explained(recommender, histories[row], ranking, row, **own),
                }
            answers.append(answer)
        return answers

    def similar(self, item: int, k: int) -> list[tuple[int, float]]:
        """(item, cosine of their texts) of the k items most alike to one, best first."""
        self.live.follow()
        return self.live.similar(item, k)

    def add(self, id_: str, title: str, text: str, fields: dict[str, str]) -> int:
        """A new item: its codes and its vector by its text; the index it has from now on.

        Raises:
            Refused: the id is taken, or an unknown field.
            StreamctlError: the run has no tokenizer, or it cannot be loaded.
        """
        codes, vectors = self.live.tokenize([text])
        with self.store.writing():
            self.live.follow()
            self.store.check_new(id_, fields)
            item = self.store.add(id_, title, text, fields)
            self.store.set_codes(item, self.live.free(codes[0]), vectors[0])
        self.live.follow()
        return item

    def report(self) -> dict[str, Any]:
        """The run's report for the page."""
        return run_report(self.run, self.method)
