"""The training loop of every stage and of the trained baselines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from streamctl import checkpoint
from streamctl.device import autocast, derive_seed, resolve_device
from streamctl.distributed import Share, ranks
from streamctl.errors import StreamctlError
from streamctl.progress import progress_bar

if TYPE_CHECKING:
    from streamctl.data.split import Examples
    from streamctl.runs import StageWriter

CHECKPOINT_EVERY_S = 60.0
CLIP_NORM = 1.0
SPREAD = 8  # batches that tell the loss before training
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
    step: int = 0  # training steps before this one, over all epochs
    update: int = 0  # of `repeats` updates on this batch, which one

    def __len__(self) -> int:
        return len(self.target)

    def generator(self, what: str) -> torch.Generator:
        """A CPU generator that belongs to this step and this purpose, the same on every rank."""
        return torch.Generator().manual_seed(derive_seed(self.seed, what))


Loss = Callable[[Batch], tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]]
Schedule = Callable[[int, int, float, float], float]  # as `learning_rate`
Safe = Callable[[Mapping[str, float], Mapping[str, float]], bool]


@dataclass
class FitResult:
    """What was kept, where an epoch may be a part of so many steps."""

    best: dict[str, float] = field(default_factory=dict)  # metrics of the kept weights
    best_epoch: int = -1  # the epoch (from 0) they are of; -1: the start's
    epochs: int = 0  # how many were trained
    steps: int = 0  # of training, in all
    start: dict[str, float] = field(default_factory=dict)  # metrics of a start that is a candidate
    validations: list[dict[str, float]] = field(default_factory=list)  # of each epoch, with `step`
    losses: list[float] = field(default_factory=list)  # before training, means of the epochs


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
    """One epoch's batches: rows (int64) of equal history length, in an order that depends on seed
    and epoch alone; the last batch of a length is smaller. lengths: (E,), of each example."""
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


def constant(step: int, steps: int, lr: float, warmup: float) -> float:
    """The same rate at every step."""
    return lr


class _Trainer:
    """State of one `fit`: what a checkpoint holds."""

    def __init__(self, stage: StageWriter, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.stage, self.module, self.optimizer = stage, module, optimizer
        self.rate = optimizer.param_groups[0]["lr"]  # the highest of the schedule
        self.step = 0
        self.stopped = False
        self.sums: dict[str, torch.Tensor] = {}
        self.weight = 0.0
        self.result = FitResult()
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.saved_at = time.monotonic()

    def add(self, metrics: Mapping[str, torch.Tensor | float], share: Share) -> None:
        """Sum this process's metrics, waiting neither for the device nor for other processes."""
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach().double()
            # Rows that count nothing may have given a loss that is no number.
            value = value * share.weight if share.weight else torch.zeros_like(value)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weight += share.total

    def totals(self) -> dict[str, float]:
        """The sums over all processes."""
        own = np.array([float(value) for value in self.sums.values()])
        return dict(zip(self.sums, ranks().sum(own).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        means = {name: total / self.weight for name, total in self.totals().items()}
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"that of epoch {self.result.epochs + 1} is {means['loss']}")
        return means

    def check(self) -> None:
        """Refuse weights whose loss is far above that before training."""
        first, *epochs = self.result.losses
        kept = self.result.best_epoch if self.result.best else len(epochs) - 1
        if kept >= 0 and epochs[kept] > first + 1 + abs(first) / 2:
            raise self._diverged(f"that of epoch {kept + 1}, the best, is {epochs[kept]:.4g}")

    def _diverged(self, what: str) -> StreamctlError:
        config = self.stage.config
        lower = f"{config.section}.lr={self.rate / 10:g}"
        started = "".join(f"the loss began with {x:.4g}, " for x in self.result.losses[:1])
        return StreamctlError(
            f"training diverged: {started}{what} ({config.section}.lr is {self.rate:g})",
            where=self.stage.path,
            run=self.stage.again([lower]),
        )

    def judge(self, valid: dict[str, float], patience: int, safe: Safe | None) -> None:
        """Keep the weights if they are the best so far; stop after `patience` that are not."""
        result, epoch = self.result, self.result.epochs
        result.validations.append({"step": self.step, **valid})
        allowed = safe is None or safe(valid, result.start)
        if allowed and (not result.best or valid["ndcg@10"] > result.best["ndcg@10"]):
            result.best, result.best_epoch = valid, epoch
            weights = self.module.state_dict()
            self.best_weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.stopped = 0 < patience <= epoch - result.best_epoch

    def save(self) -> None:
        tensors = checkpoint.prefixed("module", self.module.state_dict())
        tensors |= checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer))
        if self.best_weights is not None:
            tensors |= checkpoint.prefixed("best", self.best_weights)
        meta = {
            "step": self.step,
            "stopped": self.stopped,
            "sums": self.totals(),
            "weight": self.weight,
            "result": vars(self.result),
        }
        self.stage.save_checkpoint(tensors, json.loads(json.dumps(meta)))
        self.saved_at = time.monotonic()

    def load(self, device: torch.device) -> bool:
        """Go on from the stage's checkpoint; False where it has none."""
        loaded = self.stage.load_checkpoint()
        if loaded is None:
            return False
        tensors, meta = loaded
        self.module.load_state_dict(checkpoint.take("module", tensors))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.take("optimizer", tensors))
        self.best_weights = {
            name: tensor.to(device) for name, tensor in checkpoint.take("best", tensors).items()
        } or None
        # Sums over all processes: the main one goes on with them, the others from zero.
        self.sums = {
            name: torch.tensor(value * ranks().main, dtype=torch.float64, device=device)
            for name, value in meta["sums"].items()
        }
        self.step, self.stopped, self.weight = meta["step"], meta["stopped"], meta["weight"]
        self.result = FitResult(**meta["result"])
        return True


