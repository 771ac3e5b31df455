"""One training step, in any precision, whose losses and signals all processes share.

detectron2 gathers pickled losses at every step, and the main process alone looks for NaN: the
others wait for it until they time out. Here one all-reduce does both.
"""

import math
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .agreement import CommonError
from .signals import SIGNALS, StopSignals

# The values of SOLVER.AMP.PRECISION.
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def precision_of(cfg: CfgNode) -> torch.dtype | None:
    """The precision of matrix products that SOLVER.AMP asks for; None for float32."""
    return PRECISIONS[cfg.SOLVER.AMP.PRECISION] if cfg.SOLVER.AMP.ENABLED else None


def autocast(model: nn.Module, precision: torch.dtype | None) -> torch.autocast:
    """The context of a precision from :func:`precision_of` on a model's device."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=precision, enabled=precision is not None)


class Report(NamedTuple):
    """What all processes know after a step."""

    losses: dict[str, float]  # means over processes by name
    data_time: float  # seconds that the slowest process waited for its batch
    signum: int | None  # a signal that any process has received


class StepTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer whose processes stop together, after a signal or a loss of NaN.

    Unlike detectron2's AMPTrainer it needs no CUDA for mixed precision. Gradients are scaled up for
    float16; bfloat16 has the range of float32. A checkpoint of any precision resumes in any other.

    Args:
        model: the detector, wrapped in DDP or not.
        data_loader: an iterable of batches.
        optimizer: of the model.
        precision: of matrix products; None for float32.

    Attributes:
        signals: tell whether to stop; the trainer around this one catches them.
        batch: the last batch, for hooks.
    """

    optimizer: torch.optim.Optimizer
    iter: int
    batch: list[dict[str, Any]]

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.signals = StopSignals()
        self.precision = precision
        amp = torch.amp if hasattr(torch.amp, "GradScaler") else torch.cuda.amp  # before torch 2.3
        self.grad_scaler = amp.GradScaler(enabled=precision is torch.float16)

    def run_step(self) -> None:
        """One step: losses, gradients, the scalars that detectron2 logs, the optimizer.

        Raises:
            CommonError: before the weights change, if a loss is not finite on any.
        """
        start = time.perf_counter()
        self.batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with autocast(self.model, self.precision):
            losses: dict[str, Tensor] | Tensor = self.model(self.batch)
            if isinstance(losses, Tensor):  # as detectron2's SimpleTrainer
                losses = {"total_loss": losses}
            total: Any = sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        report = share(losses, data_time, self.signals.received)
        if not all(map(math.isfinite, report.losses.values())):
            raise self._not_finite(losses)
        self.signals.agreed = report.signum
        _log(report, data_time)
        self.grad_scaler.step(self.optimizer)  # not where scaled gradients have overflown
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """SimpleTrainer's, and the scale of float16's gradients."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; the optimizer's settings stay the config's, but for a scheduler's rate.

        The gradients' scale starts anew where the checkpoint has none.

        Raises:
            ValueError: if the optimizer's state is of other parameters.
        """
        groups = [dict(group) for group in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            settings = {k: v for k, v in own.items() if k not in ("params", "lr")}
            group.update({"initial_lr": own["lr"], **settings})
        for p, state in self.optimizer.state.items():
            for name in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & state.keys():
                if state[name] is not None and state[name].shape != p.shape:
                    raise ValueError(f"{name} has shape {state[name].shape}, not {p.shape}")
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _not_finite(self, losses: dict[str, Tensor]) -> CommonError:
        """The error that names loss, rank and images; called by all processes together."""
        own = {name: x.item() for name, x in losses.items()}
        bad = [(name, value) for name, value in own.items() if not math.isfinite(value)]
        files = [x["file_name"] for x in self.batch if "file_name" in x]
        everyone = enumerate(comm.all_gather((bad, files)))
        rank, (bad, files) = next((rank, found) for rank, found in everyone if found[0])
        name, value = bad[0]
        group = hooks.LRScheduler.get_best_param_group_id(self.optimizer)
        rate = self.optimizer.param_groups[group]["lr"]
        return CommonError(
            f"{name} is {value} at iteration {self.iter} (learning rate {rate:g}) on rank {rank}, "
            f"images {', '.join(files)}: lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS, "
            "clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), and look at these images' boxes "
            "with tools/check_dataset.py; --resume goes on from the last checkpoint, which is "
            "from before"
        )


def share(losses: dict[str, Tensor], data_time: float, signum: int | None) -> Report:
    """Share a step's results among all processes, in one collective and one copy from the device.

    Args:
        losses: of this process, scalars; the same names in the same order on all of them.
        data_time: seconds.
        signum: the signal that this process has received.

    Returns:
        the same in all of them; a loss is finite only if it is finite in each.
    """
    size, rank = comm.get_world_size(), comm.get_rank()
    # All is summed over processes: seconds have a place for each process, signals for each kind.
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
    times, counts = numbers[len(losses) : -len(SIGNALS)], numbers[-len(SIGNALS) :]
    received = [s for s, count in zip(SIGNALS, counts, strict=True) if count]
    return Report(means, max(times), received[0] if received else None)


def _log(report: Report, data_time: float) -> None:
    """Put detectron2's scalars into the storage."""
    storage = get_event_storage()
    storage.put_scalar("rank_data_time", data_time)
    if comm.is_main_process():
        storage.put_scalar("data_time", report.data_time)
        storage.put_scalar("total_loss", sum(report.losses.values()))
        if len(report.losses) > 1:
            storage.put_scalars(**report.losses)
