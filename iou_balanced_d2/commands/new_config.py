"""Write a config for one's own data: from photos to a training in one command.

python tools/new_config.py photos --output my.yaml

What is chosen, and why, stands in the file. The time of an iteration and the memory are measured
here, with the detector and the photos, on random weights.
"""

import argparse
import json
import math
import resource
import tempfile
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..analysis.page import clean
from ..data import check_datasets
from ..data.anchors import AnchorGrid, anchor_recall, mean_recall, recall_in_words
from ..data.coco_format import class_names
from ..data.inspection import trained_on
from ..data.layouts import SPLITS_FOLDER, Split, dataset_name, find_splits, split_images
from ..engine import Trainer, load_config
from ..engine.config import choose_device
from ..engine.faults import user_errors
from ..errors import UserError
from ..files import make_folder, write_text
from ..model_zoo import get_config_file

HELD_OUT = 0.2  # of the training images, where no split is there to judge by
ANCHOR_SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 1.5)  # in the order of preference
ENOUGH_RECALL = 0.9  # of the boxes that meet an anchor
MOST_BOXES = 5000  # looked at to choose anchors; a share of so many is right within one percent
MEASURED = 4  # iterations; the first one is not counted
GIB = 2**30

Settings = list[tuple[str, Any, str]]  # config key, value, the reason


@dataclass(frozen=True)
class Device:
    """What a training on a kind of device starts from."""

    name: str  # of MODEL.DEVICE
    base: str  # the config of the model zoo, with the detector
    # Of the photos in training, of which the first that suffices is taken; empty for the photos'
    # own, within detectron2's limits.
    longest_sides: tuple[int, ...]
    lr_per_image: float  # learning rate divided by the batch
    lr_reason: str  # where that is from
    epochs: float  # passes over the photos
    fewest: int  # iterations
    most: float  # iterations
    workers: int  # processes that read photos


