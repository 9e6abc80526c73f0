"""The jobs of `reproduce`: what each method trains, what from, and which rows it gives."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamctl import config as configs
from streamctl.baselines.train import train_baseline
from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.files import disk_errors
from streamctl.runs import MANIFEST, RunDir
from streamctl.training.annotate import annotate
from streamctl.training.evidence import evidence
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import sft


@dataclass(frozen=True)
class Plan:
    """Settings of the whole matrix.

    Attributes:
        methods: jobs to run (see `JOBS`).
        seeds: each method is trained once with each.
        size: of the generative models.
        sets: `stage.key=value` texts for every job, `METHOD.key=value` of one baseline alone.
        budget: hours after which no further job begins; 0 for no limit.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    size: configs.Size = "small"
    sets: tuple[str, ...] = ()
    budget: float = 0.0
    device: str = "auto"

    def resolve(self, cls: type, seed: int, *, method: str = "", **fixed: Any) -> Any:
        """A stage's configuration; `method` is the baseline whose own settings count too."""
        if "size" in cls.__dataclass_fields__ and "size" not in fixed:
            fixed["size"] = self.size
        sections = {stage.section for stage in configs.STAGES}
        sets = [text for text in self.sets if text.partition(".")[0] in sections]
        own = [text for text in self.sets if text.partition(".")[0] == method]
        sets += [f"baseline.{text.partition('.')[2]}" for text in own]
        return configs.resolve(cls, sets=sets, seed=seed, **fixed)


@dataclass(frozen=True)
class Job:
    """One method of the matrix.

    Attributes:
        train: fills the job's folder, itself a run.
        rows: row of the evaluation -> its name in the table; empty: every row of the run under
            its own name, but those that other jobs have.
        stages: taken over from the run, or from another job's folder (`after`).
        sections: of the configuration that concern it; other `--set` texts do not.
        after: the job whose stages it starts from.
    """

    train: Callable[[RunDir, Plan, int], None]
    rows: dict[str, str]
    stages: tuple[str, ...] = ("data", "tokenizer")
    sections: tuple[str, ...] = ("baseline", "eval")
    after: str | None = None


def _classic(name: str, method: str, **fixed: Any) -> Job:
    """A baseline over items, to which size and tokenizer are nothing."""

    def train(run: RunDir, plan: Plan, seed: int) -> None:
        options = {"method": method, "name": name, "size": None} | fixed
        config = plan.resolve(configs.BaselineConfig, seed, **options)
        train_baseline(run, config, device=plan.device)

    return Job(train, {name: method}, stages=("data",))


def _tiger(run: RunDir, plan: Plan, seed: int, *, method: str = "tiger", **fixed: Any) -> None:
    config = plan.resolve(configs.BaselineConfig, seed, method=method, name="tiger", **fixed)
    train_baseline(run, config, device=plan.device)


def _published_tiger(run: RunDir, plan: Plan, seed: int) -> None:
    """TIGER with the softmax over the vocabulary, as published (and as Eq. 11 has it)."""
    _tiger(run, plan, seed, method="tiger_vocabulary", softmax="vocabulary")


def _long_tiger(run: RunDir, plan: Plan, seed: int) -> None:
    """TIGER for as many steps as pretraining, SFT and RL have together, without early stopping."""
    tuning = plan.resolve(configs.SftConfig, seed)
    rewarded = plan.resolve(configs.RlConfig, seed)
    base = plan.resolve(configs.PretrainConfig, seed)
    steps = math.ceil(len(load_data(run)[1].train) / base.batch)
    epochs = base.epochs + tuning.rounds * tuning.epochs + math.ceil(rewarded.steps / steps)
    config = plan.resolve(
        configs.BaselineConfig, seed, name="tiger", epochs=epochs, patience=0, batch=base.batch
    )
    train_baseline(run, config, device=plan.device)


def _stream(run: RunDir, plan: Plan, seed: int) -> None:
    """The paper's three stages and the l = 0 twin: rows and controls of one model."""
    pretrain(run, plan.resolve(configs.PretrainConfig, seed), device=plan.device)
    annotate(run, plan.resolve(configs.AnnotateConfig, seed), device=plan.device)
    tuning = plan.resolve(configs.SftConfig, seed)
    sft(run, tuning, device=plan.device)
    rl(run, plan.resolve(configs.RlConfig, seed), device=plan.device)
    sft(run, tuning, device=plan.device, twin=True)


