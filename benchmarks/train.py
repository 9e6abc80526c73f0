"""Speed of training beside transformers on the same weights.

    python benchmarks/train.py --json [--save] [--only step] [--clock cpu] [--device cuda]

A step is forward, backward, gradient clipping and fused AdamW at batch 256 under bf16 autocast,
with dropout. `step/padded`: the peer pads random batches to their longest history, we take
exact-length batches; `step/bucketed`: both take the same exact-length batches; `step/catalogue`:
the same, our codes normalised over the catalogue as is our default, the peer's over the vocabulary
still. transformers drops out in more places (attention weights, inside the feed-forward): it runs
as it is and with dropout only where ours is, and the ratio is to the faster. `.../vs-plain` is the
same step without our fused element-wise loops. `step/evidence` is pretraining's step on pieces of
the users' evidence, `step/weighing` SFT's, each beside a step of the same lengths whose thoughts
are plain tokens: `cost` is how many times as long ours takes. `sasrec/epoch` is an epoch of SASRec
with full cross-entropy beside RecTools' (pip install 'rectools[torch]'), on sequences as long as
Beauty's.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import peers
import torch
from torch import nn

from streamctl import checkpoint
from streamctl.baselines.sasrec import SASRec
from streamctl.config import AnnotateConfig, BaselineConfig, PretrainConfig, SftConfig
from streamctl.distributed import Share
from streamctl.model import Policy, fused
from streamctl.training import sft
from streamctl.training.gathered import Gathered, first_pieces, last_positions
from streamctl.training.loop import CLIP_NORM, Batch, batches
from streamctl.training.losses import answer_loss
from streamctl.training.pretrain import direct_loss, pretrain_loss

BATCH = 256
EVIDENCE = ("step/evidence", "step/weighing")
SASREC_USERS = 2048
SASREC = {"dim": 64, "layers": 2, "heads": 2, "dropout": 0.3, "batch": 128}


def batch_of(lengths: np.ndarray, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(peers.ITEMS, (len(lengths),), generator=generator)
    return peers.histories(lengths, seed).to(device), targets.to(device)


def learner(model: nn.Module, loss, device: str):
    """One optimiser step of a model on a batch."""
    optimizer = checkpoint.adamw(model.parameters(), 1e-3, 0.05)

    def step(*batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with peers.bf16(device):
            value = loss(*batch)
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


def plain(step):
    """The step with residuals, norms, dropout and softmax as plain torch has them."""

    def run(*batch) -> None:
        before, fused._compiled = fused._compiled, lambda x: False
        try:
            step(*batch)
        finally:
            fused._compiled = before

    return run


def step_rows(device: str, repeats: int, only: str, now, count: int) -> list[dict]:
    lengths, _ = peers.real_lengths()
    random = np.random.default_rng(2)
    order = batches(lengths, BATCH, 0, 0)
    sizes = np.array([len(rows) for rows in order])
    chosen = random.choice(len(order), count, p=sizes / sizes.sum())
    exact = [batch_of(lengths[order[i]], int(i), device) for i in chosen]
    mixed = [batch_of(random.choice(lengths, BATCH), 1000 + i, device) for i in range(count)]
    policy = peers.paper_policy(device)
    peer = "transformers, bf16 autocast"
    theirs = {
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
    by_plain = {"plain torch": plain(ours[policy])}
    for case, model, peer_steps, data, work in (
        ("step/padded", policy, theirs, mixed, done["mixed"]),
        ("step/bucketed", policy, theirs, exact, done["exact"]),
        ("step/bucketed/vs-plain", policy, by_plain, exact, done["exact"]),
        ("step/catalogue", default, theirs, exact, done["exact"]),
    ):
        if not case.startswith(only):
            continue
        turns = {"streamctl": over(ours[model], exact)}
        turns |= {name: over(step, data) for name, step in peer_steps.items()}
        seconds = peers.take_turns(turns, repeats, now)
        seconds["streamctl"] *= work / done["exact"]  # per sequence: our batches are others
        line = peers.row(case, seconds, work, "sequences/s", batches=count)
        found.append(line | {"peak_mb": peers.peak_mb(turns)})
    return found


def evidence_rows(device: str, repeats: int, now, count: int, **sizes) -> list[dict]:
    """`step/evidence` and `step/weighing`; `sizes` are `peers.paper_policy`'s."""
    split, evidence = peers.shop()
    config, annotated = PretrainConfig().settled(), AnnotateConfig()
    rows = last_positions(split.train, annotated.positions)
    gathered = Gathered(evidence, split.train.subset(rows))
    examples = gathered.examples
    gathered(np.arange(1))  # kept in memory, as after the first step of a training
    retrieved = first_pieces(evidence, examples, config.neighbours)
    held = torch.from_numpy(np.isin(rows, last_positions(split.train, config.hold)))
    labels = torch.zeros(len(rows), annotated.length, dtype=torch.int64)
    policy, plain, thinker = (
        peers.paper_policy(device, "items", softmax="catalogue", thoughts="evidence", **sizes)
        for _ in range(3)
    )
    tuner = sft.Tuner(sft.only_thinking(thinker), gathered, labels, held, SftConfig())

    def without(batch: Batch) -> torch.Tensor:
        """Pretraining's step, a token in the place of each piece."""
        encoded = plain.encode(batch.history)
        pieces = torch.randint(config.neighbours, (), generator=batch.generator("retrieved")) + 1
        think = batch.target[:, None].expand(-1, int(pieces)) % plain.tokens.size
        hidden = plain.decode(encoded, plain.target_inputs(batch.target, think)[0])
        answer = answer_loss(plain, hidden, batch.target)
        return answer + direct_loss(plain, batch, encoded)

    def with_pieces(batch: Batch) -> torch.Tensor:
        return pretrain_loss(policy, batch, retrieved, config)[0]

    order = sorted(batches(examples.lengths, BATCH, 0, 0), key=len)[-count:]
    data = []
    for number, index in enumerate(order):
        history = torch.from_numpy(examples.histories(index)).to(device)
        user, target = (
            torch.from_numpy(examples.users[index]),
            torch.from_numpy(examples.targets[index].astype(np.int64)).to(device),
        )
        share = Share.whole(len(index))
        row = torch.from_numpy(index)
        data.append(Batch(row, history, target, user, target, share, seed=number, epoch=0))
    steps = {
        "step/evidence": learner(policy.train(), with_pieces, device),
        "step/weighing": learner(thinker, lambda batch: tuner.loss(batch)[0], device),
        "plain": learner(plain.train(), without, device),
    }
    turns = {
        name: lambda step=step: [step(batch) for batch in data] for name, step in steps.items()
    }
    seconds = peers.take_turns(turns, repeats, now)
    done, found = sum(map(len, data)), []
    for case in EVIDENCE:
        both = {"streamctl": seconds[case], "the same lengths without evidence": seconds["plain"]}
        cost = seconds[case] / seconds["plain"]
        found.append(peers.row(case, both, done, "sequences/s", cost=cost, goal=1.3))
    return found


