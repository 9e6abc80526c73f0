"""The command line: speed of --help, exit codes, one clear line for every mistake."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest
from typer.main import get_command

from streamctl.cli import build_app
from streamctl.commands.options import print_table


def commands():
    """Every command as (words, click command)."""
    root = get_command(build_app())

    def walk(group, words):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, (*words, name))
            else:
                yield (*words, name), command

    return list(walk(root, ()))


def test_help_answers_in_half_a_second():
    times = [1.0]
    # The fastest of many, and processor time: what the program needs, not what a busy machine adds.
    while min(times) >= 0.5 and len(times) <= 20:
        before = processor_seconds()
        subprocess.run(
            [sys.executable, "-m", "streamctl", "--help"], check=True, capture_output=True
        )
        times.append(processor_seconds() - before)
    assert min(times) < 0.5, times


def processor_seconds() -> float:
    """What the processes that this one has started and that have ended used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from streamctl.cli import build_app; build_app();"
        "heavy = {'torch', 'transformers', 'faiss', 'numba', 'sklearn', 'pyarrow', 'matplotlib'};"
        "sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("words", "command"), commands(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_every_command_says_what_it_reads_writes_and_what_comes_next(words, command):
    for part in ("Reads:", "Writes:", "Next:"):
        assert part in (command.help or ""), f"{' '.join(words)} lacks {part!r} in its help"
    for parameter in command.params:
        said = getattr(parameter, "help", "x")
        assert said, f"{' '.join(words)} {parameter.name} lacks help"
        assert "[" not in said, f"{parameter.name}: Rich takes brackets in help for markup"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["tokenize", "--run", "none"], 1, "no such run"),
        (["sft", "--run", "none"], 1, "no such run"),
        (["eval", "--run", "none"], 1, "no such run"),
        (["recommend", "--run", "none", "--user", "u1"], 1, "no such run"),
        (["run", "--run", "none"], 1, "no such run"),
        (["pretrain", "--run", "none", "--set", "epoch=2"], 2, "did you mean epochs"),
        (["run", "--run", "none", "--set", "epochs=2"], 2, "stage.key=value"),
        (["rl", "--run", "none", "--set", "group=1"], 2, "must be 2 to 10000"),
        (["sft", "--run", "none", "--set", "lr=nan"], 2, "must be 1e-12 to 10"),
        (
            ["sft", "--run", "none", "--set", "dropout=2"],
            2,
            "2.0; it must be 0 to 0.95",
        ),
        (["tokenize", "--run", "none", "--set", "lr=0"], 2, "tokenize.lr is 0.0; it must be"),
        (["pretrain", "--run", "none", "--size", "huge"], 2, "tiny, small, paper"),
        (["pretrain", "--run", "none", "--sise", "tiny"], 2, "No such option"),
        (["pretrian"], 2, "No such command"),
        (["pretrain", "--run", "none", "--config", "none.toml"], 1, "cannot be read"),
        (["data", "prepare", "none.csv", "--run", "r"], 1, "none.csv"),
    ],
)
def test_a_mistake_gets_one_clear_line(streamctl, tmp_path, words, code, message):
    answer = streamctl(*words, cwd=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert message in " ".join(answer.stderr.split()), answer.stderr
    assert "Traceback" not in answer.stderr
    assert not answer.stdout
    if code == 1:
        assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr


def test_debug_shows_the_traceback(streamctl, tmp_path):
    answer = streamctl("--debug", "tokenize", "--run", "none", cwd=tmp_path)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr


@pytest.fixture(scope="module")
def shop(streamctl, tmp_path_factory):
    """A prepared synthetic shop, with nothing trained."""
    run = tmp_path_factory.mktemp("shop") / "run"
    answer = streamctl("data", "synth", "--run", run, "--users", 200, "--items", 100, "--seed", 3)
    assert answer.returncode == 0, answer.stderr
    return run


def test_a_missing_stage_names_the_command_that_makes_it(streamctl, shop):
    answer = streamctl("pretrain", "--run", shop)
    assert answer.returncode == 1
    assert f"streamctl tokenize --run {shop}" in answer.stderr


def test_refit_of_a_run_without_anything_trained_names_the_command_that_trains(streamctl, shop):
    answer = streamctl("refit", "--run", shop)
    assert answer.returncode == 1 and not (shop / "final").exists()
    assert f"streamctl run --run {shop}" in answer.stderr


def test_the_remedy_of_other_settings_is_what_was_typed_with_force(streamctl, shop, tmp_path):
    run = shutil.copytree(shop, tmp_path / "run")
    words = [
        "tokenize",
        "--run",
        run,
        "--encoder",
        "tfidf",
        "--set",
        "epochs=2",
        "--set",
        "codes=8",
    ]
    assert streamctl(*words).returncode == 0
    refused = streamctl("tokenize", "--run", run, "--encoder", "tfidf", "--set", "hidden=32,16")
    assert refused.returncode == 1
    remedy = re.search(r"Next: (streamctl .*) \(keeps", refused.stderr)[1]
    assert remedy.endswith("--encoder tfidf --set hidden=32,16 --force")
    assert streamctl(*shlex.split(remedy)[1:], "--set", "epochs=3").returncode == 0
    made = json.loads((run / "tokenizer" / "manifest.json").read_text())["config"]
    assert (made["encoder"], made["hidden"], made["epochs"]) == ("tfidf", [32, 16], 3)


def test_a_table_in_a_narrow_terminal_breaks_its_cells_and_loses_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    title = "/a/long/path/" * 9
    columns = ["", "first", "second"]
    print_table(title, columns, [["random_thinking_rl", "+0.123 +0.456", "x" * 30]])
    said = capsys.readouterr().out
    assert said.startswith(f"{title}\n")
    assert "random_thinking_rl" in said and "…" not in said
    assert said.count("x") == 30 and "+0.123" in said and "+0.456" in said


def test_an_unreachable_encoder_names_the_ways_out(streamctl, shop):
    answer = streamctl("tokenize", "--run", shop, "--encoder", "no/such-encoder")
    assert answer.returncode == 1
    assert "--encoder tfidf" in answer.stderr and "--encoder FOLDER" in answer.stderr


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_an_unreachable_encoder_is_spoken_of_as_it_was_given(streamctl, shop, command):
    answer = streamctl(command, "--run", shop, "--set", "tokenize.encoder=no/such-encoder")
    assert answer.returncode == 1
    assert "--set tokenize.encoder=tfidf" in answer.stderr and "--encoder" not in answer.stderr


def test_a_setting_of_another_stage_is_told_of(streamctl, shop):
    words = ("tokenize", "--run", shop, "--encoder", "no/such-encoder", "--set")
    assert "warning" not in streamctl(*words, "tokenize.seed=1").stderr
    answer = streamctl(*words, "sft.epochs=1")
    assert "warning: --set sft.epochs=1 has no effect here: this command makes" in answer.stderr


def test_another_source_that_is_not_there_is_said_before_other_settings(streamctl, shop, tmp_path):
    answer = streamctl("data", "prepare", tmp_path / "none.csv", "--run", shop)
    assert answer.returncode == 1 and "no such file or folder" in answer.stderr
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    words = (tmp_path / "log.csv", "--items", tmp_path / "none.csv")
    answer = streamctl("data", "prepare", *words, "--run", shop)
    assert answer.returncode == 1 and "no such items file" in answer.stderr


def test_two_measurements_at_once_are_refused(streamctl, shop):
    answer = streamctl("eval", "--run", shop, "--decode", "exact", "--think-curve")
    assert answer.returncode == 2 and "measurements of their own" in answer.stderr


def test_json_goes_to_stdout_alone(streamctl, shop, tmp_path):
    answer = streamctl(
        "data", "synth", "--run", tmp_path / "r", "--users", 50, "--items", 60, "--json"
    )
    assert answer.returncode == 0, answer.stderr
    json.loads(answer.stdout)
