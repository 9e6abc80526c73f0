"""The jobs of `reproduce`: what each method trains, what from, and which rows it gives."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamctl import config as configs
from streamctl.baselines.train import settle, train_baseline
from streamctl.data import load_data
from streamctl.errors import StreamctlError
from streamctl.files import disk_errors
from streamctl.runs import MANIFEST, RunDir
from streamctl.training.annotate import annotate
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
        fixed: of the baseline's configuration; empty for what is none.
        after: the job whose stages it starts from.
    """

    train: Callable[[RunDir, Plan, int], None]
    rows: dict[str, str]
    stages: tuple[str, ...]
    sections: tuple[str, ...] = ("eval",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None


def _baseline(method: str, stages: tuple[str, ...], **fixed: Any) -> Job:
    """A baseline by itself: what is fixed of it besides the plan's settings."""

    def train(run: RunDir, plan: Plan, seed: int) -> None:
        config = plan.resolve(configs.BaselineConfig, seed, method=method, **fixed)
        train_baseline(run, config, device=plan.device)

    return Job(train, {fixed["name"]: method}, stages, ("baseline", "eval"), fixed)


def _classic(name: str, method: str, **fixed: Any) -> Job:
    """A baseline over items, to which size and tokenizer are nothing."""
    return _baseline(method, ("data",), name=name, size=None, **fixed)


def _long_tiger(run: RunDir, plan: Plan, seed: int) -> None:
    """TIGER for as many steps as pretraining, SFT and RL have together, without early stopping."""
    tuning = plan.resolve(configs.SftConfig, seed)
    rewarded = plan.resolve(configs.RlConfig, seed)
    base = plan.resolve(configs.PretrainConfig, seed)
    steps = math.ceil(len(load_data(run)[1].train) / base.batch)
    epochs = base.epochs + tuning.rounds * tuning.epochs + math.ceil(rewarded.steps / steps)
    fixed = {"name": "tiger", "epochs": epochs, "patience": 0, "batch": base.batch}
    config = plan.resolve(configs.BaselineConfig, seed, method="tiger_long", **fixed)
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


def _nothing(run: RunDir, plan: Plan, seed: int) -> None:
    """Popularity is counted by the evaluation."""


_CODES = ("data", "tokenizer")
_STREAM = ("pretrain", "annotate", "sft")
_SECTIONS = (*_STREAM, "rl", "eval")

JOBS: dict[str, Job] = {
    "popularity": Job(_nothing, {"popularity": "popularity"}, ("data",)),
    "caser": _classic("caser", "caser"),
    "gru4rec": _classic("gru4rec", "gru4rec"),
    "bert4rec": _classic("bert4rec", "bert4rec"),
    "sasrec_bce": _classic("sasrec", "sasrec_bce", loss="bce"),
    "sasrec_ce": _classic("sasrec", "sasrec_ce", loss="ce"),
    "tiger": _baseline("tiger", _CODES, name="tiger"),
    # The softmax over the vocabulary is the published one, and Eq. 11's.
    "tiger_vocabulary": _baseline("tiger_vocabulary", _CODES, name="tiger", softmax="vocabulary"),
    "tiger_long": Job(
        _long_tiger, {"tiger": "tiger_long"}, _CODES, ("baseline", *_SECTIONS), {"name": "tiger"}
    ),
    "stream": Job(_stream, {}, _CODES, _SECTIONS),
    "stream_plain_rl": Job(
        _plain_rl,
        {"stream_rl": "stream_plain_rl"},
        (*_CODES, *_STREAM),
        _SECTIONS,
        after="stream",
    ),
}


def identity(run: RunDir, plan: Plan, name: str) -> dict[str, Any]:
    """What a receipt depends on besides its method and seed.

    Returns:
        `settings`: every value of the sections that concern the job, defaults included; `stages`:
        hash of the run's stages that it starts from.
    """
    job = JOBS[name]
    kinds = {stage.section: stage for stage in configs.STAGES}
    resolved = {section: plan.resolve(kinds[section], 0) for section in job.sections}
    if job.fixed:
        own = plan.resolve(configs.BaselineConfig, 0, method=name, **job.fixed)
        resolved["baseline"] = settle(job_path(run, name, 0), own)
    settings = {
        section: {
            key: value
            for key, value in configs.to_dict(config).items()
            if key not in ("seed", "methods")  # the job's own
        }
        for section, config in resolved.items()
    }
    common = [stage for stage in _CODES if stage in job.stages]
    return {
        "settings": json.loads(json.dumps(settings)),
        "stages": {stage: run.stage(stage).hash for stage in common},
    }


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words: what an identity says that another does not.

    A setting that was not known then counts as what it was before there was a setting.
    """
    if "settings" not in made:
        return ["by a version that did not note its settings"]
    found = []
    for section, values in wanted["settings"].items():
        then = made["settings"].get(section, {})
        for key, now in values.items():
            old = then.get(key, configs.BEFORE.get(key, now))
            if old != now:
                texts = configs.as_text(old), configs.as_text(now)
                found.append(f"{section}.{key} {texts[0]} then, {texts[1]} now")
    for stage, now in wanted["stages"].items():
        if made["stages"].get(stage) != now:
            found.append(f"{stage} has changed since")
    return found


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
        if not job.stage(stage).complete:
            copy_stage(source, job, stage)


def copy_stage(source: RunDir, target: RunDir, name: str) -> None:
    """Copy a complete stage to another run; the manifest comes last here too."""
    folders = source.stage(name).path, target.stage(name).path
    with disk_errors(folders[1]):
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(*folders, ignore=ignored, dirs_exist_ok=True)
        shutil.copy2(*(folder / MANIFEST for folder in folders))
