"""`run`: what is made again when the data has changed."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest

from streamctl import pipeline
from streamctl.config import BaselineConfig, DataConfig, RerankConfig
from streamctl.errors import UsageError
from streamctl.runs import RunDir


def publish(run: RunDir, name: str, config, parents=(), force=False, **content) -> None:
    with run.begin(name, config, parents, force=force) as stage:
        stage.save_json("report.json", content)
        stage.publish()


def test_a_setting_of_one_baseline_is_of_no_other(tmp_path):
    run = RunDir(tmp_path)
    settings = pipeline.Settings(sets=["baseline.epochs=3", "tiger.epochs=9", "sft.epochs=2"])
    for name, epochs in (("tiger", 9), ("gru4rec", 3)):
        found = settings.resolve(BaselineConfig, run, f"baselines/{name}")
        assert (found.name, found.epochs) == (name, epochs)
    for sets, says in (("baseline.dim=8", None), ("tiger.dim=8", "tiger has no setting 'dim'")):
        settings = pipeline.Settings(sets=[sets])
        with pytest.raises(UsageError, match=says) if says else nullcontext():
            assert settings.resolve(BaselineConfig, run, "baselines/tiger").dim is None
    publish(run, "data", DataConfig())
    with pytest.raises(UsageError, match=r"does not train caser.*streamctl baseline caser"):
        pipeline.run_all(run, pipeline.Settings(sets=["caser.epochs=9"]))


@pytest.mark.parametrize("changed", [False, True])
def test_baselines_made_by_hand_are_made_again_when_the_data_has_changed(
    tmp_path, monkeypatch, changed
):
    run = RunDir(tmp_path / "run")
    publish(run, "data", DataConfig())
    for name, epochs in (("sasrec_ce", 7), ("caser", 3)):
        config = BaselineConfig(name=name, epochs=epochs)
        publish(run, f"baselines/{name}", config, ["data"], method=name)
    publish(run, "baselines/old.previous", BaselineConfig(), ["data"])
    if changed:
        publish(run, "data", DataConfig(history=9), force=True, other=True)
    made, made_by_hand = [], ("baselines/caser", "baselines/sasrec_ce")

    def make(run, config, *, device, force):
        made.append((getattr(config, "name", "eval"), getattr(config, "epochs", None), force))

    monkeypatch.setattr(pipeline, "STEPS", ("pretrain", pipeline.TWIN))
    monkeypatch.setattr(
        pipeline,
        "maker",
        lambda name: (
            make,
            BaselineConfig if name in made_by_hand else pipeline.configs.PretrainConfig,
        ),
    )
    monkeypatch.setattr(pipeline, "evaluate_run", make)
    pipeline.run_all(run, pipeline.Settings())
    assert made[0][0] == "eval" and made[-1][0] == "eval", "pretraining first, eval last"
    again = [("caser", 3, True), ("sasrec_ce", 7, True)] if changed else []
    assert made[1:-1] == again


def test_re_rankers_are_made_again_before_the_evaluation_reads_them(tmp_path, monkeypatch):
    run, made = RunDir(tmp_path / "run"), []
    publish(run, "data", DataConfig())
    publish(run, "baselines/knn", BaselineConfig(name="knn"), ["data"])
    publish(run, "baselines/caser", BaselineConfig(name="caser"), ["data"])
    for name in ("knn", "caser"):
        config = RerankConfig(methods=(name,), trees=7)
        publish(run, f"rerank/{name}", config, ["data", f"baselines/{name}"])
    shutil.rmtree(tmp_path / "run" / "baselines" / "caser")  # nothing to re-rank is left

    def make(run, config, *, device, force):
        made.append((config.section, getattr(config, "trees", None), force))

    monkeypatch.setattr(pipeline, "STEPS", ("pretrain", pipeline.TWIN))
    monkeypatch.setattr(pipeline, "evaluate_run", make)
    monkeypatch.setattr(
        pipeline,
        "maker",
        lambda name: (
            make,
            BaselineConfig if name.endswith(("knn", "caser")) else pipeline.configs.PretrainConfig,
        ),
    )
    publish(run, "data", DataConfig(history=9), force=True, other=True)
    pipeline.run_all(run, pipeline.Settings())
    assert ("rerank", 7, True) in made and made[-1][0] == "eval"
    assert sum(section == "rerank" for section, *_ in made) == 1
