"""A command in several processes of a small job, its losses recorded; a process may be killed."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from forks import Answer, Commands


@dataclass(frozen=True)
class Rank:
    """What a process of a job does before its command.

    `pretrain` trains in float64: one process and two then differ by the order of sums in float64
    alone. In float32 that difference grows by a factor a step (AdamW divides small gradients by
    their size), so that after tens of steps no tolerance would follow from the arithmetic.

    Attributes:
        kill_at: the step after which rank `kill_rank` kills itself, every step being saved.
    """

    rank: int
    count: int
    port: int
    losses: Path
    kill_at: int = 0
    kill_rank: int = 1

    def __call__(self) -> None:
        import torch

        from streamctl import device
        from streamctl.training import loop, pretrain

        if self.count > 1:
            os.environ |= {
                "RANK": str(self.rank),
                "LOCAL_RANK": str(self.rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
        device.has_bf16 = lambda where: False
        pretrain.fit = _fit_in_double
        if self.kill_at:
            loop.CHECKPOINT_EVERY_S = 0.0
        add = loop._Trainer.add

        def recorded(trainer, metrics, share):
            if torch.is_grad_enabled():  # else the loss before training
                self._record(float(metrics["loss"].detach()) * share.weight / share.total)
            add(trainer, metrics, share)

        loop._Trainer.add = recorded

    def _record(self, loss: float) -> None:
        path = self.losses.with_suffix(f".{self.rank}")
        with open(path, "a") as handle:
            handle.write(f"{loss!r}\n")
        steps = len(path.read_text().splitlines())
        if self.rank == self.kill_rank and steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def recorded(self) -> list[float]:
        """What this rank's rows add to the loss of each step."""
        return [float(line) for line in self.losses.with_suffix(f".{self.rank}").open()]


def _fit_in_double(stage, module, *others, validate, **options):
    """`loop.fit` in float64, losses too, and validation in float32."""
    import torch

    from streamctl.training import loop

    to_single = torch.Tensor.float

    def double(on):
        torch.set_default_dtype(torch.float64 if on else torch.float32)
        torch.Tensor.float = torch.Tensor.double if on else to_single
        module.to(torch.get_default_dtype())

    def in_single():
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        double(False)
        found = validate()
        double(True)
        module.load_state_dict(weights)
        return found

    double(True)
    result = loop.fit(stage, module, *others, validate=in_single, **options)
    double(False)
    return result


def job(
    commands: Commands, words: list[str], count: int, losses: Path, **kill: int
) -> tuple[list[Answer], list[float]]:
    """Run a command in `count` processes; how each ended, and the losses of the whole batches."""
    with socket.socket() as free:
        # Held until the end, so that no one else is given the port; rank 0 may listen on it too.
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        members = [Rank(rank, count, port, losses, **kill) for rank in range(count)]
        processes = [commands.start(words, each, f"rank-{each.rank}") for each in members]
        answers = [commands.wait(one, f"rank-{number}") for number, one in enumerate(processes)]
    if not losses.with_suffix(".0").exists():
        return answers, []
    return answers, [sum(parts) for parts in zip(*(m.recorded() for m in members), strict=False)]
