"""Write a config for one's own data: from photos to a training in one command.

python tools/new_config.py photos --output my.yaml

What is chosen, and why, stands in the file.
"""

import argparse
import json
import math
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from detectron2.config import CfgNode

from ..data import check_datasets
from ..data.anchors import AnchorGrid, anchor_recall
from ..data.coco_format import class_names
from ..data.layouts import SPLITS_FOLDER, Split, dataset_name, find_splits, split_images
from ..engine import load_config
from ..engine.config import choose_device
from ..errors import UserError
from ..files import write_text
from ..model_zoo import get_config_file

HELD_OUT = 0.2  # of the training images, where no split is there to judge by
ANCHOR_SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 1.5)  # in the order of preference
ENOUGH_RECALL = 0.9  # of the boxes that meet an anchor
MOST_BOXES = 5000  # looked at to choose anchors; a share of so many is right within one percent


@dataclass(frozen=True)
class Device:
    """What a training on a kind of device starts from.

    Attributes:
        base: the config of the model zoo, with the detector.
        longest_sides: of the photos in training, of which the first that suffices is taken; empty
            for the photos' own, within detectron2's limits.
        sides_reason: where these are from.
        lr_per_image: learning rate divided by the batch.
        lr_reason: where that is from.
        epochs: passes over the photos.
        fewest: iterations.
        most: iterations.
        workers: processes that read photos.
    """

    base: str
    longest_sides: tuple[int, ...]
    sides_reason: str
    lr_per_image: float
    lr_reason: str
    epochs: float
    fewest: int
    most: float
    workers: int


DEVICES = {
    "cpu": Device(
        "Protocols/retinanet_R_50_FPN_many_cpu.yaml", (256, 320, 384),
        "The smallest sides at which enough boxes meet an anchor: a CPU computes by the pixel.",
        0.0025, "0.01 for 4 images, at which a head with GroupNorm learns", 4, 300, 600, 1,
    ),
    "cuda": Device(
        "Protocols/retinanet_R_50_FPN_gpu.yaml", (),
        "The photos' own shorter side, or several where they are large.",
        0.01 / 16, "0.01 for 16 images", 12, 1500, math.inf, 4,
    ),
}  # fmt: skip

TEMPLATE = """\
# RetinaNet-R50-FPN with the IoU-balanced losses for {photos}, for {device}.
# Out of memory? On a GPU set SOLVER.AMP.ENABLED True first. Then halve SOLVER.IMS_PER_BATCH and
# BASE_LR, and double MAX_ITER, STEPS and WARMUP_ITERS; or lower INPUT's sizes.
#
{commands}

# The detector. What is not here stands there.
_BASE_: {base}
MODEL:
  DEVICE: {device}
  # Trained on ImageNet. An address is downloaded once; without a network:
  # new-config --weights R-50.pkl.
  WEIGHTS: {weights}
  RETINANET:
    # {classes}
    NUM_CLASSES: {num_classes}
  IOU_BALANCED:
    # The paper's powers of the IoU. 0.0 is the plain loss; `reproduce` compares the two.
    CLS_ETA: 1.5
    LOC_LAMBDA: 1.5
  ANCHOR_GENERATOR:
    # {scale:g} x RetinaNet's usual ones: {recall:.1%} of the boxes meet one at IoU 0.5 then.
    SIZES: {anchors}
INPUT:
  # {sides_reason}
  MIN_SIZE_TRAIN: {min_sizes}
  MAX_SIZE_TRAIN: {max_size}
  # As in training.
  MIN_SIZE_TEST: {min_size_test}
  MAX_SIZE_TEST: {max_size}
DATASETS:
  # Paths are absolute, so that commands can be run in any folder.{held_out}
  {key}: {entries}
  TRAIN: {train}
  # AP is computed on these. Nothing should be chosen on those of the final figure.
  TEST: {test}
DATALOADER:
  # Processes that read photos.
  NUM_WORKERS: {workers}
SOLVER:
  # Less takes less memory: see the top.
  IMS_PER_BATCH: {batch}
  # By the linear rule: {lr_reason}.
  BASE_LR: {lr}
  # {epochs:.1f} epochs of the {images} photos with objects; more is often better (--epochs).
  MAX_ITER: {iterations}
  # The learning rate falls {fall}.
  STEPS: {steps}
  # It rises to BASE_LR first, as the head starts at random.
  WARMUP_ITERS: {warmup}
  # A stopped run goes on from the last one: train --resume.
  CHECKPOINT_PERIOD: {period}
OUTPUT_DIR: {output_dir}
VERSION: 2
"""
HELD_OUT_REASON = f"""
  # {HELD_OUT:.0%} of the photos are held out, drawn by a fixed seed. Frames of one video must
  # not be on both sides: then split by hand."""


