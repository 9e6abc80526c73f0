"""Speed of training beside transformers on the same weights.

    python benchmarks/train.py --json [--save] [--only step] [--clock cpu] [--device cuda]

A step is forward, backward, gradient clipping and fused AdamW at batch 256 under bf16 autocast,
with dropout. `step/padded`: the peer pads random batches to their longest history, we take
exact-length batches; `step/bucketed`: both take the same exact-length batches; `step/catalogue`:
the same, our codes normalised over the catalogue as is our default, the peer's over the vocabulary
still. transformers drops out in more places (attention weights, inside the feed-forward): it runs
as it is and with dropout only where ours is, and the ratio is to the faster. The RL cases are in
rl_step.py.
"""

from __future__ import annotations

import numpy as np
import peers
import rl_step
import torch
from torch import nn

from streamctl.model import Policy
from streamctl.training import checkpoint
from streamctl.training.loop import CLIP_NORM, batches
from streamctl.training.losses import answer_loss

BATCH = 256


def batch_of(lengths: np.ndarray, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(peers.ITEMS, (len(lengths),), generator=generator)
    return peers.histories(lengths, seed).to(device), targets.to(device)


def learner(model: nn.Module, loss, device: str):
    """One optimiser step of a model on a batch."""
    optimizer = checkpoint.adamw(model.parameters(), 1e-3, 0.05)

    def step(history: torch.Tensor, target: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with peers.bf16(device):
            value = loss(history, target)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

    return step


def our_step(policy: Policy, device: str):
    """Encoder and one decoder, which is what transformers' model has."""
    policy.requires_grad_(True)
    policy.direct.requires_grad_(False)
    policy.thinker.requires_grad_(False)

    def loss(history, target):
        inputs, _ = policy.target_inputs(target)
        return answer_loss(policy, policy.decode(policy.encode(history), inputs), target)

    return learner(policy.train(), loss, device)


def their_step(policy: Policy, device: str, *, same_dropout: bool):
    oracle = peers.transformers_model(policy).train()
    if same_dropout:
        for module in oracle.modules():
            if type(module).__name__ == "T5Attention":
                module.dropout = 0.0
            elif type(module).__name__ == "T5DenseActDense":
                module.dropout.p = 0.0

    def loss(history, target):
        # transformers shifts labels right behind decoder_start_token_id, which BOS stands for.
        inputs, labels = policy.target_inputs(target)
        given = peers.encoder_inputs(policy, history)
        return oracle(**given, decoder_input_ids=inputs, labels=labels).loss

    return learner(oracle, loss, device)


def step_rows(device: str, repeats: int, only: str, now, count: int, limits) -> list[dict]:
    lengths, _ = peers.real_lengths()
    random = np.random.default_rng(2)
    order = batches(lengths, BATCH, 0, 0)
    sizes = np.array([len(rows) for rows in order])
    chosen = random.choice(len(order), count, p=sizes / sizes.sum())
    exact = [batch_of(lengths[order[i]], int(i), device) for i in chosen]
    mixed = [batch_of(random.choice(lengths, BATCH), 1000 + i, device) for i in range(count)]
    policy = peers.paper_policy(device)
    peer = "transformers, bf16 autocast"
    steps = {
        peer: their_step(policy, device, same_dropout=False),
        f"{peer}, our dropout": their_step(policy, device, same_dropout=True),
    }
    default = peers.paper_policy(device, softmax="catalogue")
    ours = {model: our_step(model, device) for model in (policy, default)}

    def over(step, data):
        return lambda: [step(*batch) for batch in data]

    done = {name: sum(len(target) for _, target in data) for name, data in (
        ("exact", exact), ("mixed", mixed))}  # fmt: skip
    found = []
    for case, model, theirs, work in (
        ("step/padded", policy, mixed, done["mixed"]),
        ("step/bucketed", policy, exact, done["exact"]),
        ("step/catalogue", default, exact, done["exact"]),
    ):
        if not case.startswith(only):
            continue
        turns = {"streamctl": over(ours[model], exact)}
        turns |= {name: over(step, theirs) for name, step in steps.items()}
        seconds = peers.take_turns(turns, repeats, now)
        spent = seconds["streamctl"]
        seconds["streamctl"] *= work / done["exact"]  # per sequence: our batches are others
        line = peers.row(case, seconds, work, "sequences/s", batches=count)
        line |= {"peak_mb": peers.peak_mb(turns), "profile": peers.profile(turns["streamctl"])}
        positions = sum(history.numel() for history, _ in exact) * peers.LEVELS
        flops = 3 * peers.product_flops(model, positions, done["exact"] * peers.LEVELS)
        found.append(peers.against_ceiling(line, flops, limits, spent))
    return found


def rows(
    device: str = "cpu",
    repeats: int = 5,
    only: str = "",
    clock: str = "wall",
    count: int = 2,
    limits=None,
) -> list[dict]:
    """The receipt's rows; also called by benchmarks/gpu.py."""
    now = peers.clock(clock, device)
    limits = limits or peers.ceilings(device, now)
    found = (
        step_rows(device, repeats, only, now, count, limits) if "step".startswith(only[:4]) else []
    )
    if not only or only.startswith("rl"):
        found += rl_step.rows(device, repeats, only, now)
    return found


if __name__ == "__main__":
    peers.run("train", __doc__.splitlines()[0], rows)
