"""What must be the same in all processes of a run: config, versions, training data."""

import argparse
import hashlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

import iou_balanced_d2

from .. import projects
from ..errors import UserError
from .config import flatten

logger = logging.getLogger(__name__)

# Keys that may differ from host to host.
_OWN_KEYS = ("OUTPUT_DIR", "MODEL.WEIGHTS")
# The place of the paths in each entry of these keys.
_OWN_PATHS = {
    "DATASETS.COCO_JSON": (1, 2), "DATASETS.VOC_FOLDER": (1,), "DATASETS.YOLO_FOLDER": (1,),
}  # fmt: skip
_SHOWN = 3  # differences named in a message
_PROCESSES = "number of processes"
# What decides which images a step gets.
_STREAM = ("SEED", "SOLVER.IMS_PER_BATCH", "DATASETS.TRAIN", _PROCESSES)


class CommonError(UserError):
    """An error that all processes raise together: one of each machine is to print it."""


def check_same(facts: Mapping[str, str]) -> None:
    """Compare facts, by name, with those of all other processes; each process must call this."""
    gathered = comm.all_gather((socket.gethostname(), dict(facts)))
    base_host, base = gathered[0]
    for rank, (host, others) in enumerate(gathered):
        keys = [k for k in {**base, **others} if base.get(k) != others.get(k)]
        if keys:
            shown = "; ".join(
                f"{k} is {others.get(k, 'unknown')} there, {base.get(k, 'unknown')} here"
                for k in keys[:_SHOWN]
            )
            more = f" (and {len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else ""
            raise CommonError(
                f"rank {rank} on {host} disagrees with rank 0 on {base_host}: {shown}{more}"
            )


def check_same_data(dicts: Sequence[dict[str, Any]]) -> None:
    """Compare all processes' training data, of paths the files' names; each must call this."""
    if comm.get_world_size() == 1:
        return
    names, boxes = hashlib.sha256(), hashlib.sha256()
    for d in dicts:
        names.update(os.path.basename(d["file_name"]).encode() + b"\0")
        for a in d.get("annotations", ()):
            values = [*a["bbox"], a["category_id"], a.get("iscrowd", 0)]
            boxes.update(np.asarray(values, dtype=np.float64).tobytes())
    facts = {
        "number of training images": len(dicts),
        "number of boxes": sum(len(d.get("annotations", ())) for d in dicts),
        "digest of the image files' names": names.hexdigest()[:12],
        "digest of boxes and classes": boxes.hexdigest()[:12],
    }
    check_same({name: str(value) for name, value in facts.items()})


def versions() -> dict[str, str]:
    """The versions of this package (with a digest of its source), detectron2 and torch."""
    digest = hashlib.sha256()
    for name, path in sorted(_sources().items()):
        digest.update(name.encode() + path.read_bytes())
    return {
        "iou_balanced_d2": f"{iou_balanced_d2.__version__} (source {digest.hexdigest()[:12]})",
        "detectron2": str(detectron2.__version__),
        "torch": str(torch.__version__),
    }


def _sources() -> dict[str, Path]:
    """The files of this package and its projects by name, which is the same however installed."""
    root = Path(iou_balanced_d2.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for folder in map(Path, projects.__path__):
        for init in folder.glob("*/__init__.py"):
            for path in init.parent.rglob("*.py"):
                files[f"projects/{path.relative_to(folder).as_posix()}"] = path
    return files


def facts_of(cfg: CfgNode, args: argparse.Namespace) -> dict[str, str]:
    """What must be the same in all processes: ``--eval-only`` and the config's values, by key.

    OUTPUT_DIR, MODEL.WEIGHTS and the paths of data sets may differ from host to host.
    """
    return {"--eval-only": str(args.eval_only), **_config_facts(cfg)}


def _config_facts(cfg: CfgNode) -> dict[str, str]:
    flat = flatten(cfg)
    for key, places in _OWN_PATHS.items():
        flat[key] = [[x for i, x in enumerate(e) if i not in places] for e in flat.get(key, ())]
    return {key: str(value) for key, value in flat.items() if key not in _OWN_KEYS}


class RunState:
    """The config of a training as a checkpointable: a resumed one tells what differs."""

    def __init__(self, cfg: CfgNode):
        self.facts = {**_config_facts(cfg), _PROCESSES: str(comm.get_world_size())}

    def state_dict(self) -> dict[str, str]:
        """The config's values by key, and the number of processes."""
        return dict(self.facts)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Warn of each value that is not that of the checkpoint."""
        changed = [k for k, value in self.facts.items() if state.get(k, value) != value]
        if not changed:
            return
        told = ", ".join(f"{k} {self.facts[k]} (was {state[k]})" for k in changed)
        order = "; the images come in another order than without the stop"
        logger.warning(
            f"resumed with another config than the checkpoint's, from here on: {told}"
            f"{order if set(changed) & set(_STREAM) else ''}"
        )