def run(args: argparse.Namespace) -> None:
    """Choose, check what was chosen, and write."""
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} is there already: name another, or --overwrite")
    if args.weights and "://" not in args.weights and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights!r} not found")
    if args.epochs is not None and not args.epochs > 0:
        raise UserError(f"--epochs must be more than 0, got {args.epochs:g}")
    # Warned of by detectron2's anchor generator; the user can't change it.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    splits = find_splits(args.photos)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if splits.keys() == {"train"}:
        splits = hold_out(splits["train"], args.photos, args.output)
    text = config_text(args, splits)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.yaml")
        write_text(draft, text)
        cfg = load_config(str(draft))
    choose_device(cfg)
    check_datasets(cfg, training=True)
    write_text(args.output, text)
    images = ", ".join(f"{name} {len(s.content['images'])}" for name, s in splits.items())
    names = class_names(splits["train"].content)
    print(f"{args.output} written, with the reasons for its values\n")
    print(f"Images: {images}. Classes: {len(names)} ({', '.join(names[:8])})\n\nNext:")
    print("\n".join(f"  {command}" for command in next_commands(args)))


def hold_out(split: Split, photos: Path, output: Path) -> dict[str, Split]:
    """Hold out a part by a fixed seed; both parts are COCO JSON files beside the config."""
    folder = output.resolve().parent / SPLITS_FOLDER
    folder.mkdir(exist_ok=True)
    parts = split_images(split.content, HELD_OUT, photos.name)
    found = {}
    for name, content in zip(("train", "valid"), parts, strict=True):
        path = folder / f"{output.stem}_{name}.json"
        write_text(path, json.dumps(content))
        found[name] = Split("COCO_JSON", [str(path), split.image_root], content, split.image_root)
    return found


