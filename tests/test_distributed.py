"""Several processes: the losses, weights and metrics of one; a killed rank; torchrun itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from forks import SETTINGS, SHOP, Commands
from ranks_job import job
from safetensors.torch import load_file

from streamctl.device import resolve_device
from streamctl.distributed import Ranks, Share
from streamctl.runs import RunDir
from streamctl.training.letter.sft import corrupt
from streamctl.training.losses import state_target_loss

pytestmark = pytest.mark.xdist_group("distributed")
OPTIONS = ["--set", "pretrain.epochs=2", "--set", "pretrain.dropout=0", "--set", "eval.users=20"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Commands, options, and a run that is ready for pretraining."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "settings.toml").write_text(SETTINGS)
    commands, run = Commands(folder), folder / "run"
    options = ["--config", str(folder / "settings.toml"), *OPTIONS]
    for words in (SHOP.split(), ["tokenize", *options[:2]]):
        answer = commands.run([*words, "--run", str(run)])
        assert answer.returncode == 0, answer.stderr
    return commands, options, run


@pytest.fixture(scope="module")
def alone(shop):
    """The same run, pretrained by one process; and its losses."""
    commands, options, run = shop
    copy = run.with_name("alone")
    shutil.copytree(run, copy)
    words = ["pretrain", *options, "--run", str(copy)]
    (answer,), losses = job(commands, words, 1, copy.with_suffix(".losses"))
    assert answer.returncode == 0, answer.stderr
    return copy, losses


@pytest.mark.parametrize(
    ("device", "joined_over"), [("cpu", ("gloo", True)), ("auto", ("nccl", False))]
)
def test_on_a_machine_with_a_gpu_the_device_asked_for_decides_what_joins_the_processes(
    monkeypatch, tmp_path, device, joined_over
):
    import accelerate
    from typer.testing import CliRunner

    from streamctl import distributed
    from streamctl.cli import build_app

    asked = []

    class State:
        process_index, num_processes = 0, 2

        def __init__(self, cpu, backend, timeout):
            asked.append((backend, cpu))

    def join_and_stop(*_, **options):
        distributed.ranks()
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr("streamctl.training.pretrain.pretrain", join_and_stop)
    monkeypatch.setattr(distributed, "signal", SimpleNamespace(signal=print, SIGTERM=15))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    distributed.ranks.cache_clear()
    try:
        words = ["pretrain", "--run", str(tmp_path), "--device", device]
        CliRunner().invoke(build_app(), words)
    finally:
        distributed.ranks.cache_clear()
    assert asked == [joined_over]


@pytest.mark.parametrize(("told", "chosen"), [("true", "cpu"), ("false", "cuda"), ("", "cuda")])
def test_accelerate_launch_cpu_keeps_auto_off_the_gpu(monkeypatch, told, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    assert resolve_device("auto").type == chosen


@pytest.mark.parametrize("total", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_every_row_once(total, count):
    rows = np.arange(total)
    shares = [Ranks(rank, count).share(total) for rank in range(count)]
    counted = [share.of(rows) for share in shares if share.weight]
    assert np.concatenate(counted).tolist() == rows.tolist()
    assert sum(share.weight for share in shares) == total
    assert all(len(share.of(rows)) == share.rows >= 1 for share in shares)


def test_chance_and_contrast_do_not_depend_on_the_split():
    generator = torch.Generator().manual_seed(3)
    thoughts = torch.randint(100, 200, (10, 4), generator=generator)
    states = torch.randn(10, 5, 8, generator=generator)
    targets = torch.randn(10, 8, generator=generator)
    items = torch.tensor([1, 2, 3, 1, 4, 5, 6, 2, 7, 8])

    def noise():
        return torch.Generator().manual_seed(7)

    whole = corrupt(thoughts, 0.4, 100, 200, noise())
    parts, loss = [], 0.0
    for rank in range(3):
        share = Ranks(rank, 3).share(10)
        parts.append(corrupt(share.of(thoughts), 0.4, 100, 200, noise(), share))
        part = state_target_loss(share.of(states), targets, items, first=share.first)
        loss += part * share.weight / 10
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(loss, state_target_loss(states, targets, items))


def test_a_parameter_that_no_rank_gave_a_gradient_keeps_none(monkeypatch):
    def weights(*given):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        for parameter, number in zip(parameters, given, strict=True):
            parameter.grad = None if number is None else torch.full((2,), float(number))
        return parameters

    ours, theirs = weights(1, None, None), weights(3, 5, None)
    messages = []
    monkeypatch.setattr(Ranks, "_reduce", lambda self, tensor: messages.append(tensor) or tensor)
    Ranks(1, 2).sum_gradients(theirs, 9.0)
    monkeypatch.setattr(Ranks, "_reduce", lambda self, tensor: tensor + messages[0])
    assert Ranks(0, 2).sum_gradients(ours, 7.0) == 7.0
    assert [None if p.grad is None else p.grad.tolist() for p in ours] == [[4, 4], [5, 5], None]


def test_two_ranks_train_the_weights_of_one(shop, alone, tmp_path):
    commands, options, run = shop
    single, losses = alone
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    answers, shared = job(commands, ["pretrain", *options, "--run", str(copy)], 2, tmp_path / "two")
    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert len(shared) == len(losses) > 10
    np.testing.assert_allclose(shared, losses, rtol=1e-9)
    one, two = (load_file(path / "pretrain" / "model.safetensors") for path in (single, copy))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-7)
    assert RunDir(copy).stage("pretrain").manifest["processes"] == 2
    # The second rank is silent, and leaves nothing.
    assert not answers[1].stdout and not answers[1].stderr


def test_a_killed_rank_ends_the_job_and_one_process_goes_on(shop, alone, tmp_path):
    commands, options, run = shop
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    words = ["pretrain", *options, "--run", str(copy)]
    answers, _ = job(commands, words, 2, tmp_path / "killed", kill_at=9)
    assert [answer.returncode for answer in answers] == [1, -9]
    assert "rank 0 lost the others" in answers[0].stderr
    assert "Traceback" not in answers[0].stderr
    assert (copy / "pretrain" / ".progress" / "checkpoint.safetensors").exists()
    (answer,), rest = job(commands, words, 1, tmp_path / "rest")
    assert answer.returncode == 0, answer.stderr
    losses = alone[1]
    assert 0 < len(rest) <= len(losses) - 8
    np.testing.assert_allclose(rest, losses[len(losses) - len(rest) :], rtol=1e-9)


def test_stages_that_think_with_evidence_are_the_same_in_two_processes(alone, shop, tmp_path):
    commands, options, _ = shop
    runs, losses = [], []
    for count in (1, 2):
        copy = tmp_path / str(count)
        shutil.copytree(alone[0], copy)
        for stage in ("annotate", "sft", "rl"):
            settings = [*options, "--set", "annotate.fit_epochs=0", "--run", str(copy)]
            answers, found = job(commands, [stage, *settings], count, tmp_path / f"{stage}-{count}")
            assert not any(answer.returncode for answer in answers), answers
            losses.append(found)
        runs.append(RunDir(copy))
    one, two = (run.stage("annotate") for run in runs)
    assert one.manifest["artifacts"] == two.manifest["artifacts"]
    for alone_, shared in zip(losses[1:3], losses[4:], strict=True):  # of SFT and RL
        assert len(shared) == len(alone_) >= 4
        # In float32; what it differs by grows with every step.
        np.testing.assert_allclose(shared[:3], alone_[:3], rtol=1e-3)
    trust = [run.stage("sft").json("report.json")["trust"]["ndcg@10"] for run in runs]
    for shift, value in trust[0].items():
        assert trust[1][shift] == pytest.approx(value, abs=0.05)


def test_eval_in_two_processes_gives_identical_artifacts(shop, alone, tmp_path):
    commands, options, _ = shop
    found = []
    for count in (1, 2):
        copy = tmp_path / str(count)
        shutil.copytree(alone[0], copy)
        words = ["eval", *options, "--run", str(copy), "--methods", "popularity,stream_pt"]
        answers, _ = job(commands, words, count, tmp_path / f"eval-{count}")
        assert not any(answer.returncode for answer in answers), answers
        found.append(RunDir(copy).stage("eval").manifest["artifacts"])
    assert found[0] == found[1]


def test_torchrun_runs_a_stage_and_refuses_what_one_process_makes(shop, tmp_path):
    _, options, run = shop
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def torchrun(*words):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", "2", "-m", "--", "streamctl"]
        return subprocess.run(
            [*start, *words, "--run", str(copy), *options],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    answer = torchrun("pretrain", "--json")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count('"stage": "pretrain"') == 1
    assert RunDir(copy).stage("pretrain").complete
    refused = torchrun("tokenize", "--force")
    assert refused.returncode != 0
    assert "stage tokenizer is made by one process" in refused.stderr


def test_a_share_of_the_only_process_is_everything():
    assert Ranks().share(5) == Share.whole(5)
