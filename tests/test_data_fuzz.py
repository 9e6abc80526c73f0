"""Broken and odd data end in success or in one line; the long campaign is tests/fuzz.py."""

from __future__ import annotations

import pytest
from broken_files import CORPUS
from fuzz import Campaign, generated


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch):
    """What the campaign calls a hang may be no more than a machine that does much else."""
    monkeypatch.setattr("fuzz.HANG_S", 300)


@pytest.mark.parametrize("name", CORPUS)
def test_a_broken_file_is_one_line_or_no_harm(tmp_path, name):
    campaign = Campaign(tmp_path)
    campaign.run(name, None, "prepare")
    assert campaign.failures == []


def test_generated_logs_are_one_line_or_no_harm(tmp_path):
    campaign = Campaign(tmp_path)
    generated(campaign, 150, number=1)
    assert campaign.failures == []
    assert campaign.ends["success"]
    assert campaign.ends["one line"]


def test_the_campaign_notices_a_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr("fuzz.read_source", broken)
    campaign = Campaign(tmp_path)
    campaign.run("nothing", None, "reader")
    assert campaign.ends == {"traceback": 1}
