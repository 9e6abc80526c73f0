"""The stage `evidence`: a ranker of states, the memory of its training prefixes, and their weights.

The ranker is trained by full-catalogue cross-entropy after every item of a sequence (Eq. 14 with
the whole catalogue as candidates). The memory holds one row a training prefix. How evidence is
weighed is the choice of validation users, one setting after the other.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from streamctl.baselines.base import shifted_targets
from streamctl.baselines.objectives import catalogue_cross_entropy
from streamctl.baselines.train import whole_sequences
from streamctl.config import EvidenceConfig, resolve
from streamctl.data import Examples, Split
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker
from streamctl.device import derive_seed, resolve_device
from streamctl.evaluation.evaluate import evaluate, sample_users
from streamctl.evaluation.metrics import gains
from streamctl.model.policy import SIZES
from streamctl.model.ranker import RankerShape, StateRanker, states_of
from streamctl.progress import say
from streamctl.retrieval.memory import Memory
from streamctl.runs import RunDir, Stage
from streamctl.training.loop import Batch, fit
from streamctl.training.material import Material

WEIGHTS = "model.safetensors"
AFTER = 4  # items kept of what a prefix's user took next
RECENT = 20  # items kept of the prefix itself
VALIDATION_USERS = 2000
TEMPERATURES = (0.1, 0.25, 0.5)
DECAYS = (0.0, 0.5)
STRENGTHS = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
MOVES = (0.0, 0.3, 1.0)
REPEATS = (1.0, 0.0, -1.0, -2.0, -4.0, -8.0)


def ranker_shape(config: EvidenceConfig, vocabulary: int) -> RankerShape:
    """The ranker of a named size (DESIGN, Commands)."""
    layers, _, width, heads, _, _ = SIZES[config.size]
    return RankerShape(vocabulary, width, heads, layers, config.dropout, config.input_dropout)


def build_memory(ranker: StateRanker, split: Split, kind: str) -> Memory:
    """One row for every training prefix; no validation or test item is in any."""
    train = split.train
    keys = states_of(ranker, train.lengths, train.histories)
    return Memory(keys, taken_next(train), train.users, recent_items(train), kind)


def taken_next(train: Examples) -> np.ndarray:
    """(E, AFTER) int32: the target of each prefix and the same user's later *training* targets."""
    targets, users = train.targets, train.users
    rows = np.arange(len(train))[:, None] + np.arange(AFTER)
    inside = rows < len(train)
    rows = np.minimum(rows, len(train) - 1)
    return np.where(inside & (users[rows] == users[:, None]), targets[rows], -1).astype(np.int32)


def recent_items(train: Examples) -> np.ndarray:
    """(E, RECENT) int32: the last items of each prefix, latest first, -1 where it is shorter."""
    places = train.end[:, None] - 1 - np.arange(RECENT)
    inside = places >= train.start[:, None]
    return np.where(inside, train.items[np.maximum(places, 0)], -1).astype(np.int32)


def had(history: torch.Tensor) -> torch.Tensor:
    """(B * H, H): the items up to each position of each history (B, H), -1 after it."""
    length = history.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=history.device).triu(1)
    return history[:, None, :].expand(-1, length, -1).masked_fill(later, -1).flatten(0, 1)


