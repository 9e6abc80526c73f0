"""`data prepare` killed at any instant: run again it ends with the same bytes."""

from __future__ import annotations

from benchmarks.kills import prepare_campaign


def test_prepare_killed_at_random_instants_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = prepare_campaign(tmp_path, kills=3, seed=0, interactions=40_000)
    assert found["kills"] >= 3
    assert found["mismatches"] == 0 and found["set_aside"] == []
