"""`streamctl doctor`: what works here, and what does not, in words for a bug report."""

from __future__ import annotations

import json

import pytest

from streamctl import cache, cli
from streamctl.commands import doctor


def row(what: str, found: dict) -> dict:
    return next(one for one in found["checks"] if one["what"] == what)


def test_it_names_versions_processor_gpu_faiss_encoder_and_folders():
    found = doctor.examine(offline=True)
    names = [one["what"] for one in found["checks"]]
    assert names[:3] == ["python", "streamctl", "torch"]
    assert {"processor", "GPU", "faiss", "text encoder", "cache", "working folder"} <= set(names)
    assert not row("torch", found)["problem"]
    assert row("torch", found)["found"][0].isdigit()


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    assert not doctor._place("working folder", tmp_path)["problem"]
    assert doctor._place("working folder", tmp_path / "gone")["problem"]
    assert list(tmp_path.iterdir()) == []


def test_no_cache_folder_is_a_problem_with_a_remedy(monkeypatch):
    monkeypatch.setattr(cache, "folder", lambda: None)
    assert "STREAMCTL_CACHE" in row("cache", doctor.examine(offline=True))["problem"]


def test_an_encoder_that_is_nowhere_names_the_way_without_it(monkeypatch, tmp_path):
    monkeypatch.setattr("streamctl.config.TokenizeConfig.encoder", "nobody/has-this-model")
    assert "tfidf" in doctor._encoder(offline=True)["problem"]


def test_strict_exits_with_1_where_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PACKAGES", ("streamctl", "no-such-package"))
    monkeypatch.setattr("sys.argv", ["streamctl", "doctor", "--offline", "--strict", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert "no-such-package" in err
    assert row("no-such-package", json.loads(out))["problem"]