DEVICES = {
    "cpu": Device(
        "cpu", "Protocols/retinanet_R_50_FPN_many_cpu.yaml", (256, 320, 384), 0.0025,
        "0.01 for 4 images, at which a head with GroupNorm learns", 4, 300, 600, 1,
    ),
    "cuda": Device(
        "cuda", "Protocols/retinanet_R_50_FPN_gpu.yaml", (), 0.01 / 16,
        "0.01 for 16 images", 12, 1500, math.inf, 4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """What follows from the data and the device."""

    min_sizes: tuple[int, ...]  # shorter sides of photos in training
    max_size: int  # longest side
    scale: float  # of the base config's anchors
    recalls: dict[str, float]  # share of each class's boxes that meet an anchor at IoU 0.5
    images: int  # photos with objects, those that are trained on
    batch: int  # photos of an iteration
    iterations: int  # of the training


def run(args: argparse.Namespace) -> None:
    """Choose, check what was chosen, measure, and write."""
    check_arguments(args)
    # Warned of by detectron2's anchor generator; the user can't change it.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    device = DEVICES[args.device or ("cuda" if torch.cuda.is_available() else "cpu")]
    splits = find_splits(args.photos)
    judge = next((split for split in ("valid", "test") if split in splits), "")
    make_folder(args.output.parent)
    if not judge:
        splits, judge = hold_out(splits["train"], args.photos, args.output), "valid"
    if not trained_on(splits["train"].content, "ignore"):  # of what is not held out
        raise UserError(f"{args.photos}: no photo to train on has a usable box")
    base = load_config(get_config_file(device.base))
    chosen = choose(base, args, device, splits["train"].content)
    settings = [
        *model_settings(base, args, device, chosen, class_names(splits["train"].content)),
        *data_settings(args, splits, judge),
        *solver_settings(base, args, device, chosen),
    ]
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.yaml")
        write_text(draft, to_yaml(settings))
        cfg = load_config(str(draft))
    choose_device(cfg)
    check_datasets(cfg, training=True)
    with user_errors():  # such as too little memory
        price = cost(cfg, device)
    commands = next_commands(args)
    write_text(args.output, heading(args, device, price, commands) + to_yaml(settings))
    print(f"{args.output} written, with the reasons for its values\n")
    print(f"{summary(splits, chosen)}\nA run takes {price}.\n\nNext:")
    print("\n".join(f"  {command}" for command in commands))


def check_arguments(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} is there already: name another, or --overwrite")
    weights = args.weights.split("?")[0]
    if weights and "://" not in weights and not Path(weights).is_file():
        raise UserError(f"--weights {args.weights!r} not found")
    if args.epochs is not None and not 0 < args.epochs < math.inf:
        raise UserError(f"--epochs must be a number above 0, got {args.epochs:g}")


def hold_out(split: Split, photos: Path, output: Path) -> dict[str, Split]:
    """Hold out a part by a fixed seed; both parts are COCO JSON files beside the config."""
    folder = output.resolve().parent / SPLITS_FOLDER
    make_folder(folder)
    parts = split_images(split.content, HELD_OUT, photos.name)
    found = {}
    for name, content in zip(("train", "valid"), parts, strict=True):
        path = folder / f"{output.stem}_{name}.json"
        write_text(path, json.dumps(content))
        found[name] = Split("COCO_JSON", [str(path), split.image_root], content, split.image_root)
    return found


def choose(
    base: CfgNode, args: argparse.Namespace, device: Device, content: dict[str, Any]
) -> Chosen:
    """The sizes of images, anchors and batch, and the length of the training."""
    cfg, tried = base.clone(), []
    for min_sizes, max_size in image_sizes(device, cfg, content):
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = min_sizes, max_size
        scale, recalls = best_anchors(cfg, content)
        tried.append((min_sizes, max_size, scale, recalls))
        if mean_recall(recalls) >= ENOUGH_RECALL:
            break
    # Of sizes that do about as well the smallest, which is the quickest.
    most = max(round(mean_recall(recalls), 2) for *_, recalls in tried)
    sizes = next(x for x in tried if round(mean_recall(x[-1]), 2) == most)
    batch = batch_of(device, base.SOLVER.IMS_PER_BATCH)
    images = len({a["image_id"] for a in content["annotations"]})
    iterations = max(1, math.ceil((args.epochs or device.epochs) * images / batch))
    if args.epochs is None:
        iterations = int(min(max(iterations, device.fewest), device.most))
    return Chosen(*sizes, images, batch, iterations)


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


def best_anchors(cfg: CfgNode, content: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The scale of the config's anchors, and the share of each class's boxes that meet one then."""
    step = max(1, len(content["annotations"]) // MOST_BOXES)
    sample = {**content, "annotations": content["annotations"][::step]}
    grid = AnchorGrid.of(cfg)
    recalls = {s: anchor_recall(cfg, sample, anchors=grid.scaled(s)) for s in ANCHOR_SCALES}
    # Where another scale gains less than two percent, that of the pretrained detectors stays.
    means = {s: mean_recall(of_classes) for s, of_classes in recalls.items()}
    enough = min(max(means.values()) - 0.02, ENOUGH_RECALL)
    scale = next(s for s, recall in means.items() if recall >= enough)
    return scale, recalls[scale]


def batch_of(device: Device, usual: int) -> int:
    """A batch that fits: of the GPU here, some 1.5 GiB for each photo of 800 x 1333."""
    if device.name == "cpu" or not torch.cuda.is_available():
        return usual
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return usual if memory > 15 else 4 if memory > 7 else 2


def data_settings(args: argparse.Namespace, splits: dict[str, Split], judge: str) -> Settings:
    """What is trained on and judged by."""
    entries: dict[str, list[list[str]]] = {}
    for name, split in splits.items():
        entries.setdefault(split.key, []).append([dataset_name(args.photos, name), *split.place])
    paths = "Paths are absolute, so that commands can be run in any folder."
    if all(SPLITS_FOLDER in split.place[0] for split in splits.values()):
        paths += (
            f" {HELD_OUT:.0%} of the photos are held out, drawn by a fixed seed. Frames of one "
            "video must not be on both sides: then split by hand."
        )
    test = "AP is computed on these. Nothing should be chosen on those of the final figure."
    return [
        *((f"DATASETS.{key}", rows, paths) for key, rows in entries.items()),
        ("DATASETS.TRAIN", [dataset_name(args.photos, "train")], ""),
        ("DATASETS.TEST", [dataset_name(args.photos, judge)], test),
    ]


def model_settings(
    base: CfgNode, args: argparse.Namespace, device: Device, chosen: Chosen, names: list[str]
) -> Settings:
    """The detector, its losses and anchors, and the size of its images."""
    weights = args.weights or base.MODEL.WEIGHTS
    if "://" not in weights:
        weights = str(Path(weights).resolve())
    anchors = [
        [round(size * chosen.scale, 2) for size in level]
        for level in base.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    sides = (
        "The smallest sides at which enough boxes meet an anchor: a CPU computes by the pixel."
        if device.name == "cpu"
        else "The photos' own shorter side, or several where they are large."
    )
    return [
        ("_BASE_", get_config_file(device.base), "The detector. What is not here stands there."),
        ("MODEL.DEVICE", device.name, ""),
        ("MODEL.WEIGHTS", weights, "Trained on ImageNet. An address is downloaded once; without a "
         "network: new-config --weights R-50.pkl."),
        ("MODEL.RETINANET.NUM_CLASSES", len(names), ", ".join(map(clean, names))),
        ("MODEL.IOU_BALANCED.CLS_ETA", 1.5, "The paper's powers of the IoU. 0.0 is the plain loss; "
         "`reproduce` trains with both and compares."),
        ("MODEL.IOU_BALANCED.LOC_LAMBDA", 1.5, ""),
        ("MODEL.ANCHOR_GENERATOR.SIZES", anchors, f"{chosen.scale:g} x RetinaNet's usual ones: "
         f"{clean(recall_in_words(chosen.recalls))} meet one at IoU 0.5 then."),
        ("INPUT.MIN_SIZE_TRAIN", list(chosen.min_sizes), sides),
        ("INPUT.MAX_SIZE_TRAIN", chosen.max_size, ""),
        ("INPUT.MIN_SIZE_TEST", chosen.min_sizes[-1], "As in training."),
        ("INPUT.MAX_SIZE_TEST", chosen.max_size, ""),
    ]  # fmt: skip


def solver_settings(
    base: CfgNode, args: argparse.Namespace, device: Device, chosen: Chosen
) -> Settings:
    """The schedule."""
    batch, iterations = chosen.batch, chosen.iterations
    epochs = f"{iterations * batch / chosen.images:.1f} epochs of the {chosen.images} photos with "
    epochs += "objects; more is often better (--epochs)."
    steps = [] if base.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR" else [
        iterations * 2 // 3, iterations * 9 // 10
    ]  # fmt: skip
    fall = "to a tenth at 2/3 and 9/10 of the way" if steps else "to 0, by a cosine"
    return [
        ("DATALOADER.NUM_WORKERS", device.workers, "Processes that read photos."),
        ("SOLVER.IMS_PER_BATCH", batch, "Less takes less memory: see the top."),
        ("SOLVER.BASE_LR", device.lr_per_image * batch, f"By the linear rule: {device.lr_reason}."),
        ("SOLVER.MAX_ITER", iterations, epochs),
        ("SOLVER.STEPS", steps, f"The learning rate falls {fall}."),
        ("SOLVER.WARMUP_ITERS", min(base.SOLVER.WARMUP_ITERS, iterations // 5), "It rises to "
         "BASE_LR first, as the head starts at random."),
        ("SOLVER.CHECKPOINT_PERIOD", max(1, iterations // 3), "A stopped run goes on from the last "
         "one: train --resume."),
        ("OUTPUT_DIR", f"output/{args.output.stem}", ""),
        ("VERSION", 2, ""),
    ]  # fmt: skip


def to_json(value: Any) -> str:
    """JSON that YAML reads alike: what it can't print is one escape, an emoji not two."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def to_yaml(settings: Settings) -> str:
    """Config keys, by section, each with its reason above it."""
    lines: list[str] = []
    sections: list[str] = []
    order = {s[0].split(".")[0]: i for i, s in reversed([*enumerate(settings)])}
    for key, value, reason in sorted(settings, key=lambda s: order[s[0].split(".")[0]]):
        *parents, last = key.split(".")
        shared = [a for a, b in zip(parents, sections, strict=False) if a == b]
        lines += [f"{'  ' * i}{parents[i]}:" for i in range(len(shared), len(parents))]
        sections, indent = parents, "  " * len(parents)
        lines += [f"{indent}# {x}" for x in textwrap.wrap(reason, 96 - len(indent))]
        if isinstance(value, list) and value and isinstance(value[0], list):
            lines += [f"{indent}{last}:", *(f"{indent}  - {to_json(x)}" for x in value)]
        else:
            lines.append(f"{indent}{last}: {to_json(value)}")
    return "\n".join(lines) + "\n"


def heading(args: argparse.Namespace, device: Device, price: str, commands: list[str]) -> str:
    text = (
        f"RetinaNet-R50-FPN with the IoU-balanced losses for {args.photos.resolve().name}, for a "
        f"{'GPU' if device.name == 'cuda' else 'CPU'}. A run takes {price}. Out of memory? On a "
        "GPU set SOLVER.AMP.ENABLED True first. Then halve SOLVER.IMS_PER_BATCH and BASE_LR, and "
        "double MAX_ITER, STEPS and WARMUP_ITERS; or lower INPUT's sizes."
    )
    lines = [*textwrap.wrap(text, 96), "", *commands]
    return "".join(f"# {clean(line)}".rstrip() + "\n" for line in lines)


def next_commands(args: argparse.Namespace) -> list[str]:
    command, config = "python -m iou_balanced_d2", f"--config-file {args.output}"
    train = f"{command} train {config}"
    return [
        f"{train} SOLVER.MAX_ITER 20 OUTPUT_DIR output/{args.output.stem}_try  # does it run?",
        train,
        f"{command} reproduce {config} --seeds 3  # does it help?",
    ]


def summary(splits: dict[str, Split], chosen: Chosen) -> str:
    images = ", ".join(f"{name} {len(s.content['images'])}" for name, s in splits.items())
    names = class_names(splits["train"].content)
    return (
        f"Images: {images}. Classes: {len(names)} ({', '.join(map(clean, names[:8]))})\n"
        f"Sizes: up to {chosen.max_size} px; anchors x {chosen.scale:g}, which "
        f"{clean(recall_in_words(chosen.recalls))} meet\n"
        f"Schedule: {chosen.iterations} iterations of {chosen.batch} images, "
        f"{chosen.iterations * chosen.batch / chosen.images:.1f} epochs"
    )


def cost(cfg: CfgNode, device: Device) -> str:
    """What a run takes, in words; measured here."""
    if device.name == "cuda" and not torch.cuda.is_available():
        return "an unknown time: this machine has no GPU to measure on"
    seconds, gib = measure(cfg)
    minutes, kind = seconds * cfg.SOLVER.MAX_ITER / 60, "GPU" if device.name == "cuda" else "main"
    return (
        f"about {max(minutes, 1):.0f} min of training ({seconds:.2f} s an iteration) and "
        f"{gib:.1f} GiB of {kind} memory (measured here and now), then its evaluation"
    )


def measure(cfg: CfgNode) -> tuple[float, float]:
    """Seconds of an iteration and the peak of memory in GiB, with random weights."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    model = build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    batches = iter(Trainer.build_train_loader(cfg))
    seconds = []
    with EventStorage():
        for _ in range(MEASURED):
            start = time.perf_counter()
            losses = model(next(batches))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            sum(loss.item() for loss in losses.values())  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return median(seconds[1:]), torch.cuda.max_memory_reserved() / GIB
    return median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