def config_text(args: argparse.Namespace, splits: dict[str, Split]) -> str:
    """The config file."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device, name = DEVICES[kind], partial(dataset_name, args.photos)
    base = load_config(get_config_file(device.base))
    content = splits["train"].content
    min_sizes, max_size, scale, recall = choose_sizes(base, device, content)
    batch = base.SOLVER.IMS_PER_BATCH
    if kind == "cuda" and torch.cuda.is_available():  # some 1.5 GiB for each photo of 800 x 1333
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        batch = batch if memory > 15 else 4 if memory > 7 else 2
    images = len({a["image_id"] for a in content["annotations"]})
    iterations = max(1, math.ceil((args.epochs or device.epochs) * images / batch))
    if args.epochs is None:
        iterations = int(min(max(iterations, device.fewest), device.most))
    steps, fall = [iterations * 2 // 3, iterations * 9 // 10], "to a tenth at 2/3 and 9/10"
    if base.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        steps, fall = [], "to 0, by a cosine"
    weights = args.weights or base.MODEL.WEIGHTS
    rows = [json.dumps([name(split), *found.place]) for split, found in splits.items()]
    names, sizes = class_names(content), base.MODEL.ANCHOR_GENERATOR.SIZES
    return TEMPLATE.format(
        photos=args.photos.resolve().name,
        device=kind,
        commands="\n".join(f"# {command}" for command in next_commands(args)),
        base=json.dumps(get_config_file(device.base)),
        weights=json.dumps(weights if "://" in weights else str(Path(weights).resolve())),
        classes="\n    # ".join(textwrap.wrap(", ".join(names), 92)),
        num_classes=len(names),
        scale=scale,
        recall=recall,
        anchors=[[round(size * scale, 2) for size in level] for level in sizes],
        sides_reason=device.sides_reason,
        min_sizes=list(min_sizes),
        max_size=max_size,
        min_size_test=min_sizes[-1],
        held_out=HELD_OUT_REASON if SPLITS_FOLDER in splits["train"].place[0] else "",
        key=splits["train"].key,
        entries="".join(f"\n    - {row}" for row in rows),
        train=json.dumps([name("train")]),
        test=json.dumps([name("valid" if "valid" in splits else "test")]),
        workers=device.workers,
        batch=batch,
        lr_reason=device.lr_reason,
        lr=device.lr_per_image * batch,
        epochs=iterations * batch / images,
        images=images,
        iterations=iterations,
        fall=fall,
        steps=steps,
        warmup=min(base.SOLVER.WARMUP_ITERS, iterations // 5),
        period=max(1, iterations // 3),
        output_dir=json.dumps(f"output/{args.output.stem}"),
    )


def choose_sizes(
    base: CfgNode, device: Device, content: dict[str, Any]
) -> tuple[tuple[int, ...], int, float, float]:
    """Shorter sides and longest side of photos, scale of the anchors, share of boxes that meet one.

    Of sizes that do about as well the smallest is taken, which is the quickest.
    """
    cfg, tried = base.clone(), []
    for min_sizes, max_size in image_sizes(device, base, content):
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = min_sizes, max_size
        tried.append((min_sizes, max_size, *best_anchors(cfg, content)))
        if tried[-1][-1] >= ENOUGH_RECALL:
            break
    most = max(round(recall, 2) for *_, recall in tried)
    return next(x for x in tried if round(x[-1], 2) == most)


def image_sizes(
    device: Device, cfg: CfgNode, content: dict[str, Any]
) -> list[tuple[tuple[int, ...], int]]:
    """Shorter sides and longest side of photos in training, from the quickest."""
    if device.longest_sides:
        return [((side,), side) for side in device.longest_sides]
    shorter = round(median(min(image["width"], image["height"]) for image in content["images"]))
    own = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if shorter >= min(own):
        return [(own, cfg.INPUT.MAX_SIZE_TRAIN)]
    shorter = max(shorter, 320)
    return [((shorter,), shorter * 5 // 3)]


def best_anchors(cfg: CfgNode, content: dict[str, Any]) -> tuple[float, float]:
    """The scale of the config's anchors, and the share of boxes that meet one then."""
    step = max(1, len(content["annotations"]) // MOST_BOXES)
    sample = {**content, "annotations": content["annotations"][::step]}
    grid = AnchorGrid.of(cfg)
    recalls = {s: anchor_recall(cfg, sample, anchors=grid.scaled(s)) for s in ANCHOR_SCALES}
    # Where another scale gains less than two percent, that of the pretrained detectors stays.
    best = max(recalls.values())
    scale = next(s for s, recall in recalls.items() if recall >= min(best - 0.02, ENOUGH_RECALL))
    return scale, recalls[scale]


def next_commands(args: argparse.Namespace) -> list[str]:
    command, config = "python -m iou_balanced_d2", f"--config-file {args.output}"
    train = f"{command} train {config}"
    return [
        f"{train} SOLVER.MAX_ITER 20 OUTPUT_DIR output/{args.output.stem}_try  # time and memory",
        train,
        f"{command} reproduce {config} --seeds 3  # does it help?",
    ]