def fit(
    stage: StageWriter,
    module: nn.Module,
    config: Any,
    *,
    loss: Loss,
    examples: Examples,
    validate: Callable[[], dict[str, float]] | None,
    epochs: int | None = None,
    steps: int | None = None,
    validate_every: int | None = None,
    repeats: int = 1,
    patience: int | None = None,
    start: bool = False,
    safe: Safe | None = None,
    schedule: Schedule = learning_rate,
    device: str | torch.device = "auto",
    bf16: bool = True,
    title: str = "training",
    before_epoch: Callable[[int], None] | None = None,
) -> FitResult:
    """Train `module` and leave the best weights in it.

    Batches hold histories of one length each, so nothing is padded; a batch that came out
    smaller than `config.batch` counts by its size. AdamW, gradient norm clipped to 1, warm-up and
    cosine over all steps, bf16 autocast where the device has it. Killed at any time and called
    again with a stage of the same settings, it continues from the last checkpoint (end of an
    epoch, or at most a minute old) and, on the CPU, ends with bit-identical weights. Under torchrun
    each process computes its rows of every batch, and all end with the weights of the whole batch.

    Args:
        stage: receives metrics.jsonl and the checkpoints.
        module: its parameters with `requires_grad` are trained.
        config: the stage's own: `batch`, `lr` and `seed`, of which order and per-step randomness
            derive; where it has them `epochs`, `patience`, `weight_decay` (else 0) and `warmup`, a
            share of all steps (else 0.05).
        loss: `Batch -> (loss, metrics to log)`; called in training mode under autocast.
        validate: called after each epoch in evaluation mode without gradients; its `ndcg@10`
            picks the best. Without it the last weights are kept.
        steps, validate_every: so many steps instead of epochs, in parts of `validate_every`, each
            of which is logged and judged as an epoch is.
        repeats: updates on each batch, told to the loss by `Batch.update`.
        patience: epochs (or parts) without better weights before stopping, instead of
            `config.patience`; 0 never stops early.
        start: what the module is now is a candidate, too: it ends no worse than it began.
        safe: `(metrics, those of the start) -> whether these weights may be kept`.
        before_epoch: called with the number (from 0) of an epoch about to start or continue.

    Raises:
        StreamctlError: no examples, or a loss that diverged.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    if not len(examples):
        raise StreamctlError(
            "there is nothing to train on", run="`streamctl data doctor` shows what was kept"
        )
    module.to(device)
    patience = getattr(config, "patience", 0) if patience is None else patience
    per_epoch = len(batches(np.asarray(examples.lengths), config.batch, config.seed, 0))
    if steps is None:
        steps = per_epoch * (config.epochs if epochs is None else epochs)
    every = per_epoch if validate_every is None else validate_every
    optimizer = checkpoint.adamw(
        module.parameters(), config.lr, getattr(config, "weight_decay", 0.0)
    )
    state = _Trainer(stage, module, optimizer)
    resumed = state.load(device)
    log = MetricLog(stage)

    def judged() -> dict[str, float]:
        module.eval()
        with torch.no_grad():
            return validate()

    with progress_bar(title, steps, "steps") as bar:
        bar.start_at(state.step)
        if start and not resumed:
            state.result.epochs = -1  # the epoch before the first
            state.result.start = judged()
            state.judge(state.result.start, 0, None)
            state.result.epochs = 0
            state.save()
        stream = _load(examples, config, per_epoch, range(state.step, steps), device)
        # Parts are counted as they are judged: one may have been saved whole and not judged yet.
        while state.result.epochs * every < steps and not state.stopped:
            end = min((state.result.epochs + 1) * every, steps)
            if before_epoch is not None:
                before_epoch(min(state.step, end - 1) // per_epoch)
            if not state.result.losses:
                parts = np.unique(np.linspace(0, per_epoch - 1, SPREAD).astype(int)).tolist()
                some = _load(examples, config, per_epoch, parts, device)
                state.result.losses.append(_mean_loss(state, some, loss, device, bf16))
            began, begun_at = time.monotonic(), state.weight
            module.train()
            for data in islice(stream, end - state.step):
                warmup = getattr(config, "warmup", 0.05)
                rate = schedule(state.step, steps, config.lr, warmup)
                for update in range(repeats):
                    again = replace(data, update=update)
                    due = _step(state, again, loss, rate, config.batch, device, bf16)
                state.step += 1
                bar.advance()
                if due:
                    bar.note(f"epoch {state.result.epochs + 1} loss {state.means()['loss']:.3f}")
                    state.save()
            metrics = state.means()
            state.result.losses.append(metrics["loss"])
            rate = (state.weight - begun_at) / repeats / max(time.monotonic() - began, 1e-9)
            note = f"epoch {state.result.epochs + 1} loss {metrics['loss']:.3f}"
            if validate is not None:
                valid = judged()
                metrics |= {f"valid/{name}": value for name, value in valid.items()}
                state.judge(valid, patience, safe)
                note += f" ndcg@10 {valid['ndcg@10']:.4f}"
            bar.note(note)
            counted = {"step": state.step} if validate_every else {"epoch": state.result.epochs}
            log(
                state.step if validate_every else state.result.epochs,
                **counted,
                **metrics,
                sequences_per_s=round(rate, 1),
                wall_s=round(stage.wall_s(), 1),
            )
            state.result.epochs += 1
            state.result.steps = state.step
            state.sums, state.weight = {}, 0.0
            state.save()
    state.check()
    if state.best_weights is not None:
        module.load_state_dict(state.best_weights)
    module.eval()
    result = state.result
    return result if result.best else replace(result, best_epoch=result.epochs - 1)


def _load(
    examples: Examples, config: Any, per_epoch: int, steps: Sequence[int], device: torch.device
) -> Iterator[Batch]:
    """The process's share of the batch of each step, counted over all epochs."""
    lengths, targets, users = map(np.asarray, (examples.lengths, examples.targets, examples.users))
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if step == steps[0] or not place:
            order = batches(lengths, config.batch, config.seed, epoch)
        whole = order[place]
        share = ranks().share(len(whole))
        index = share.of(whole)
        arrays = (index, examples.histories(index), targets[index], users[index], targets[whole])
        tensors = (torch.as_tensor(np.ascontiguousarray(a), dtype=torch.int64) for a in arrays)
        moved = (tensor.to(device, non_blocking=True) for tensor in tensors)
        step_seed = derive_seed(config.seed, "step", epoch, place)
        yield Batch(*moved, share, step_seed, epoch, step)


