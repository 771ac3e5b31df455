"""What a run tells its user: everything in log.txt, what matters on the console."""

import logging
import re
import sys
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..modeling import IoUBalancedLoss

logger = logging.getLogger(__name__)

# Loggers, with those below them, whose hundreds of lines (environment, config, network, tables of
# weights, how data are stored) are in log.txt only. Warnings and errors are always shown.
_LOG_ONLY = ("detectron2.checkpoint", "detectron2.data", "detectron2.engine.defaults")
_MOST_LINES = 8  # of others' records on the console, such as the list of weights that are new
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class _PlainFormatter(logging.Formatter):
    """Without the colours of a terminal, which detectron2 puts into what it logs of a config."""

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI.sub("", super().format(record))


class _ShortFormatter(logging.Formatter):
    """Another formatter's text, of a long list only its beginning; tracebacks are whole."""

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        text = self._formatter.format(record)
        lines = text.splitlines()
        is_whole = record.exc_info or record.name.startswith("iou_balanced_d2")
        if is_whole or len(lines) <= _MOST_LINES:
            return text
        return "\n".join([*lines[:3], f"... {len(lines) - 3} more lines in log.txt"])


def matters(record: logging.LogRecord) -> bool:
    """Whether a record is shown; the logger "detectron2" itself is that of ``default_setup``."""
    in_log_only = record.name.startswith(_LOG_ONLY) or record.name == "detectron2"
    return record.levelno >= logging.WARNING or not in_log_only


def setup_loggers(output_dir: str) -> None:
    """Set up the loggers of this process; to be called before detectron2's ``default_setup``."""
    for name in ("iou_balanced_d2", "fvcore", None):
        # With default_setup's very arguments, so that it finds its loggers set up.
        given = {"name": name} if name else {}
        log = setup_logger(output_dir, distributed_rank=comm.get_rank(), **given)
        for handler in log.handlers:
            theirs = handler.formatter
            if theirs is None or isinstance(theirs, _ShortFormatter | _PlainFormatter):
                continue  # not detectron2's, or set up before
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(matters)
                handler.setFormatter(_ShortFormatter(theirs))
            else:
                handler.setFormatter(_PlainFormatter(theirs._fmt, theirs.datefmt))


def describe_data(cfg: CfgNode, dicts: list[dict[str, Any]]) -> None:
    """Log the training data and the schedule, a line each."""
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    boxes = sum(len(d.get("annotations", ())) for d in dicts)
    logger.info(
        f"Data: {' + '.join(cfg.DATASETS.TRAIN)}: {len(dicts)} images, {boxes} boxes, "
        f"{len(names)} classes ({shown}); evaluated on {', '.join(cfg.DATASETS.TEST) or 'nothing'}"
    )
    solver = cfg.SOLVER
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(len(dicts), 1)
    logger.info(
        f"Schedule: {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images ({epochs:.1f} "
        f"epochs), learning rate {solver.BASE_LR:g}"
    )


def describe_run(cfg: CfgNode, model: nn.Module) -> None:
    """Log the model, the losses and where to look, a line each."""
    counts = {x: sum(p.numel() for p in model.parameters() if p.requires_grad >= x) for x in (0, 1)}
    processes = f" in {n} processes" if (n := comm.get_world_size()) > 1 else ""
    logger.info(
        f"Model: {cfg.MODEL.META_ARCHITECTURE}, {counts[0] / 1e6:.1f} M parameters "
        f"({counts[1] / 1e6:.1f} M trained), on {cfg.MODEL.DEVICE}{processes}; shorter side "
        f"{'/'.join(map(str, cfg.INPUT.MIN_SIZE_TRAIN))}, longer up to {cfg.INPUT.MAX_SIZE_TRAIN}; "
        f"weights: {cfg.MODEL.WEIGHTS or 'none, from scratch'}"
    )
    logger.info(f"Losses: {_losses(cfg, model)}")
    folder = cfg.OUTPUT_DIR
    logger.info(
        f"Output: {folder}: log.txt (all that is logged), metrics.json (scalars), config.yaml, "
        "model_*.pth, inference/ (detections)"
    )
    logger.info(f"Curves: tensorboard --logdir {folder}")


def _losses(cfg: CfgNode, model: nn.Module) -> str:
    loss = next((m for m in model.modules() if isinstance(m, IoUBalancedLoss)), None)
    if loss is None:
        return f"{cfg.MODEL.META_ARCHITECTURE}'s own"
    options = loss.options
    is_balanced = options.cls_loss == "iou_balanced"
    cls = f"positives x IoU^{options.cls_eta:g}" if is_balanced else options.cls_loss
    cls += _times(options.cls_loss_weight)
    box = loss.box_reg_loss_type + _times(options.bbox_reg_loss_weight)
    if not options.loc_lambda:
        return f"classification {cls}; box {box}{_times(options.loc_weight or 1)}"
    w_loc = f"{options.loc_weight:g}" if options.loc_weight else (
        f"by the rule {options.loc_weight_rule!r}, see iou_balanced/w_loc"
    )  # fmt: skip
    return f"classification {cls}; box {box} x w_loc x IoU^{options.loc_lambda:g}, w_loc {w_loc}"


def _times(weight: float) -> str:
    return "" if weight == 1 else f" x {weight:g}"


class FirstIterations(HookBase):
    """Logs the first iterations of a training, and how long all will take.

    detectron2's printer, which has the remaining time, first speaks after 20 iterations.
    """

    trainer: TrainerBase
    _MEASURED = 5  # the iteration after which the time is told

    def before_train(self) -> None:
        """Start to measure."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Log the first and the fifth iteration."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == 1:
            logger.info(f"First iteration done in {time.perf_counter() - self._start:.1f} s")
            self._start = time.perf_counter()  # the first one is slower than the others
        elif done == self._MEASURED:
            seconds = (time.perf_counter() - self._start) / (done - 1)
            left = seconds * (self.trainer.max_iter - self.trainer.iter - 1)
            logger.info(
                f"Estimated time: {left / 60:.1f} min for the other iterations ({seconds:.2f} s "
                "each), then the evaluation"
            )
