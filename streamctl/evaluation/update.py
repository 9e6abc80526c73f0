"""A newer log goes on from an older run: its codes and its weights, with today's counts."""

from __future__ import annotations

from streamctl.baselines.registry import BASELINES, baseline_class
from streamctl.errors import StreamctlError
from streamctl.evaluation.refit import carry, in_order
from streamctl.progress import say
from streamctl.runs import RunDir
from streamctl.tokenizer.extend import extend

POLICIES = ("pretrain", "annotate", "sft", "rl", "baselines/no_thinking", "baselines/tiger")


def update(old: RunDir, run: RunDir) -> list[str]:
    """Take over what an older run has learned, for a run of a newer log.

    Users, interactions and items may have come and gone. Items of both catalogues keep their
    codes, new ones get free ones by their text. Models that read codes and evidence go on with
    their weights; counts and memories are of the new log. Methods with vectors of their own for
    items have to be trained again.

    Args:
        old: with tokenizer and one trained stage or more.
        run: its data stage is complete, and has no tokenizer yet.

    Returns:
        the names of the stages that were made.

    Raises:
        StreamctlError: a stage is missing or stale, or the runs share no item.
    """
    if old.path.resolve() == run.path.resolve():
        raise StreamctlError("a run cannot go on from itself", where=run.path)
    extend(old, run)
    counted = [f"baselines/{name}" for name in BASELINES if not baseline_class(name).losses]
    wanted = [name for name in (*POLICIES, *counted) if old.stage(name).complete]
    made = ["tokenizer"]
    for name in in_order(old, wanted):
        if name not in ("data", "tokenizer"):
            old.require(name)
            carry(old.stage(name), run)
            made.append(name)
    behind = sorted((old.path / "rerank").glob("*/manifest.json"))
    for stage in (old.stage(f"rerank/{path.parent.name}") for path in behind):
        if all(run.stage(parent).complete for parent in stage.manifest["parents"]):
            carry(stage, run)
            made.append(stage.name)
    left = [
        path.parent.name
        for path in sorted((old.path / "baselines").glob("*/manifest.json"))
        if f"baselines/{path.parent.name}" not in made
    ]
    if left:
        say(f"not taken over, for they know single items: {', '.join(left)}; train them again")
    return made