def sequences() -> list[list[int]]:
    """Items of the first users of Beauty, each once in a while; random ones where it is not."""
    lengths, _ = peers.real_lengths()
    random = np.random.default_rng(3)
    longest = np.minimum(random.choice(lengths, SASREC_USERS) + 2, peers.LONGEST + 1)
    return [random.permutation(peers.ITEMS)[:n].tolist() for n in longest]


def our_epoch(users: list[list[int]]):
    """An epoch of our SASRec with cross-entropy, over whole sequences of one length a batch."""
    shape = SimpleNamespace(n_items=peers.ITEMS, history=peers.LONGEST)
    config = BaselineConfig("sasrec", **SASREC, loss="ce")
    model = SASRec(config, shape).train()
    optimizer = checkpoint.adamw(model.parameters(), 1e-3, 0.0)
    order = batches(np.array([len(items) for items in users]), SASREC["batch"], 0, 0)

    def epoch() -> None:
        for rows in order:
            table = torch.tensor([users[row] for row in rows])
            batch = SimpleNamespace(history=table[:, :-1], target=table[:, -1])
            optimizer.zero_grad(set_to_none=True)
            model.training_loss(batch)[0].backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()

    return epoch


def rectools_epoch(users: list[list[int]]):
    """Seconds of an epoch of RecTools' SASRec of the same shape and loss, by its own trainer."""
    import logging
    import warnings

    import pandas as pd
    import pytorch_lightning as lightning
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    rows = [(user, *pair) for user, items in enumerate(users) for pair in enumerate(items)]
    table = pd.DataFrame(rows, columns=["user_id", "datetime", "item_id"])
    table["datetime"] = pd.to_datetime(table["datetime"], unit="s")
    table["weight"] = 1.0
    dataset = Dataset.construct(table)
    spent = []

    class Watch(lightning.Callback):
        def on_train_epoch_start(self, *_):
            self.began = time.perf_counter()

        def on_train_epoch_end(self, *_):
            spent.append(time.perf_counter() - self.began)

    def trainer():
        return lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[Watch()], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    def epoch() -> float:
        SASRecModel(
            n_blocks=SASREC["layers"], n_heads=SASREC["heads"], n_factors=SASREC["dim"],
            dropout_rate=SASREC["dropout"], session_max_len=peers.LONGEST, loss="softmax",
            lr=1e-3, batch_size=SASREC["batch"], epochs=1, get_trainer_func=trainer,
        ).fit(dataset)  # fmt: skip
        return spent[-1]

    return epoch


def sasrec_row(repeats: int) -> dict:
    """`sasrec/epoch`: the peer's epoch without its preparation; none where it is not installed."""
    users = sequences()
    ours = our_epoch(users)
    ours()  # imports and allocations
    work = sum(map(len, users)) - len(users)  # positions that are predicted
    times: dict[str, list[float]] = {"streamctl": []}
    more = {"items": peers.ITEMS, "users": len(users), "clock": "wall", **SASREC}
    try:
        theirs = rectools_epoch(users)
        times[f"RecTools {version('rectools')}"] = []
    except ImportError as error:
        theirs, more = None, more | {"peer_missing": str(error)}
    for _ in range(repeats):
        began = time.perf_counter()
        ours()
        times["streamctl"].append(time.perf_counter() - began)
        if theirs:
            times[next(reversed(times))].append(theirs())
    seconds = {name: float(np.median(found)) for name, found in times.items()}
    return peers.row("sasrec/epoch", seconds, work, "positions/s", **more)


def rows(
    device: str = "cpu", repeats: int = 5, only: str = "", clock: str = "wall", count: int = 2
) -> list[dict]:
    """The receipt's rows; also called by benchmarks/gpu.py."""
    now = peers.clock(clock, device)
    found = []
    if "step".startswith(only[:4]) and only not in EVIDENCE:
        found += step_rows(device, repeats, only, now, count)
    if any(case.startswith(only) for case in EVIDENCE):
        found += evidence_rows(device, repeats, now, count)
    if device == "cpu" and "sasrec/epoch".startswith(only):
        found.append(sasrec_row(min(repeats, 3)))
    return found


if __name__ == "__main__":
    peers.run("train", __doc__.splitlines()[0], rows)
