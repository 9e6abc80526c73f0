"""The stage `evidence`: a ranker of states, the memory of its training prefixes, and their weights.

The ranker is trained by full-catalogue cross-entropy after every item of a sequence (Eq. 14 with
the whole catalogue as candidates). The memory holds one row a training prefix. What is asked of it
is the choice of validation users (`thought.py`), who also train the reader of what is found
(`reading.py`).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from streamctl.baselines.base import shifted_targets
from streamctl.baselines.objectives import catalogue_cross_entropy
from streamctl.baselines.train import whole_sequences
from streamctl.config import EvidenceConfig, resolve, to_dict
from streamctl.data import Examples, Split
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker, Question
from streamctl.decode.questions import LookAlikes
from streamctl.decode.reader import Reader
from streamctl.device import derive_seed, resolve_device
from streamctl.errors import StreamctlError
from streamctl.evaluation.evaluate import evaluate, sample_users
from streamctl.model.policy import SIZES
from streamctl.model.ranker import RankerShape, StateRanker, states_of
from streamctl.progress import say
from streamctl.retrieval.memory import Memory
from streamctl.runs import RunDir, Stage, StageWriter
from streamctl.training.loop import Batch, fit
from streamctl.training.material import Material
from streamctl.training.reading import Reading, learn
from streamctl.training.thought import Chooser, best_length, choose, surely

WEIGHTS = "model.safetensors"
READER, WIDE_READER = "reader.safetensors", "wide_reader.safetensors"  # where readers help
TEXTS = "item_vectors.npy"  # of the tokenizer stage
AFTER = 4  # items kept of what a prefix's user took next
RECENT = 20  # items kept of the prefix itself
VALIDATION_USERS = 2000  # that pick the epoch
CHOOSING_USERS = 10_000  # that choose the thought
READING_USERS = 25_000  # that train the reader
LOOK_ALIKES = 10  # items that a question takes an item to be like
OF_THE_THOUGHT = ("look_ups", "neighbours", "index", "reader")  # settings that no weight depends on
_TIMED = 32  # users of the latency


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


@dataclass(frozen=True)
class Trained:
    """What is left of the last training, to choose another thought for the same ranker.

    Attributes:
        weights: by name.
        records: of metrics.jsonl.
        report: of the stage.
        wall_s: seconds that it took.
    """

    weights: dict[str, torch.Tensor]
    records: list[dict[str, Any]]
    report: dict[str, Any]
    wall_s: float

    @classmethod
    def found(cls, run: RunDir, config: EvidenceConfig) -> Trained | None:
        """Of a complete, undamaged stage that was trained with these settings on this data."""
        from safetensors.torch import load_file

        stage = run.stage("evidence")
        if not stage.complete or stage.stale_parents():
            return None
        old, new = stage.manifest["config"], json.loads(json.dumps(to_dict(config)))
        if any(old.get(key) != value for key, value in new.items() if key not in OF_THE_THOUGHT):
            return None
        try:
            stage.verify()
        except StreamctlError:
            return None
        lines = (stage.path / "metrics.jsonl").read_text().splitlines()
        return cls(
            load_file(stage.file(WEIGHTS)),
            [json.loads(line) for line in lines],
            stage.json("report.json"),
            stage.manifest["wall_s"],
        )

    def fits(self, ranker: StateRanker) -> bool:
        """Whether the weights are of this version's ranker."""
        wanted = {name: tensor.shape for name, tensor in ranker.state_dict().items()}
        return wanted == {name: tensor.shape for name, tensor in self.weights.items()}

    def take_over(self, stage: StageWriter, ranker: StateRanker) -> dict[str, int]:
        """Put the weights into the ranker and the records into the stage; the epochs trained."""
        say("evidence: trained already with these settings; the thought is chosen again")
        ranker.load_state_dict(self.weights)
        ranker.eval()
        for record in self.records:
            stage.log(**record)
        stage.earlier_s += self.wall_s
        return {key: self.report[key] for key in ("epochs", "best_epoch")}


def look_alikes(material: Material) -> LookAlikes:
    """The few items most like each by their texts."""
    return LookAlikes(material.neighbours[:, :LOOK_ALIKES])


def had(history: torch.Tensor) -> torch.Tensor:
    """(B * H, H): the items up to each position of each history (B, H), -1 after it."""
    length = history.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=history.device).triu(1)
    return history[:, None, :].expand(-1, length, -1).masked_fill(later, -1).flatten(0, 1)


