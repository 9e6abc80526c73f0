"""One job in several processes: torchrun starts them, Hugging Face Accelerate joins them.

    torchrun --standalone --nproc-per-node 2 -m -- streamctl pretrain --run RUN

Every process (a "rank") reads the same run and works on its share: of the rows of a training
batch, or of the batches where nothing is trained. Gradients and figures are summed over the ranks,
so that all of them hold the same weights at every step and take the same decisions; rank 0, the
main one, writes. Nothing that is kept depends on the number of ranks: a checkpoint written by two
is continued by one, or by four.
"""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from streamctl.errors import StreamctlError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

SINGLE = ("data", "tokenizer")  # stages that one process makes
LONGEST_WAIT = datetime.timedelta(hours=2)  # for a rank that is slower, not for one that died


def world_size() -> int:
    """How many processes the job has, as torchrun's environment says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def told_cpu() -> bool:
    """Whether the work is to stay on CPUs: `--device cpu`, or `accelerate launch --cpu`."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def joined() -> bool:
    """Whether this process has met the others: until then all of them do and say the same."""
    return ranks.cache_info().currsize > 0


def is_main() -> bool:
    """Whether this process is the only one or the first, the one that writes and speaks."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Share:
    """The rows of a whole batch that a rank has: `rows` of `total`, from `first` on.

    `weight` is how many of them count: a batch of fewer rows than ranks gives the last ranks a row
    that counts nothing, so that all of them go through the same steps.
    """

    first: int
    rows: int
    total: int
    weight: int

    @classmethod
    def whole(cls, rows: int) -> Share:
        """All rows: the share of the only process."""
        return cls(0, rows, rows, rows)

    def of(self, whole: Any) -> Any:
        """The rank's rows of a tensor or array over the whole batch.

        Chance is drawn for the whole batch and cut, so that it does not depend on the ranks.
        """
        return whole[self.first : self.first + self.rows]


@dataclass(frozen=True)
class Ranks:
    """The processes of the job, seen from one of them. Everything is trivial when it is alone."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> Share:
        """This rank's rows of a batch of `total`: consecutive, sizes at most one apart."""
        if total < self.count:
            return Share(min(self.rank, total - 1), 1, total, int(self.rank < total))
        first, end = (total * number // self.count for number in (self.rank, self.rank + 1))
        return Share(first, end - first, total, end - first)

    def mine(self, batches: Sequence[Any]) -> Iterator[Any]:
        """Every `count`-th of them. Whole batches, so that no figure depends on the split."""
        return iter(batches[self.rank :: self.count])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], word: float = 0.0) -> float:
        """Replace each gradient by its sum over the ranks: the one message of a training step.

        A parameter that has no gradient on any rank keeps none, as in a single process: a zero
        would let the optimiser's weight decay shrink it.

        Args:
            parameters: the same on every rank, of one dtype.
            word: a number of the main rank's that every rank is told with the same message.

        Returns:
            the main rank's word.
        """
        if self.count == 1:
            return word
        import torch

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        head = [word if self.main else 0.0, *(float(p.grad is not None) for p in parameters)]
        flat = [torch.tensor(head).to(gradients[0]), *(part.flatten() for part in gradients)]
        total = self._reduce(torch.cat(flat))
        head, *parts = total.split([part.numel() for part in flat])
        word, *holders = head.tolist()
        for parameter, part, held in zip(parameters, parts, holders, strict=True):
            parameter.grad = part.view_as(parameter) if held else None
        return word

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of the ranks' arrays, of one shape and dtype."""
        if self.count == 1:
            return array
        import torch

        return self._reduce(torch.from_numpy(array)).numpy()

    def agree(self, value: float = 0.0) -> float:
        """The main rank's value, on every rank. Also the place where all wait for each other."""
        if self.count == 1:
            return value
        import torch

        own = float(value) if self.main else 0.0
        return float(self._reduce(torch.tensor([own], dtype=torch.float64))[0])

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate import PartialState
        from accelerate.utils import reduce

        with _contact(self.rank):
            return reduce(tensor.to(PartialState().device), "sum").to(tensor.device)


@contextmanager
def _contact(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StreamctlError(
            f"rank {rank} lost the others: a process of the job has ended",
            run="the same torchrun command, which continues from the last checkpoint",
        ) from error


@cache
def ranks() -> Ranks:
    """The job's processes; the first call joins them, over gloo on CPUs and NCCL on GPUs.

    With `--device cpu`, or under `accelerate launch --cpu`, GPUs that are there are not used.

    Raises:
        UsageError: there are several and accelerate is not installed.
        StreamctlError: they cannot reach each other.
    """
    if world_size() == 1:
        return Ranks()
    import torch

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UsageError(
            "several processes need accelerate", run="pip install accelerate"
        ) from error
    signal.signal(signal.SIGTERM, _ended)
    rank = int(os.environ["RANK"])
    gpu = torch.cuda.is_available() and not told_cpu()
    with _contact(rank):
        state = PartialState(cpu=not gpu, backend="nccl" if gpu else "gloo", timeout=LONGEST_WAIT)
    return Ranks(state.process_index, state.num_processes)


def leave() -> None:
    """Part from the other processes at the end of a job that went well, if it had any.

    Left to the interpreter's end, a process that was done has aborted there.
    """
    if world_size() > 1 and joined():
        from accelerate import PartialState

        PartialState().destroy_process_group()


def _ended(signum: int, frame: Any) -> None:
    """torchrun ends the others with SIGTERM when one process fails."""
    raise StreamctlError(
        f"rank {os.environ['RANK']} was ended with the job",
        run="the same torchrun command, which continues from the last checkpoint",
    )