def evidence(
    run: RunDir, config: EvidenceConfig, *, device: str = "auto", force: bool = False
) -> Stage:
    """Train the ranker, fill the memory, and choose on validation how evidence is weighed.

    Writes the weights, the memory's arrays and report.json: the settings, validation ndcg@10 for
    0..look_ups look-ups and the best number of them, and the memory's size and latency.
    """
    with run.begin("evidence", config, ["data", "tokenizer"], force=force) as stage:
        if stage is None:
            say("evidence: complete already")
            return run.stage("evidence")
        where = resolve_device(device)
        material = Material.load(run)
        split = material.split
        shape = ranker_shape(config, material.ids.tokens().size)
        seed = derive_seed(config.seed, "initial weights")
        ranker = StateRanker.build(shape, material.item_tokens, seed).to(where)
        windows = whole_sequences(split.train, split.history)
        mean_length = windows.lengths.mean()
        sample = sample_users(split.valid, VALIDATION_USERS, config.seed)

        def loss(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            vectors = ranker.item_vectors()
            states = ranker(batch.history, vectors).flatten(0, 1)
            targets = shifted_targets(batch.history, batch.target).flatten()
            value = catalogue_cross_entropy(
                states, vectors, targets, marked=had(batch.history), bonus=ranker.repeat
            )
            # Every position counts the same, whether its sequence is long or short.
            return value * (batch.history.shape[1] / mean_length), {}

        def validate() -> dict[str, float]:
            direct = EvidenceThinker(ranker, None, EvidenceSettings(), look_ups=0)
            found = evaluate(direct, sample, n_items=split.n_items, masked=True).metrics
            return {key: found[key] for key in ("recall@10", "ndcg@10")}

        result = fit(
            stage, ranker, loss=loss, examples=windows, epochs=config.epochs, batch=config.batch,
            lr=config.lr, weight_decay=config.weight_decay, warmup=config.warmup,
            patience=config.patience, validate=validate, seed=config.seed, device=where,
            title="evidence",
        )  # fmt: skip
        memory = build_memory(ranker, split, config.index)
        settings, chosen = choose(ranker, memory, config, sample)
        counts = range(1, config.look_ups + 1)  # none at all is the row evidence_l0
        best = max(counts, key=lambda count: chosen[f"{count} look-ups"]["ndcg@10"])
        report = {
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "settings": asdict(settings),
            "look_ups": best,
            "valid": chosen,
            "memory": {"rows": len(memory), "bytes": memory.bytes, "index": memory.kind},
        }
        weights = {name: tensor.cpu() for name, tensor in ranker.state_dict().items()}
        stage.save_tensors(WEIGHTS, weights)
        for name, array in memory.arrays().items():
            stage.save_array(f"{name}.npy", array)
        stage.save_json("report.json", report)
        stage.publish(**report, search_ms=_latency(memory, settings.neighbours))
        shown = ", ".join(f"{name} {found['ndcg@10']:.4f}" for name, found in chosen.items())
        say(f"evidence: ndcg@10 on validation users: {shown}")
    return run.stage("evidence")


def load_thinker(
    run: RunDir,
    device: torch.device,
    *,
    look_ups: int | None = None,
    random: int | None = None,
    material: Material | None = None,
) -> EvidenceThinker:
    """The thinker of a complete `evidence` stage.

    Args:
        look_ups: l; None for as many, one or more, as ranked best on validation.
        random: see `EvidenceThinker`.
    """
    from safetensors.torch import load_file

    stage = run.require("evidence")
    config = resolve(EvidenceConfig, base=stage.manifest["config"])
    material = material or Material.load(run)
    shape = ranker_shape(config, material.ids.tokens().size)
    ranker = StateRanker(shape, material.item_tokens)
    ranker.load_state_dict(load_file(stage.file(WEIGHTS)))
    report = stage.json("report.json")
    return EvidenceThinker(
        ranker.to(device).eval(), Memory.load(stage.path, config.index),
        EvidenceSettings(**report["settings"]),
        look_ups=report["look_ups"] if look_ups is None else look_ups, random=random,
    )  # fmt: skip


def choose(
    ranker: StateRanker, memory: Memory, config: EvidenceConfig, examples: Examples
) -> tuple[EvidenceSettings, dict[str, dict[str, float]]]:
    """Settings by ndcg@10 of validation users, and that figure for 0..l look-ups.

    Repeats first, on the state alone; then what is compared, temperature, decay and weight, with
    one look-up; then how far the state moves, with all of them; then the weight again.
    """
    bench = _Bench(ranker, memory, config, examples)
    settings = EvidenceSettings(neighbours=config.neighbours, weight=0.0)
    settings = bench.best(settings, 0, [{"repeat": value} for value in REPEATS])
    grid = [
        {"by": by, "temperature": t, "decay": d, "weight": w}
        for by in ("items", "state")
        for t in TEMPERATURES
        for d in DECAYS
        for w in STRENGTHS
    ]
    settings = bench.best(settings, 1, grid)
    settings = bench.best(settings, config.look_ups, [{"move": value} for value in MOVES])
    settings = bench.best(settings, config.look_ups, [{"weight": value} for value in STRENGTHS])
    found = {
        f"{count} look-ups": {"ndcg@10": bench.score(settings, count)}
        for count in range(config.look_ups + 1)
    }
    return settings, found


class _Bench:
    """Validation users whose states and look-ups are computed once for many settings."""

    def __init__(
        self, ranker: StateRanker, memory: Memory, config: EvidenceConfig, examples: Examples
    ):
        self.ranker, self.memory, self.config, self.examples = ranker, memory, config, examples
        device = ranker.item_tokens.device
        rows = np.arange(len(examples))
        states = states_of(ranker, examples.lengths, examples.histories)
        self.states = torch.from_numpy(states).to(device)
        self.history = torch.from_numpy(examples.histories(rows)).to(device)
        self.targets = torch.from_numpy(examples.targets).to(device)
        self.asked: dict[Any, Any] = {}

    def best(
        self, settings: EvidenceSettings, count: int, changes: list[dict[str, Any]]
    ) -> EvidenceSettings:
        """The change of highest ndcg@10, the first among equals."""
        tried = [EvidenceSettings(**(asdict(settings) | change)) for change in changes]
        return max(tried, key=lambda candidate: self.score(candidate, count))

    def score(self, settings: EvidenceSettings, count: int) -> float:
        thinker = EvidenceThinker(self.ranker, self.memory, settings, look_ups=count)
        # Where the state does not move, the rows found depend on nothing but their number.
        path = (settings.decay, settings.move) if settings.move else ()
        key = (count, settings.by, settings.temperature, *path)
        if key not in self.asked:
            self.asked = {key: thinker.think(self.states, self.history, self.examples.users)}
        trace = self.asked[key]
        ranks = []
        for start in range(0, len(self.states), 500):
            rows = slice(start, start + 500)
            part = type(trace)(
                tuple(type(x)(x.rows[rows], x.weights[rows]) for x in trace.look_ups),
                trace.states[rows],
            )
            scores = thinker.log_scores(self.history[rows], part)
            wanted = scores.gather(1, self.targets[rows, None])
            ranks.append((scores > wanted).sum(1).cpu().numpy())
        return float(gains(np.concatenate(ranks), 10).mean())


def _latency(memory: Memory, k: int) -> float:
    """Milliseconds of one look-up for one query alone."""
    queries = memory.keys[:8]
    memory.search(queries[:1], k)
    began = time.perf_counter()
    for number in range(len(queries)):
        memory.search(queries[number : number + 1], k)
    return round(1000 * (time.perf_counter() - began) / max(len(queries), 1), 3)