def evidence(
    run: RunDir, config: EvidenceConfig, *, device: str = "auto", force: bool = False
) -> Stage:
    """Train the ranker, fill the memory, and choose on validation how evidence is weighed.

    Writes the weights, the memory's arrays, the reader if it helps, and report.json: the settings,
    validation ndcg@10 for 0..look_ups look-ups and the best number of them (with a reader those of
    users that it was not trained on, and `summed` those without it), and the memory's size and
    latency. Made again (`force`) with other settings of the thought alone, it does not train again.
    """
    trained = Trained.found(run, config)
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
            direct = EvidenceThinker(ranker, None, EvidenceSettings(repeat=ranker.repeat.item()))
            found = evaluate(direct, sample, n_items=split.n_items, masked=False).metrics
            return {key: found[key] for key in ("recall@10", "ndcg@10")}

        if trained is None or not trained.fits(ranker):
            result = fit(
                stage, ranker, loss=loss, examples=windows, epochs=config.epochs,
                batch=config.batch, lr=config.lr, weight_decay=config.weight_decay,
                warmup=config.warmup,
                patience=config.patience, validate=validate, seed=config.seed, device=where,
                title="evidence",
            )  # fmt: skip
            epochs = {"epochs": result.epochs, "best_epoch": result.best_epoch}
        else:
            epochs = trained.take_over(stage, ranker)
        memory = build_memory(ranker, split, config.index)
        chooser = Chooser(
            ranker, memory, look_alikes(material),
            sample_users(split.valid, CHOOSING_USERS, config.seed),
            neighbours=config.neighbours, look_ups=config.look_ups,
        )  # fmt: skip
        settings, chosen = choose(chooser)
        if config.reader:
            thinker = EvidenceThinker(ranker, memory, settings, chooser.thinker.look_alikes)
            texts = run.stage("tokenizer").array(TEXTS)
            chosen |= _read(stage, thinker, split, texts, chosen["wide"], config.seed)
        report = {
            **epochs,
            "settings": asdict(settings),
            **chosen,
            "memory": {"rows": len(memory), "bytes": memory.bytes, "index": memory.kind},
        }
        stage.save_tensors(WEIGHTS, _parameters(ranker))
        for name, array in memory.arrays().items():
            stage.save_array(f"{name}.npy", array)
        stage.save_json("report.json", report)
        stage.publish(**report, search_ms=_latency(chooser.thinker, settings, split.valid))
        shown = ", ".join(f"{name} {row['ndcg@10']:.4f}" for name, row in chosen["valid"].items())
        say(f"evidence: ndcg@10 on validation users: {shown}")
    return run.stage("evidence")


def _read(
    stage: StageWriter,
    thinker: EvidenceThinker,
    split: Split,
    texts: np.ndarray,
    wide: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Train the readers of the thought and of the wide look-up; save both if the thought's helps.

    Returns:
        what changes in the report: `valid`, `summed`, `look_ups` and `wide`; without a sure gain
        `read` says what the reader would have had.
    """
    users = sample_users(split.valid, READING_USERS, seed)

    def reading_of(settings: EvidenceSettings) -> Reading:
        own = EvidenceThinker(thinker.ranker, thinker.memory, settings, thinker.look_alikes)
        return learn(own, users, texts, split.popularity(), seed)

    reading = reading_of(thinker.settings)
    read, summed = (
        {f"{count} look-ups": {"ndcg@10": float(row.mean())} for count, row in enumerate(gained)}
        for gained in (reading.gained, reading.summed)
    )
    length = best_length(reading.gained)
    if surely(reading.gained[length] - reading.summed[length]) <= 0:
        return {"valid": summed, "read": read}
    one = replace(thinker.settings, questions=(Question(**wide["question"]),))
    of_the_wide = reading_of(one)
    stage.save_tensors(READER, _parameters(reading.reader))
    stage.save_tensors(WIDE_READER, _parameters(of_the_wide.reader))
    return {
        "valid": read,
        "summed": summed,
        "look_ups": length,
        "wide": wide | {"ndcg@10": float(of_the_wide.gained[-1].mean())},
    }


def _parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def load_thinker(
    run: RunDir,
    device: torch.device,
    *,
    look_ups: int | None = None,
    random: int | None = None,
    wide: bool = False,
    material: Material | None = None,
) -> EvidenceThinker:
    """The thinker of a complete `evidence` stage.

    Args:
        look_ups: l; None for as many, one or more, as were chosen on validation.
        random: see `EvidenceThinker`.
        wide: one look-up with the rows of all: the control.

    Raises:
        StreamctlError: the stage is missing, stale or damaged, or another version's.
    """
    stage = run.require("evidence")
    config = resolve(EvidenceConfig, base=stage.manifest["config"])
    material = material or Material.load(run)
    ranker = StateRanker(ranker_shape(config, material.ids.tokens().size), material.item_tokens)
    _load(ranker, stage, WEIGHTS)
    report = stage.json("report.json")
    settings = EvidenceSettings.of(report["settings"])
    if wide:
        settings = replace(settings, questions=(Question(**report["wide"]["question"]),))
    elif look_ups is None:
        look_ups = report["look_ups"]
    reader = None
    if READER in stage.manifest["artifacts"]:
        texts = torch.from_numpy(run.stage("tokenizer").array(TEXTS))
        popularity = torch.from_numpy(material.split.popularity())
        reader = Reader(len(settings.questions), texts, popularity)
        _load(reader, stage, WIDE_READER if wide else READER)
        reader.to(device).eval()
    return EvidenceThinker(
        ranker.to(device).eval(), Memory.load(stage.path, config.index), settings,
        look_alikes(material), look_ups=look_ups, random=random, reader=reader,
    )  # fmt: skip


def _load(module: torch.nn.Module, stage: Stage, name: str) -> None:
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(stage.file(name)))
    except RuntimeError as error:  # torch's, where tensors have other names or shapes
        raise StreamctlError(
            "the weights are not those of this version's thinker",
            where=stage.file(name),
            run=stage.run.again("evidence"),
        ) from error


def _latency(thinker: EvidenceThinker, settings: EvidenceSettings, examples: Examples) -> float:
    """Milliseconds of one look-up for one user alone, the thought's questions together."""
    asked = EvidenceThinker(thinker.ranker, thinker.memory, settings, thinker.look_alikes)
    device = thinker.vectors.device
    began = time.perf_counter()
    for number in range(_TIMED + 1):
        if number == 1:  # the first one compiles
            began = time.perf_counter()
        row = np.array([number % len(examples)])
        history = torch.from_numpy(examples.histories(row)).to(device)
        start = thinker.ranker.states(history)
        asked.think(start, history, examples.users[row])
    spent = time.perf_counter() - began
    return round(1000 * spent / _TIMED / max(1, len(settings.questions)), 3)
