"""Processes that would not train the same thing say so before they start, instead of hanging."""

import argparse
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.distributed import Store

import iou_balanced_d2

from ..errors import UserError
from .placement import Placement

# What may differ from host to host.
_OWN_KEYS = ("OUTPUT_DIR", "MODEL.WEIGHTS")
# The place of the paths in each entry of these keys.
_OWN_PATHS = {"DATASETS.COCO_JSON": (1, 2), "DATASETS.VOC_FOLDER": (1,)}
_ALL_HERE = "all here"
_SHOWN = 3  # differences named in a message
_LINGER = 10.0  # seconds that rank 0 keeps the store up for others to read why the run ends


class Disagreement(UserError):
    """What every process of the run raises alike, so that one line of one process will do."""


def versions() -> dict[str, str]:
    """The versions of what takes part in a training, with a digest of this package's source."""
    digest = hashlib.sha256()
    root = Path(iou_balanced_d2.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {
        "iou_balanced_d2": f"{iou_balanced_d2.__version__} (source {digest.hexdigest()[:12]})",
        "detectron2": str(detectron2.__version__),
        "torch": str(torch.__version__),
    }


def facts_of(cfg: CfgNode, args: argparse.Namespace) -> dict[str, str]:
    """What must be the same in all processes of a run, by name: config and what is done with it."""
    return {"--eval-only": str(args.eval_only), **flat_config(cfg)}


def flat_config(cfg: CfgNode) -> dict[str, str]:
    """A config as text by key, without what may differ from host to host.

    Args:
        cfg: the full config.

    Returns:
        the keys joined by dots; OUTPUT_DIR, MODEL.WEIGHTS and the paths of data sets are left out.
    """
    flat = flatten(cfg)
    for key, places in _OWN_PATHS.items():
        flat[key] = [[x for i, x in enumerate(e) if i not in places] for e in flat.get(key, ())]
    return {key: str(value) for key, value in flat.items() if key not in _OWN_KEYS}


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        below = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return flat


def agree(store: Store, placement: Placement, rank: int, facts: Mapping[str, str]) -> None:
    """Wait for all processes, and compare what they are about to do.

    Args:
        store: what all of them can reach.
        placement: the processes.
        rank: this process's number.
        facts: what must be the same everywhere, by name.

    Raises:
        UserError: in every process, if two differ, two claim one rank, or one never comes.
    """
    size, host = placement.world_size, socket.gethostname()
    refusal = _claim(store, placement, rank, f"rank {rank} on {host}")
    if refusal:
        _end(store, refusal)
    else:
        store.set(f"facts/{rank}", json.dumps({"host": host, **facts}))
        if store.add("arrived", 1) == size:
            _end(store, _ALL_HERE)
    verdict = refusal or _wait(store, placement)
    if verdict == _ALL_HERE:
        verdict = _compare(store, size)
    store.add("read", 1)
    if verdict:
        _linger(store, rank, size)
        raise Disagreement(verdict)


def abandon(store: Store, rank: int, reason: str) -> bool:
    """End the waiting of the others, as this process or machine can't take part.

    Args:
        store: what all of them can reach.
        rank: the first one that will not come.
        reason: why, in one line.

    Returns:
        whether none has done this before.
    """
    verdict = f"rank {rank} on {socket.gethostname()} can't start: {reason}"
    return store.compare_set("verdict", "", verdict).decode() == verdict


def _claim(store: Store, placement: Placement, rank: int, me: str) -> str:
    """Take the rank, as one of so many processes; what is wrong with that, or ""."""
    size = placement.world_size
    said = f"{size} ({placement.num_machines} x {placement.local_size})"
    base, base_said = store.compare_set("size", "", f"{me}\n{said}").decode().split("\n")
    if base_said != said:
        return (
            f"{me} disagrees with {base}: the number of processes is {said} there, {base_said} here"
        )
    mine = f"{me}\n{uuid.uuid4()}"
    theirs = store.compare_set(f"claim/{rank}", "", mine).decode()
    if theirs != mine:
        hosts = [claim.split("\n")[0].partition(" on ")[2] for claim in (theirs, mine)]
        return (
            f"two processes claim rank {rank} of {size}, on {hosts[0]} and on {hosts[1]}: each "
            "machine needs a --machine-rank of its own, and each run a --dist-url"
        )
    return ""


def _end(store: Store, verdict: str) -> None:
    """Say how the waiting ends; the first word counts."""
    store.compare_set("verdict", "", verdict)


def _wait(store: Store, placement: Placement) -> str:
    """Wait until all are here or one has found that this won't be."""
    until = time.monotonic() + placement.timeout
    while not store.check(["verdict"]):
        if time.monotonic() > until:
            _end(store, _missing(store, placement))
        time.sleep(0.05)
    return store.get("verdict").decode()


def _missing(store: Store, placement: Placement) -> str:
    size = placement.world_size
    missing = [r for r in range(size) if not store.check([f"facts/{r}"])]
    machines = sorted({placement.machine_of(r) for r in missing})
    where = ", ".join(f"--machine-rank {m}" for m in machines)
    return (
        f"waited {placement.timeout:g} s for rank {', '.join(map(str, missing))} of {size} "
        f"({where}): not started there, ended by an error of its own, or this host can't be "
        "reached from there (--dist-timeout sets the seconds)"
    )


def _compare(store: Store, size: int) -> str:
    """The first differences from rank 0, of the first rank that has any; "" if there are none."""
    facts = [json.loads(store.get(f"facts/{rank}")) for rank in range(size)]
    base = facts[0]
    for rank, others in enumerate(facts):
        keys = [k for k in {**base, **others} if k != "host" and base.get(k) != others.get(k)]
        if keys:
            shown = "; ".join(
                f"{k} is {others.get(k, 'unknown')} there, {base.get(k, 'unknown')} here"
                for k in keys[:_SHOWN]
            )
            more = f" (and {len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else ""
            return (
                f"rank {rank} on {others['host']} disagrees with rank 0 on {base['host']}: "
                f"{shown}{more}"
            )
    return ""


def _linger(store: Store, rank: int, size: int) -> None:
    """Rank 0 may hold the store: it stays until the others have read the verdict."""
    until = time.monotonic() + _LINGER
    while rank == 0 and store.add("read", 0) < size and time.monotonic() < until:
        time.sleep(0.05)


def check_same_data(dicts: Sequence[dict[str, Any]]) -> None:
    """Compare the training data of all processes; each must call this once.

    Args:
        dicts: detectron2's dataset dicts, in the order they are drawn in; of paths only the files'
            names count.

    Raises:
        UserError: in every process, if the images or their boxes differ anywhere.
    """
    if comm.get_world_size() == 1:
        return
    told = comm.all_gather((socket.gethostname(), _data_facts(dicts)))
    base_host, base = told[0]
    for rank, (host, facts) in enumerate(told):
        for name in base:
            if facts[name] != base[name]:
                raise Disagreement(
                    f"rank {rank} on {host} has other training data than rank 0 on {base_host}: "
                    f"{name}: {facts[name]} there, {base[name]} here"
                )


def _data_facts(dicts: Sequence[dict[str, Any]]) -> dict[str, str]:
    names, boxes = hashlib.sha256(), hashlib.sha256()
    count = 0
    for d in dicts:
        names.update(os.path.basename(d["file_name"]).encode() + b"\0")
        for a in d.get("annotations", ()):
            values = [*a["bbox"], a["category_id"], a.get("iscrowd", 0)]
            boxes.update(np.asarray(values, dtype=np.float64).tobytes())
            count += 1
    return {
        "number of images": str(len(dicts)),
        "names of image files (digest)": names.hexdigest()[:12],
        "number of boxes": str(count),
        "boxes and classes (digest)": boxes.hexdigest()[:12],
    }
