"""The rows of the evaluation: which methods and controls a run has, and how each recommends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property, partial
from operator import methodcaller as call
from typing import Any

import numpy as np
import torch

from streamctl.baselines.hops import run_evidence
from streamctl.baselines.registry import BASELINES, baseline_class
from streamctl.config import BEAM, BaselineConfig, EvalConfig
from streamctl.data import POPULAR, Examples, Split, load_data
from streamctl.decode.evidence import EvidenceRecommender
from streamctl.decode.recommender import PolicyRecommender, random_thoughts
from streamctl.decode.retrieved import retrieved_codes
from streamctl.device import resolve_device
from streamctl.errors import StreamctlError, UsageError, did_you_mean
from streamctl.model.policy import Policy
from streamctl.progress import say
from streamctl.ranking import Recommender
from streamctl.rerank.lambdarank import LambdaRank
from streamctl.rerank.reranker import Reranker
from streamctl.retrieval.evidence import Evidence
from streamctl.runs import RunDir
from streamctl.training.letter.annotate import label
from streamctl.training.material import Material
from streamctl.training.sft import TWIN

EVAL = "eval"
RERANK = "rerank/"  # stages of rankers behind methods
RERANKED = "+rerank"  # the end of their rows' names
MIXED = ("weights", "codes")  # what an answer is made of, each alone a control
UNJUDGED = ("stream_rl", "stream_sft", "stream_pt", "tiger")  # before there is an evaluation


class Models:
    """The trained models of a run, each loaded when it is first asked for.

    Args:
        run: every stage that a row names is complete.
        config: beam and seed.
        examples: what is evaluated; oracle thoughts see the targets. None where nothing is.
        device: where the models go.
    """

    def __init__(self, run: RunDir, config: EvalConfig, examples: Examples | None, device: str):
        self.run, self.config, self.examples = run, config, examples
        self.device = resolve_device(device)
        self.policy = cache(self._policy)
        self.narrow = examples is not None  # a table judges beams of this width, and no wider ones

    @cached_property
    def split(self) -> Split:
        return load_data(self.run)[1]

    @cached_property
    def material(self) -> Material:
        return Material.load(self.run)

    @cached_property
    def evidence(self) -> Evidence:
        return run_evidence(self.run)

    @property
    def annotation(self) -> dict[str, Any]:
        """How the labels of SFT and RL were made: `length` is l, `mode` how residuals are taken."""
        return self.run.stage("annotate").manifest["config"]

    def _policy(self, stage: str) -> Policy:
        return self.material.policy(self.run.stage(stage), self.device)

    @property
    def _search(self) -> dict[str, int]:
        return {"beam": self.config.beam, "seed": self.config.seed}

    def generative(self, stage: str, **options: Any) -> PolicyRecommender:
        """A stage's policy with its beam search."""
        return self._searching(self.policy(stage), **options)

    def _searching(self, policy: Policy, **options: Any) -> PolicyRecommender:
        options = {**self._search, "narrow": self.narrow} | options
        return PolicyRecommender(policy, self.material.trie, **options)

    def reasoning(self, stage: str, **options: Any) -> EvidenceRecommender:
        """A stage's policy that thinks with evidence."""
        policy, material, options = self.policy(stage), self.material, self._search | options
        return EvidenceRecommender(policy, material.trie, material.evidence, **options)

    def _reasons(self, stage: str) -> bool:
        return self.policy(stage).config.thoughts == "evidence"

    def pretrained(self) -> PolicyRecommender | EvidenceRecommender:
        """The slow path of pretraining: it writes its retrieved neighbours' codes first (Eq. 9)."""
        count = self.run.stage("pretrain").manifest["config"]["neighbours"]
        if self._reasons("pretrain"):
            return self.reasoning("pretrain", think=count)
        policy, count = self.policy("pretrain"), min(count, self.material.neighbours.shape[1])
        return self.generative(
            "pretrain", thoughts=lambda history, users: retrieved_codes(policy, history, count)
        )

    def thinking(self, stage: str) -> PolicyRecommender | EvidenceRecommender:
        """A policy that thinks with the evidence it weighs, or greedily for l tokens of its own."""
        if self._reasons(stage):
            return self.reasoning(stage)
        return self.generative(stage, think=self.annotation["length"])

    def random(self, stage: str) -> PolicyRecommender | EvidenceRecommender:
        """A thinking policy given thoughts that mean nothing."""
        if self._reasons(stage):
            return self.reasoning(stage, random=self.config.seed)
        tokens, users = self.policy(stage).config.tokens, self.split.log.n_users
        length = self.annotation["length"]
        thoughts = random_thoughts(tokens, users, max(8, length), self.config.seed)
        return self.generative(stage, thoughts=thoughts, think=length)

    def oracle(self, stage: str) -> PolicyRecommender:
        """A thinking policy given the thoughts that annotation derives from the target itself."""
        policy, how = self.policy(stage), self.annotation
        examples = self.examples
        histories = examples.histories(np.arange(len(examples)))
        # A user may have several targets, each with a history of its own.
        target_of = {
            (user, *history[:length]): target
            for user, history, length, target in zip(
                examples.users.tolist(), histories.tolist(), examples.lengths.tolist(),
                examples.targets.tolist(), strict=True,
            )
        }  # fmt: skip

        def thoughts(history: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            asked = zip(users.tolist(), history.tolist(), strict=True)
            targets = [target_of[user, *(i for i in items if i >= 0)] for user, items in asked]
            target = torch.tensor(targets, device=history.device)
            return label(policy, history, target, how["length"], how["mode"])

        return self.generative(stage, thoughts=thoughts)

    def baseline(self, name: str) -> Recommender:
        return baseline_class(name).load(self.run.stage(f"baselines/{name}")).to(self.device)

    def tiger(self) -> PolicyRecommender:
        """The TIGER trained alone, searched like the other generative rows."""
        return self._searching(self.baseline("tiger").policy, decoder="direct")

    def reranked(self, names: tuple[str, ...]) -> Recommender:
        """Methods with the ranker behind them that was fitted on validation users."""
        stage = self.run.stage(RERANK + "+".join(names))
        rows = known_rows(self.run)
        return Reranker(
            tuple(rows[name].make(self._wide) for name in names),
            self.evidence,
            LambdaRank.load(stage.file("trees.txt")),
            stage.manifest["config"]["depth"],
        )

    @cached_property
    def _wide(self) -> Models:
        """The same models, that bring as many candidates as rankers were fitted with."""
        models = copy(self)
        models.narrow = False
        return models

    def popularity(self) -> Recommender:
        config = BaselineConfig(name="popularity")
        return baseline_class("popularity")(config, self.split).to(self.device)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: its key in the result.
        stages: what it is read from; all must be complete.
        make: `Models -> Recommender`.
        control: a yardstick for the claim that thinking helps, and no method of its own.
        eligible: may win and answer.
        note: what a reader has to know about it.
    """

    name: str
    stages: tuple[str, ...]
    make: Callable[[Models], Recommender]
    control: bool = False
    eligible: bool = True
    note: str = ""


def _thinking_controls(run: RunDir) -> tuple[Row, ...]:
    """What a claim about thinking is held against, by what thoughts are made of."""
    control, pretrain = partial(Row, control=True), run.stage("pretrain")
    bare, needs = ("tokenizer", "pretrain"), ("tokenizer", "annotate", "sft")
    if pretrain.complete and pretrain.manifest["config"]["thoughts"] == "evidence":
        direct = "no thought: the decoder as pretraining left it, which SFT does not train"
        random = "every piece of evidence is another item, at random, with the same features"
        alone = {part: f"the same thought, answered by the {part} alone" for part in MIXED}
        return (
            control("l0", bare, call("generative", "pretrain", decoder="direct"), note=direct),
            control("random_evidence", needs, call("random", "sft"), note=random),
            *(
                control(f"{part}_alone", needs, call("reasoning", "sft", mix=part), note=note)
                for part, note in alone.items()
            ),
        )
    seen = "an upper bound that has seen the answer: its thoughts come from the target"
    return (
        control("no_thinking", ("tokenizer", TWIN), call("generative", TWIN)),
        control("random_thinking", needs, call("random", "sft")),
        control("random_thinking_rl", (*needs[:2], "rl"), call("random", "rl")),
        control("oracle_thinking", needs, call("oracle", "sft"), note=seen),
    )


def known_rows(run: RunDir) -> dict[str, Row]:
    """Every row there could be, in the order of the table."""
    rows = (
        Row("popularity", ("data",), Models.popularity),
        *(
            Row(name, (*found.parents[1:], f"baselines/{name}"), call("baseline", name))
            for name, found in BASELINES.items()
            if name not in ("popularity", "tiger")
        ),
        Row("tiger", ("tokenizer", "baselines/tiger"), Models.tiger),
        Row("stream_pt", ("tokenizer", "pretrain"), Models.pretrained),
        *(
            Row(f"stream_{stage}", ("tokenizer", "annotate", stage), call("thinking", stage))
            for stage in ("sft", "rl")
        ),
        *_thinking_controls(run),
    )
    known = {row.name: row for row in rows}
    for stage in run.stages("rerank"):
        names = tuple(stage.removeprefix(RERANK).split("+"))
        if all(name in known for name in names):
            row = _reranked_row(run, names)
            known[row.name] = row
    return known


def reranked_stages(run: RunDir, names: Sequence[str]) -> list[str]:
    """What a re-ranker of some methods is made from.

    Raises:
        UsageError: an unknown method, a control of the table, or one with a re-ranker.
    """
    rows = known_rows(run)
    if joined := [name for name in names if "+" in name and not name.endswith(RERANKED)]:
        raise UsageError(
            f"{joined[0]!r} is no method; one re-ranker behind several takes them with commas",
            run="--methods "
            + ",".join(
                dict.fromkeys(each for name in names for each in name.split("+") if each in rows)
            ),
        )
    chosen = [_row(run, rows, name) for name in names]
    for row in chosen:
        # A control may know the target; a re-ranked method has learned from who would teach.
        if row.control or row.name.endswith(RERANKED):
            kind = "a control of the table" if row.control else "re-ranked already"
            bare = (one for one in method_names(run) if not one.endswith(RERANKED))
            raise UsageError(
                f"{row.name} is {kind}, and no method to re-rank",
                run=f"--methods with some of {', '.join(bare)}",
            )
    own = [stage for row in chosen for stage in row.stages]
    return list(dict.fromkeys(["data", "tokenizer", *own]))


def _reranked_row(run: RunDir, names: tuple[str, ...]) -> Row:
    stage = run.stage(RERANK + "+".join(names))
    kept = bool(stage.manifest["kept"])
    return Row(
        "+".join(names) + RERANKED,
        (*stage.manifest["parents"], stage.name),
        call("reranked", names),
        eligible=kept,
        note="" if kept else "the re-ranker does not surely help on validation: it cannot win",
    )


def choose_rows(run: RunDir, names: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    """The rows to evaluate.

    Args:
        names: the wanted ones; empty for all that the run has the stages of.

    Returns:
        the rows; and the names of rows left out because a stage of theirs is not complete.

    Raises:
        UsageError: an unknown name.
        StreamctlError: a wanted row lacks a stage; names the command that makes it.
    """
    rows = known_rows(run)
    if names:
        wanted = {_row(run, rows, name).name for name in names}
        chosen = [row for row in rows.values() if row.name in wanted]
        for stage in dict.fromkeys(stage for row in chosen for stage in row.stages):
            run.require(stage)
        return chosen, []
    chosen = [row for row in rows.values() if _present(run, row)]
    return chosen, [name for name, row in rows.items() if row not in chosen]


def _row(run: RunDir, rows: Mapping[str, Row], name: str) -> Row:
    if name not in rows:
        hint = did_you_mean(name, rows) or f"this run has {', '.join(method_names(run))}"
        raise UsageError(f"unknown method {name!r}; {hint}", run="one of these names")
    return rows[name]


def _present(run: RunDir, row: Row) -> bool:
    return all(run.stage(stage).complete for stage in row.stages)


def method_names(run: RunDir) -> list[str]:
    """The methods that a run can answer with, in the order of the table."""
    rows = known_rows(run).values()
    return [row.name for row in rows if not row.control and row.eligible and _present(run, row)]


def answerer(run: RunDir, name: str) -> Row:
    """The row of a method that may answer users.

    Raises:
        UsageError: there is no method of that name, or it is a control.
        StreamctlError: a stage that it is read from is missing, damaged or stale.
    """
    [row], _ = choose_rows(run, (name,))
    if row.control:
        raise UsageError(
            f"{name} is a control, and answers nobody",
            run=f"one of {', '.join(method_names(run))}",
        )
    return row


def load_method(run: RunDir, name: str, device: str = "auto", *, beam: int = BEAM) -> Recommender:
    """One method of a run, ready to answer.

    Raises:
        UsageError, StreamctlError: as `answerer`.
    """
    return answerer(run, name).make(Models(run, EvalConfig(beam=beam), None, device))


def _winner(run: RunDir) -> dict[str, Any] | None:
    """What the evaluation found to be the best; None where there is none that holds."""
    stage = run.stage(EVAL)
    winner = stage.manifest.get("winner") if stage.complete else None
    there = winner and winner["method"] in method_names(run) and not stage.stale_parents()
    return winner if there else None


def best_method(run: RunDir) -> tuple[str, str]:
    """The method that a run answers with where nobody names another, and why it is this one.

    Raises:
        StreamctlError: the run has no method at all.
    """
    names, stage = method_names(run), run.stage(EVAL)
    if winner := _winner(run):
        said = f"best on validation, masked ndcg@10 {winner['ndcg@10']:.4f}"
        if after := winner["next"]:
            said += f", {after['difference']:+.4f} over {after['method']}"
            said += f" (95%: {after['low']:+.4f} to {after['high']:+.4f})"
        return winner["method"], said
    others = [name for name in names if name != "popularity"]
    for name in (*UNJUDGED, *others, "popularity"):
        if name in names:
            if name == "popularity":
                return name, "nothing is trained yet; `streamctl run` trains every stage"
            state = "is not there yet"
            if stage.complete:
                state = "is out of date" if stage.manifest.get("winner") else "has chosen nobody"
            return name, f"the table of `{run.command(EVAL)}`, which finds the best, {state}"
    raise StreamctlError("the run has no method", where=run.path, run=run.command("data"))


def answering(run: RunDir, method: str | None = None) -> tuple[RunDir, str, str]:
    """What a run answers by: which run folder holds it, the method, and why it is this one.

    RUN/final, the winner on everything, where `refit` has made it and nothing has changed since:
    neither its stages nor the winner, unless that method was asked for. Popular items are counted
    on everything, too, then.

    Args:
        method: the one that is wanted; None for the best.
    """
    final = run.stage("final")
    made = final.manifest if final.complete else {}
    refitted, asked = made.get("method"), made.get("asked")
    stale = final.stale_parents() if made else []
    if refitted and not stale:
        found = None if asked else _winner(run)
        best = refitted if found is None else found["method"]
        if method in (refitted, POPULAR) or (method is None and best == refitted):
            return RunDir(final.path), method or refitted, "refitted on everything"
    name, why = best_method(run) if method is None else (method, "you chose it")
    if refitted and (method is None or (stale and method == refitted)):
        of = f"an earlier {' and '.join(stale)}" if stale else refitted
        again = f"{run.command('final')}{f' --method {refitted}' if asked else ''} --force"
        why += f"; {final.path} is of {of}, `{again}` renews it"
    return run, name, why


def load_best(
    run: RunDir, device: str = "auto", *, method: str | None = None, beam: int = BEAM
) -> tuple[RunDir, str, Recommender]:
    """The folder that answers, the run's best method or the one that is named, and its recommender;
    said on stderr."""
    folder, name, why = answering(run, method)
    recommender = load_method(folder, name, device, beam=beam)
    say(f"answers by {name}: {why}")
    return folder, name, recommender