@torch.no_grad()
def _mean_loss(
    state: _Trainer, stream: Iterable[Batch], loss: Loss, device: torch.device, bf16: bool
) -> float:
    """The mean loss of some batches as the weights are.

    Of several: a batch has histories of one length, and some lengths are easier than others.
    """
    state.module.train()
    for data in stream:
        torch.manual_seed(data.seed)
        with autocast(device, bf16):
            value, _ = loss(data)
        state.add({"loss": value}, data.share)
    mean = state.means()["loss"]
    state.sums, state.weight = {}, 0.0
    return mean


def _step(
    state: _Trainer,
    data: Batch,
    loss: Loss,
    rate: float,
    batch: int,
    device: torch.device,
    bf16: bool,
) -> bool:
    """One update of the weights; whether a checkpoint is due, as the main process finds."""
    job, share = ranks(), data.share
    # Dropout differs between ranks: equal masks on all of them would be less noise.
    seed = derive_seed(data.seed, "update", data.update) if data.update else data.seed
    torch.manual_seed(seed if job.main else derive_seed(seed, "rank", job.rank))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(device, bf16):
        value, metrics = loss(data)
    (value * (share.weight / batch)).backward()
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    due = job.sum_gradients(trained, time.monotonic() - state.saved_at > CHECKPOINT_EVERY_S)
    nn.utils.clip_grad_norm_(trained, CLIP_NORM)
    state.optimizer.step()
    state.add({"loss": value, **metrics}, share)
    return bool(due)
