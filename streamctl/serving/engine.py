"""The engine: a run's methods plus what arrived while serving; item indexes in and out, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from streamctl.data import load_data
from streamctl.decode.explain import explained, pairs_of
from streamctl.evaluation.methods import answering, known_rows, load_best, load_method, method_names
from streamctl.kernels import compiled
from streamctl.ranking import Recommender
from streamctl.ranking.mmr import Diverse
from streamctl.runs import RunDir
from streamctl.serving.live import LiveCatalog
from streamctl.serving.question import BEAM, POPULAR
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
        self.method, recommender = load_best(run, device, method=method, beam=BEAM)
        self._split = load_data(run)[1]
        self.live = LiveCatalog(run, store, self._split)
        self._loaded: dict[str, Recommender] = {}
        self._models = {POPULAR: self._model(POPULAR, run)}
        self._join(self.method, recommender, answering(run, self.method)[0])

    def _join(self, name: str, recommender: Recommender, source: RunDir) -> None:
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
        if method not in (*self._loaded, POPULAR):
            source = answering(self.run, method)[0]
            self._join(method, load_method(source, method, self.device, beam=BEAM), source)
            self.warm_up(method)

    def about(self) -> dict[str, Any]:
        """What the server has to know; `compiled` is False where it computes in plain PyTorch."""
        return {
            "model": self._models[self.method],
            "method": self.method,
            "methods": self.methods,
            "loaded": [*self._loaded, POPULAR],
            "history": self._split.history,
            "compiled": compiled.ready(),
        }

    def warm_up(self, method: str | None = None) -> None:
        """Run the paths that queries take, so that the first ones find everything compiled, and
        measured where there are two ways (`model.frozen`), by batches of three sizes."""
        method = method or self.method
        size, length = self.store.base, self._split.history
        rows = (np.arange(self.batch * length) % size).reshape(self.batch, length).tolist()
        jobs = [
            {"history": row, "user_id": None, "exclude": [], "allow": None, "k": 10, "note": None}
            for row in rows
        ]
        for think in (0, None):
            for count in (1, 4, self.batch):
                self.answer(jobs[:count], method, think, False)
        self.answer(jobs[:1], method, None, True)

    def answer(
        self,
        jobs: Sequence[dict[str, Any]],
        method: str,
        think: int | None,
        explain: bool,
        diversity: float = 0.0,
        width: int = BEAM,
    ) -> list[dict[str, Any]]:
        """Answers to jobs in one batch.

        Args:
            jobs: each with `history` and `exclude`, lists of items; `allow`, one or None;
                `user_id` and `note`, or None; `k`.
            think: pieces of evidence; None: as many as the method is best with.
            explain: add the thought.
            diversity: of `Diverse`; 0 leaves the method's ranking as it is.
            width: items that are searched for, as many as the largest `k` or more.

        Returns:
            for each job `items`, (item, score) pairs, best first; `method`, and which `model` it
            is of; `think`; `note`, why the popular items stand for an answer, or None; `explain`,
            `before` and `steps`.
        """
        self.live.follow()
        self.load(method)
        answers: list[dict[str, Any] | None] = []
        asked = []
        for job in jobs:
            history = self._readable(job["history"], method)
            if history and job["allow"] != []:
                asked.append((job, history))
                answers.append(None)
            else:
                answers.append(self._popular(job, history, method))
        options = method, think, explain, diversity, width
        found = iter(self._recommend(asked, *options) if asked else ())
        return [next(found) if answer is None else answer for answer in answers]

    def _readable(self, history: list[int], method: str) -> list[int]:
        """What a method can read of a history, latest last."""
        if method == POPULAR:
            return []
        known = self.live.known(self._loaded[method])
        return [item for item in history if item < known][-self._split.history :]

    def _popular(self, job: dict[str, Any], history: list[int], method: str) -> dict[str, Any]:
        note = job["note"]
        if note is None and not history and method != POPULAR:
            note = f"popular items: {method} knows none of the history's"
        items = self.live.popular(job["k"], job["exclude"], job["allow"])
        return self._answer(items, method if history else POPULAR, 0, note)

    @torch.inference_mode()
    def _recommend(
        self, asked: list[tuple[dict[str, Any], list[int]]], method: str, think: int | None,
        explain: bool, diversity: float, width: int,
    ) -> list[dict[str, Any]]:  # fmt: skip
        recommender, jobs = self._loaded[method], [job for job, _ in asked]
        rows = [torch.tensor(history) for _, history in asked]
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
        ranking = asking.recommend(histories, width, think=think, **options)
        if think is None:
            think = int(getattr(recommender, "think", 0) or 0)
        answers = []
        for row, job in enumerate(jobs):
            answer = self._answer(pairs_of(ranking, row, job["k"]), method, think, None)
            if explain and ranking.thought is not None:
                own = {name: options[name][row] for name in options}
                answer["explain"] = explained(recommender, histories[row], ranking, row, **own)
            answers.append(answer)
        return answers

    def _answer(self, items: list, method: str, think: int, note: str | None) -> dict[str, Any]:
        model = self._models[method]
        told = {"method": method, "model": model, "think": think, "note": note}
        return {"items": items, **told, "explain": None}

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
