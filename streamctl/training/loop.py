"""The training loop of every supervised stage and of the trained baselines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from streamctl.device import autocast, derive_seed, resolve_device
from streamctl.distributed import Share, ranks
from streamctl.errors import StreamctlError
from streamctl.progress import progress_bar
from streamctl.training import checkpoint

if TYPE_CHECKING:
    from streamctl.data.split import Examples
    from streamctl.runs import StageWriter

CHECKPOINT_EVERY_S = 60.0
CLIP_NORM = 1.0
TENSORBOARD = "STREAMCTL_TENSORBOARD"


@dataclass(frozen=True)
class Batch:
    """Examples of one history length, on the training device: this process's share of a batch.

    `seed` belongs to this step alone: all randomness of the loss derives from it, or from
    torch's global generator, which is seeded with it just before the loss is called.
    """

    index: torch.Tensor  # (B,) int64: rows of the examples
    history: torch.Tensor  # (B, H) int64 item indexes, oldest first, nothing padded
    target: torch.Tensor  # (B,) int64
    user: torch.Tensor  # (B,) int64
    targets: torch.Tensor  # (T,) int64 of the whole batch; T = B in a single process
    share: Share
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.target)

    def generator(self, what: str) -> torch.Generator:
        """A CPU generator that belongs to this step and this purpose, the same on every rank."""
        return torch.Generator().manual_seed(derive_seed(self.seed, what))


@dataclass
class FitResult:
    """Metrics of the best epoch, which epoch it was (from 0), and how many were run."""

    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = -1
    epochs: int = 0


class MetricLog:
    """metrics.jsonl, and TensorBoard events when the environment sets STREAMCTL_TENSORBOARD=1.

    The events go to the stage's `tensorboard/` folder, which is no artifact.

    Raises:
        StreamctlError: events are asked for and the tensorboard package is not installed.
    """

    def __init__(self, stage: StageWriter):
        self._stage = stage
        self._events = None
        if ranks().main and os.environ.get(TENSORBOARD, "0") not in ("", "0"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise StreamctlError(
                    f"{TENSORBOARD} is set but tensorboard is not installed",
                    run="pip install tensorboard",
                ) from error
            self._events = SummaryWriter(str(stage.path / "tensorboard"))

    def __call__(self, step: int, /, **metrics: Any) -> None:
        self._stage.log(**metrics)
        if self._events is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{self._stage.name}/{name}", value, step)
            self._events.flush()


def batches(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches: rows of equal history length, in a seeded random order.

    Args:
        lengths: (E,) history length of each example.
        batch: rows a batch; the last batch of a length is smaller.
        seed, epoch: what the order depends on, and nothing else.

    Returns:
        arrays of rows, int64; together every row once.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    order = random.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    parts = [
        bucket[start : start + batch]
        for bucket in np.split(order, cuts)
        for start in range(0, len(bucket), batch)
    ]
    return [parts[number] for number in random.permutation(len(parts))]


def learning_rate(step: int, steps: int, lr: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of all steps, then a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return lr * (step + 1) / ramp
    return 0.5 * lr * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


class _Trainer:
    """State of one `fit`: what a checkpoint holds."""

    def __init__(self, stage: StageWriter, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.stage, self.module, self.optimizer = stage, module, optimizer
        self.epoch = self.step = self.total_steps = 0
        self.stopped = False
        self.sums: dict[str, torch.Tensor] = {}
        self.weight = 0.0
        self.best: dict[str, float] = {}
        self.best_epoch = -1
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.saved_at = time.monotonic()

    def add(self, metrics: Mapping[str, torch.Tensor | float], weight: int) -> None:
        """Sum metrics without waiting for the device."""
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach().double() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weight += weight

    def means(self) -> dict[str, float]:
        means = {name: float(total) / self.weight for name, total in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise StreamctlError(
                f"the loss of epoch {self.epoch + 1} is not a finite number",
                where=self.stage.path,
                run="the same command with --set lr=... lower",
            )
        return means

    def keep_best(self, metrics: dict[str, float]) -> None:
        if not self.best or metrics["ndcg@10"] > self.best["ndcg@10"]:
            self.best, self.best_epoch = metrics, self.epoch
            self.best_weights = checkpoint.snapshot(self.module)

    def save(self) -> None:
        tensors = checkpoint.prefixed("module", checkpoint.weights(self.module))
        tensors |= checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer))
        if self.best_weights is not None:
            tensors |= checkpoint.prefixed("best", self.best_weights)
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "total_steps": self.total_steps,
            "stopped": self.stopped,
            "sums": {name: float(value) for name, value in self.sums.items()},
            "weight": self.weight,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }
        self.stage.save_checkpoint(tensors, json.loads(json.dumps(meta)))
        self.saved_at = time.monotonic()

    def load(self, device: torch.device) -> None:
        loaded = self.stage.load_checkpoint()
        if loaded is None:
            return
        tensors, meta = loaded
        checkpoint.restore(self.module, checkpoint.take("module", tensors))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.take("optimizer", tensors))
        self.best_weights = {
            name: tensor.to(device) for name, tensor in checkpoint.take("best", tensors).items()
        } or None
        sums = meta.pop("sums")
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in sums.items()
        }
        for name, value in meta.items():
            setattr(self, name, value)


def fit(
    stage: StageWriter,
    module: nn.Module,
    *,
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor | float]]],
    examples: Examples,
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    warmup: float,
    patience: int,
    validate: Callable[[], dict[str, float]] | None,
    seed: int,
    device: str | torch.device = "auto",
    bf16: bool = True,
    title: str = "training",
    before_epoch: Callable[[int], None] | None = None,
) -> FitResult:
    """Train `module` and leave the best epoch's weights in it.

    Batches hold histories of one length each, so nothing is padded; a batch that came out
    smaller than `batch` counts by its size. AdamW, gradient norm clipped to 1, warm-up and
    cosine over all epochs, bf16 autocast where the device has it. Killed at any time and called
    again with a stage of the same settings, it continues from the last checkpoint (end of an
    epoch, or at most a minute old) and, on the CPU, ends with bit-identical weights. Under torchrun
    each process computes its rows of every batch, and all end with the weights of the whole batch.

    Args:
        stage: receives metrics.jsonl and the checkpoints.
        module: on `device` already or not; parameters with `requires_grad` are trained.
        loss: `Batch -> (loss, metrics to log)`; called in training mode under autocast.
        examples: rows with `.lengths`, `.targets`, `.users` and `.histories(rows)`.
        epochs, batch, lr, weight_decay, warmup: as their names say; warmup is a share of all
            steps.
        patience: epochs without a better `ndcg@10` before stopping; 0 never stops early.
        validate: called after each epoch in evaluation mode without gradients; its `ndcg@10`
            picks the best epoch. Without it the last epoch is kept.
        seed: order and per-step randomness derive from it.
        before_epoch: called with the number (from 0) of an epoch about to start or continue.

    Raises:
        StreamctlError: no examples, or a loss that is not finite.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    if not len(examples):
        raise StreamctlError(
            "there is nothing to train on", run="`streamctl data doctor` shows what was kept"
        )
    module.to(device)
    lengths = np.asarray(examples.lengths)
    steps = len(batches(lengths, batch, seed, 0))
    state = _Trainer(stage, module, checkpoint.adamw(module.parameters(), lr, weight_decay))
    state.load(device)
    log = MetricLog(stage)
    with progress_bar(title, epochs * len(examples), "sequences") as bar:
        bar.start_at(state.epoch * len(examples) + int(state.weight))
        while state.epoch < epochs and not state.stopped:
            if before_epoch is not None:
                before_epoch(state.epoch)
            began = time.monotonic()
            begun_at = state.weight
            module.train()
            rows = batches(lengths, batch, seed, state.epoch)
            for data in _load(examples, rows, state, device, seed):
                rate = learning_rate(state.total_steps, steps * epochs, lr, warmup)
                _step(state, data, loss, rate, batch, device, bf16)
                bar.advance(data.share.total)
                if ranks().agree(time.monotonic() - state.saved_at > CHECKPOINT_EVERY_S):
                    bar.note(f"epoch {state.epoch + 1} loss {state.means()['loss']:.3f}")
                    state.save()
            metrics = state.means()
            rate = (state.weight - begun_at) / max(time.monotonic() - began, 1e-9)
            note = f"epoch {state.epoch + 1} loss {metrics['loss']:.3f}"
            if validate is not None:
                module.eval()
                with torch.no_grad():
                    found = validate()
                metrics |= {f"valid/{name}": value for name, value in found.items()}
                state.keep_best(found)
                state.stopped = 0 < patience <= state.epoch - state.best_epoch
                note += f" ndcg@10 {found['ndcg@10']:.4f}"
            bar.note(note)
            log(
                state.epoch,
                epoch=state.epoch,
                **metrics,
                sequences_per_s=round(rate, 1),
                wall_s=round(stage.wall_s(), 1),
            )
            state.epoch, state.step, state.sums, state.weight = state.epoch + 1, 0, {}, 0.0
            state.save()
    if state.best_weights is not None:
        checkpoint.restore(module, state.best_weights)
    module.eval()
    best_epoch = state.best_epoch if state.best else state.epoch - 1
    return FitResult(state.best, best_epoch, state.epoch)


