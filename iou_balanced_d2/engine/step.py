"""One step of the training; what its processes have to tell each other goes in one message.

detectron2 gathers pickled losses at every step and looks for NaN on the main process alone, which
leaves the others waiting for it until their time is up.
"""

import math
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..errors import UserError
from .signals import SIGNALS, StopSignals


class Report(NamedTuple):
    """What all processes know after a step.

    Attributes:
        losses: means over processes by name.
        data_time: seconds that the slowest process waited for its batch.
        signum: a signal that has come to any process.
    """

    losses: dict[str, float]
    data_time: float
    signum: int | None


class StepTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer whose processes stop together: for a signal, or a loss of NaN.

    Attributes:
        signals: tell whether to stop; the trainer around this one catches them.
    """

    optimizer: torch.optim.Optimizer
    iter: int

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer):
        """Set what is trained.

        Args:
            model: the detector, wrapped in DDP or not.
            data_loader: an iterable of batches.
            optimizer: of the model.
        """
        super().__init__(model, data_loader, optimizer)
        self.signals = StopSignals()

    def run_step(self) -> None:
        """One step: losses, gradients, the scalars that detectron2 logs, the optimizer.

        Raises:
            UserError: on all processes before the weights are touched, if a loss is not finite
                on any.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        losses = self.compute_gradients(batch)
        report = share(losses, data_time, self.signals.received)
        if not all(map(math.isfinite, report.losses.values())):
            raise self._not_finite(losses, batch)
        self.signals.agreed = report.signum
        _log(report, data_time)
        self.update_weights()

    def compute_gradients(self, batch: Any) -> dict[str, Tensor]:
        """Forward and backward.

        Args:
            batch: the model's input.

        Returns:
            the losses by name.
        """
        losses: dict[str, Tensor] = self.model(batch)
        self.optimizer.zero_grad()
        total: Any = sum(losses.values())
        total.backward()
        return losses

    def update_weights(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def _not_finite(self, losses: dict[str, Tensor], batch: Any) -> UserError:
        """The error that names what all processes must know; each of them has to ask for it."""
        own = {name: x.item() for name, x in losses.items()}
        bad = [(name, value) for name, value in own.items() if not math.isfinite(value)]
        files = [x["file_name"] for x in batch if "file_name" in x]
        everyone = enumerate(comm.all_gather((bad, files)))
        rank, (bad, files) = next((rank, told) for rank, told in everyone if told[0])
        name, value = bad[0]
        group = hooks.LRScheduler.get_best_param_group_id(self.optimizer)
        rate = self.optimizer.param_groups[group]["lr"]
        return UserError(
            f"{name} is {value} at iteration {self.iter} (learning rate {rate:g}) on rank {rank}, "
            f"images {', '.join(files)}: lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS, "
            "clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), and look at these images' boxes "
            "with tools/check_dataset.py; --resume goes on from the last checkpoint, which is "
            "from before"
        )


def share(losses: dict[str, Tensor], data_time: float, signum: int | None) -> Report:
    """Tell all processes of a step, in one collective and one copy from the device.

    Args:
        losses: of this process, scalars; the same names in the same order on all of them.
        data_time: seconds.
        signum: the signal that has come to this process.

    Returns:
        what is known of all of them; a loss is not finite if it is not on any process.
    """
    size, rank = comm.get_world_size(), comm.get_rank()
    # Summed over processes, each with a place of its own for what is not to be summed.
    others = torch.zeros(size + len(SIGNALS), dtype=torch.float64)
    others[rank] = data_time
    if signum is not None:
        others[size + SIGNALS.index(signum)] = 1
    own = torch.stack([x.detach().double().reshape(()) for x in losses.values()])
    message = torch.cat([own, others.to(own.device)])
    if size > 1:
        dist.all_reduce(message)
    numbers = message.tolist()
    means = {name: x / size for name, x in zip(losses, numbers, strict=False)}
    times, told = numbers[len(losses) : -len(SIGNALS)], numbers[-len(SIGNALS) :]
    came = [s for s, count in zip(SIGNALS, told, strict=True) if count]
    return Report(means, max(times), came[0] if came else None)


def _log(report: Report, data_time: float) -> None:
    """Put detectron2's scalars into the storage."""
    storage = get_event_storage()
    storage.put_scalar("rank_data_time", data_time)
    if comm.is_main_process():
        storage.put_scalar("data_time", report.data_time)
        storage.put_scalar("total_loss", sum(report.losses.values()))
        if len(report.losses) > 1:
            storage.put_scalars(**report.losses)