def _plain_rl(run: RunDir, plan: Plan, seed: int) -> None:
    """RL from the same SFT weights without the rewards that judge thoughts (Eqs. 25-27)."""
    config = plan.resolve(configs.RlConfig, seed, likelihood_weight=0.0, ranking_weight=0.0)
    rl(run, config, device=plan.device)


def _evidence(run: RunDir, plan: Plan, seed: int) -> None:
    """The thinker that looks evidence up, with its controls."""
    evidence(run, plan.resolve(configs.EvidenceConfig, seed), device=plan.device)


def _nothing(run: RunDir, plan: Plan, seed: int) -> None:
    """Popularity is counted by the evaluation."""


_STREAM = ("pretrain", "annotate", "sft")
_SECTIONS = (*_STREAM, "rl", "eval")

JOBS: dict[str, Job] = {
    "popularity": Job(_nothing, {"popularity": "popularity"}, ("data",), ("eval",)),
    "caser": _classic("caser", "caser"),
    "gru4rec": _classic("gru4rec", "gru4rec"),
    "bert4rec": _classic("bert4rec", "bert4rec"),
    "sasrec_bce": _classic("sasrec", "sasrec_bce", loss="bce"),
    "sasrec_ce": _classic("sasrec", "sasrec_ce", loss="ce"),
    "tiger": Job(_tiger, {"tiger": "tiger"}),
    "tiger_vocabulary": Job(_published_tiger, {"tiger": "tiger_vocabulary"}),
    "tiger_long": Job(_long_tiger, {"tiger": "tiger_long"}, sections=("baseline", *_SECTIONS)),
    "stream": Job(_stream, {}, sections=_SECTIONS),
    "evidence": Job(_evidence, {}, sections=("evidence", "eval")),
    "stream_plain_rl": Job(
        _plain_rl,
        {"stream_rl": "stream_plain_rl"},
        ("data", "tokenizer", *_STREAM),
        _SECTIONS,
        after="stream",
    ),
}


def identity(run: RunDir, plan: Plan, name: str) -> dict[str, Any]:
    """What a receipt depends on besides its method and seed."""
    job = JOBS[name]
    sets = [text for text in plan.sets if text.partition(".")[0] in (name, *job.sections)]
    common = [stage for stage in ("data", "tokenizer") if stage in job.stages]
    found = {"sets": sets, "stages": {stage: run.stage(stage).hash for stage in common}}
    return found | ({"size": plan.size} if "tokenizer" in common else {})


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words: what an identity says that another does not."""
    found = [f"--set {text} then, not now" for text in made["sets"] if text not in wanted["sets"]]
    found += [f"--set {text} now, not then" for text in wanted["sets"] if text not in made["sets"]]
    if made.get("size") != wanted.get("size"):
        found.append(f"size {made.get('size')} then, {wanted.get('size')} now")
    stages = (made["stages"], wanted["stages"])
    found += [
        f"{stage} has changed since"
        for stage in dict.fromkeys([*stages[0], *stages[1]])
        if stages[0].get(stage) != stages[1].get(stage)
    ]
    return "; ".join(found) or "the same settings in another order"


def job_path(run: RunDir, name: str, seed: int) -> RunDir:
    """The job's own run, below the run that it belongs to."""
    return RunDir(run.path / "reproduce" / f"{name}-{seed}")


def copy_stages(run: RunDir, name: str, seed: int) -> None:
    """Put the stages that a job starts from into its folder.

    Raises:
        StreamctlError: the job that it starts from is not there yet.
    """
    job, after = job_path(run, name, seed), JOBS[name].after
    source = run if after is None else job_path(run, after, seed)
    for stage in JOBS[name].stages:
        if not source.stage(stage).complete:
            raise StreamctlError(
                f"{name} starts from {stage} of {after or 'the run'}, which is not complete",
                where=source.path,
                run=f"streamctl reproduce {run.path} --methods {after},{name}",
            )
        if not job.stage(stage).complete:  # the manifest comes last here too
            folders = source.stage(stage).path, job.stage(stage).path
            with disk_errors(folders[1]):
                ignored = shutil.ignore_patterns(MANIFEST)
                shutil.copytree(*folders, ignore=ignored, dirs_exist_ok=True)
                shutil.copy2(*(folder / MANIFEST for folder in folders))