def _load(
    examples: Examples, rows: list[np.ndarray], state: _Trainer, device: torch.device, seed: int
) -> Iterator[Batch]:
    """The process's share of the epoch's batches, from the current step on."""
    targets, users = np.asarray(examples.targets), np.asarray(examples.users)
    for whole in rows[state.step :]:
        share = ranks().share(len(whole))
        index = share.of(whole)
        arrays = (index, examples.histories(index), targets[index], users[index], targets[whole])
        tensors = (torch.as_tensor(np.ascontiguousarray(a), dtype=torch.int64) for a in arrays)
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        step_seed = derive_seed(seed, "step", state.epoch, state.step)
        yield Batch(*moved, share, step_seed, state.epoch)


def _step(
    state: _Trainer,
    data: Batch,
    loss: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor | float]]],
    rate: float,
    batch: int,
    device: torch.device,
    bf16: bool,
) -> None:
    job, share = ranks(), data.share
    # Dropout differs between ranks: equal masks on all of them would be less noise.
    torch.manual_seed(data.seed if job.main else derive_seed(data.seed, "rank", job.rank))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(device, bf16):
        value, metrics = loss(data)
    (value * (share.weight / batch)).backward()
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    job.sum_gradients(trained)
    nn.utils.clip_grad_norm_(trained, CLIP_NORM)
    state.optimizer.step()
    state.add(job.mean({"loss": value, **metrics}, share), share.total)
    state.step += 1
    state.total_steps += 1
