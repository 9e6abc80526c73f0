"""Run folders: atomic publish, staleness, damage, locks, configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from streamctl.config import (
    BOUNDS,
    STAGES,
    DataConfig,
    PretrainConfig,
    SftConfig,
    resolve,
)
from streamctl.errors import TYPED, StreamctlError, UsageError
from streamctl.runs import RunDir


def make(run: RunDir, name: str, value: int, parents=(), config=None, force=False):
    config = config or DataConfig(seed=value)
    with run.begin(name, config, parents, force=force) as stage:
        if stage is None:
            return None
        stage.save_array("x.npy", np.array([value]))
        stage.publish()
    return run.stage(name)


def test_a_stage_is_complete_when_its_manifest_is_there(tmp_path):
    run = RunDir(tmp_path / "r")
    with pytest.raises(RuntimeError), run.begin("data", DataConfig()) as stage:
        stage.save_array("x.npy", np.array([1]))
        raise RuntimeError
    assert not run.stage("data").complete
    with pytest.raises(
        StreamctlError, match=r"stage data was interrupted.*data prepare SOURCE"
    ) as error:
        run.require("data")
    assert f"--config {tmp_path}/r/data/config.toml" in error.value.run
    assert "--force" not in error.value.run
    make(run, "data", 1)
    assert run.require("data").array("x.npy")[0] == 1


def test_a_missing_run_and_a_missing_stage_name_the_command(tmp_path):
    with pytest.raises(StreamctlError, match=r"no such run.*data prepare"):
        RunDir(tmp_path / "none").require("data")
    make(RunDir(tmp_path / "r"), "data", 1)
    with pytest.raises(StreamctlError, match=r"tokenizer is missing.*streamctl tokenize --run"):
        RunDir(tmp_path / "r").require("tokenizer")


def test_a_mistyped_run_names_the_runs_beside_it(tmp_path):
    make(RunDir(tmp_path / "beauty"), "data", 1)
    (tmp_path / "beautiful").mkdir()  # holds no run
    with pytest.raises(StreamctlError, match=f"no such run; did you mean {tmp_path}/beauty[?]"):
        RunDir(tmp_path / "beuty").require("data")


def test_a_folder_of_runs_names_the_runs_in_it(tmp_path):
    make(RunDir(tmp_path / "beauty"), "data", 1)
    with pytest.raises(StreamctlError, match=f"holds runs.* Next: --run {tmp_path}/beauty$"):
        RunDir(tmp_path).require("data")
    run = RunDir(tmp_path / "mine")  # holds final/, and is a run
    for name in ("tokenizer", "final/data"):
        make(run, name, 1)
    with pytest.raises(StreamctlError, match="stage data is missing"):
        run.require("data")


def test_stages_of_a_group_are_those_that_hold(tmp_path):
    run = RunDir(tmp_path)
    for name in ("rerank/knn", "rerank/knn.previous", "baselines/caser"):
        make(run, name, 1)
    (tmp_path / "rerank" / "tiger").mkdir()
    shutil.copytree(tmp_path / "rerank" / "knn", tmp_path / "rerank" / "knn.bak")
    assert run.stages("rerank") == ["rerank/knn"] and not run.stages("none")


def test_a_remedy_with_force_is_the_users_own_command_where_that_makes_the_stage(tmp_path):
    stage = RunDir(tmp_path / "r").stage("tokenizer")
    token = TYPED.set(("tokenize", "--run", "r", "--encoder", "my model"))
    assert stage.redo() == "streamctl tokenize --run r --encoder 'my model' --force"
    TYPED.set(("run", "--run", "r"))  # has no --force
    assert stage.redo() == f"streamctl tokenize --run {tmp_path}/r --force"
    twin = RunDir(tmp_path / "r").stage("baselines/no_thinking")
    assert "--force" not in twin.redo() and twin.redo().startswith("mv ")
    TYPED.reset(token)


def test_the_command_that_makes_a_data_stage_again_names_its_source_and_settings(tmp_path):
    run = RunDir(tmp_path / "r")
    with run.begin("data", DataConfig(source="my log.csv", min_rating=3.0)) as stage:
        stage.publish()
    told = f"streamctl data prepare 'my log.csv' --run {run.path} --config {run.path}/data/"
    assert run.stage("data").again() == f"{told}config.toml --force"
    shop = DataConfig(source="synthetic shop of 30 users and 40 items", format="synthetic", seed=2)
    with run.begin("data", shop, force=True) as stage:
        stage.publish()
    told = f"streamctl data synth --users 30 --items 40 --seed 2 --run {run.path} --force"
    assert run.stage("data").again() == told


def test_a_complete_stage_is_skipped_and_other_settings_are_refused(tmp_path):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    assert make(run, "data", 1) is None
    with pytest.raises(StreamctlError, match=r"other settings \(seed 1 -> 2\).*--force"):
        make(run, "data", 2)


def test_the_remedy_names_a_setting_that_is_to_be_open_again(tmp_path):
    run = RunDir(tmp_path)
    make(run, "pretrain", 1, config=PretrainConfig(positions=5))
    with pytest.raises(StreamctlError, match=r"--set pretrain\.positions=none"):
        make(run, "pretrain", 1, config=PretrainConfig())


def test_force_keeps_the_old_stage(tmp_path):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    make(run, "data", 2, force=True)
    assert run.stage("data").array("x.npy")[0] == 2
    assert run.stage("data.previous").array("x.npy")[0] == 1


@pytest.mark.parametrize("call", range(1, 5))
def test_a_process_that_died_while_it_began_a_stage_leaves_nothing_to_set_aside(
    tmp_path, monkeypatch, call
):
    """The first steps: the folder, config.toml, the folder of its progress, its state."""
    run, replace, mkdir, calls = RunDir(tmp_path), os.replace, Path.mkdir, []

    def dying(step):
        def step_or_die(*arguments, **options):
            calls.append(step)
            if len(calls) == call + 1:  # the first makes the run's folder
                raise KeyboardInterrupt
            return step(*arguments, **options)

        return step_or_die

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dying(replace))
        patch.setattr(Path, "mkdir", dying(mkdir))
        make(run, "data", 1)
    make(run, "data", 1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["data"]
    assert run.require("data").array("x.npy")[0] == 1


def test_a_stage_whose_parent_changed_is_stale(tmp_path):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    make(run, "tokenizer", 5, ["data"])
    make(run, "data", 2, force=True)
    with pytest.raises(StreamctlError, match="stage tokenizer is stale: data changed"):
        run.require("tokenizer")
    with pytest.raises(StreamctlError, match="stale: data changed"):
        make(run, "tokenizer", 5, ["data"])
    make(run, "tokenizer", 5, ["data"], force=True)
    assert run.require("tokenizer")


def test_a_grandparent_that_changed_is_noticed(tmp_path):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    make(run, "tokenizer", 5, ["data"])
    make(run, "pretrain", 6, ["tokenizer"])
    make(run, "data", 2, force=True)
    with pytest.raises(StreamctlError, match="stage tokenizer is stale"):
        run.require("pretrain")


def test_a_flipped_byte_is_named(tmp_path):
    run = RunDir(tmp_path)
    path = make(run, "data", 1).path / "x.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StreamctlError, match=r"x\.npy: artifact is damaged"):
        run.require("data")
    path.unlink()
    with pytest.raises(StreamctlError, match=r"x\.npy: artifact is missing"):
        run.require("data")


@pytest.mark.parametrize("text", ['{"a": 1}', "[]", "null", '{"hash": "0"}'])
def test_a_manifest_that_is_none_of_a_stage_is_damaged(tmp_path, text):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    (tmp_path / "data" / "manifest.json").write_text(text)
    with pytest.raises(StreamctlError, match=r"manifest is damaged.*data prepare SOURCE.*--force"):
        run.require("data")
    with pytest.raises(StreamctlError, match="manifest is damaged"):
        make(run, "data", 1)


def test_a_run_that_is_a_file_or_below_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        for work in (lambda run: run.require("data"), lambda run: make(run, "data", 1)):
            with pytest.raises(StreamctlError, match=r"file: this is a file.*another --run"):
                work(RunDir(path))


def test_a_checkpoint_comes_back_and_later_log_lines_go(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(RuntimeError), run.begin("data", DataConfig()) as stage:
        stage.log(step=1)
        stage.save_checkpoint({"w": torch.arange(3)}, {"step": 1})
        stage.log(step=2)
        raise RuntimeError
    with run.begin("data", DataConfig()) as stage:
        assert stage.resumed
        tensors, meta = stage.load_checkpoint()
        assert tensors["w"].tolist() == [0, 1, 2]
        assert meta == {"step": 1}
        records = (stage.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in records] == [1]


def test_other_settings_do_not_continue_a_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(RuntimeError), run.begin("data", DataConfig(seed=1)) as stage:
        stage.save_checkpoint({"w": torch.zeros(1)}, {})
        raise RuntimeError
    with run.begin("data", DataConfig(seed=2)) as stage:
        assert stage.load_checkpoint() is None


def _hold(path, ready, done):
    with RunDir(path).begin("data", DataConfig()):
        ready.set()
        done.wait()


def test_two_processes_on_one_stage_are_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, done))
    process.start()
    try:
        assert ready.wait(300)
        with (
            pytest.raises(StreamctlError, match="another process is working on stage data"),
            RunDir(tmp_path).begin("data", DataConfig()),
        ):
            pass
    finally:
        done.set()
        process.join()


def test_manifest_names_where_the_result_came_from(tmp_path):
    stage = make(RunDir(tmp_path), "data", 1)
    manifest = stage.manifest
    assert {"schema", "hash", "parents", "seed", "git", "versions", "wall_s", "peak_memory_mb"} <= {
        *manifest
    }
    assert manifest["versions"]["torch"]
    assert (stage.path / "config.toml").exists()


def test_config_sources_win_in_their_order(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[pretrain]\nlr = 0.5\nepochs = 3\nbatch = 7\n")
    config = resolve(PretrainConfig, file=file, sets=["epochs=4", "pretrain.batch=8"], batch=9)
    assert (config.lr, config.epochs, config.batch) == (0.5, 4, 9)
    assert config.seed == PretrainConfig().seed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=3", "did you mean epochs"),
        ("sfft.epochs=3", "unknown stage 'sfft'.*did you mean sft"),
        ("epochs=many", "not of type int"),
        ("epochs=1.5", "not of type int"),
        ("epochs", "takes key=value"),
    ],
)
def test_wrong_settings_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        resolve(SftConfig, sets=[text])


NUMBERS = [
    (stage, field.name)
    for stage in STAGES
    for field in dataclasses.fields(stage)
    if re.search(r"\b(int|float)\b", field.type)
]


@pytest.mark.parametrize(("stage", "name"), NUMBERS, ids=lambda v: getattr(v, "section", v))
def test_every_number_has_a_least_and_a_most_and_its_default_lies_between(stage, name):
    least, most = BOUNDS[name]
    for wrong in (math.nextafter(least, -math.inf), math.nextafter(most, math.inf) * 2, math.inf):
        with pytest.raises(UsageError, match=rf"{stage.section}\.{name} is"):
            resolve(stage, sets=[f"{name}={wrong}"])
    default = getattr(stage(), name)
    if default is not None:
        assert getattr(resolve(stage, **{name: default}), name) == default


@pytest.mark.parametrize("text", ["epochs=1e400", "epochs=" + "9" * 400, "lr=1e309", "batch=-0.5"])
def test_numbers_beyond_what_a_machine_holds_are_wrong_settings(text):
    with pytest.raises(UsageError, match=text.partition("=")[0]):
        resolve(SftConfig, sets=[text])


def test_wrong_choices_and_tables_are_named(tmp_path):
    with pytest.raises(UsageError, match="takes one of tiny, small, paper"):
        resolve(PretrainConfig, size="huge")
    file = tmp_path / "c.toml"
    file.write_text("[pretrian]\nlr = 1\n")
    with pytest.raises(UsageError, match=r"did you mean pretrain"):
        resolve(PretrainConfig, file=file)
    file.write_text("[pretrain\n")
    with pytest.raises(StreamctlError, match="not a TOML file"):
        resolve(PretrainConfig, file=file)
    with pytest.raises(StreamctlError, match="cannot be read"):
        resolve(PretrainConfig, file=tmp_path / "none.toml")


def test_a_stage_of_another_edition_is_refused_in_one_line_that_names_the_command(tmp_path):
    run = RunDir(tmp_path)
    make(run, "data", 1)
    path = run.stage("data").path / "manifest.json"
    manifest = json.loads(path.read_text()) | {"schema": 1}
    path.write_text(json.dumps(manifest))
    with pytest.raises(StreamctlError, match=r"another version.*streamctl data prepare.*--force"):
        run.require("data")
    with pytest.raises(StreamctlError, match="another version"):
        make(run, "data", 1)
    make(run, "data", 1, force=True)
    assert run.require("data").array("x.npy")[0] == 1
