"""The command line: the flags of each command. Nothing heavy is imported, so errors come at once.

``iou-balanced-d2 COMMAND``, ``python -m iou_balanced_d2 COMMAND`` and the scripts of a clone
(``Command.module`` is their name) are the same commands.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

CONVERTED_FORMATS = {
    "labelme": "folder of JSON files; rectangles and polygons",
    "cvat": 'XML file, "CVAT for images"; boxes',
    "via": "JSON file of VGG's Image Annotator, annotations or project; rectangles",
    "voc": "folder of PASCAL VOC's XML files",
    "openimages": "CSV file of boxes",
}
EXPORT_FORMATS = ("torchscript", "onnx")


@dataclass(frozen=True)
class Command:
    """A command."""

    module: str  #: in :mod:`iou_balanced_d2.commands`; its ``run`` gets the arguments
    description: str  #: one line
    add_arguments: Callable[[argparse.ArgumentParser], None]  #: adds its flags to a parser


def parse(name: str, words: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """Parse the flags of a command.

    Args:
        name: in :data:`COMMANDS`.
        words: after the command's name.
        prog: the program's name in errors and in ``--help``.

    Raises:
        UserError: if flags are missing, don't go together, or stand behind KEY VALUE pairs.
    """
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=prog, description=command.description)
    command.add_arguments(parser)
    args = parser.parse_args(words)
    _check_pairs(getattr(args, "opts", []))
    if name == "train" and not args.config_file:
        raise UserError("--config-file is required, e.g. one of those in configs/")
    if name == "analyze":
        if args.run and (args.ground_truth or args.detections or args.images):
            raise UserError("--run brings its own files: give it alone, or --ground-truth etc.")
        if not args.run and not (args.ground_truth and args.detections):
            raise UserError("give --ground-truth and --detections, or --run")
    return args


def _check_pairs(opts: Sequence[str]) -> None:
    """KEY VALUE options come in pairs; a flag among them would be taken for a value."""
    for word in opts:
        if word.startswith("--"):
            raise UserError(f"{word} must stand before the KEY VALUE options ({opts[0]} ...)")
    if len(opts) % 2:
        raise UserError(f"KEY VALUE options come in pairs, but {opts[-1]!r} is left over")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
        return value

    return number


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="config file of the run")


def _add_opts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the run; last")


def launch_argument_parser() -> argparse.ArgumentParser:
    """A parser of detectron2's flags, without a port that two runs would share."""
    parser = argparse.ArgumentParser()
    _add_launch(parser)
    return parser


def _add_launch(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path to config file")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--overwrite", action="store_true", help="delete the training that OUTPUT_DIR holds and "
        "start anew (not with --resume)")  # fmt: skip
    add("--eval-only", action="store_true", help="perform evaluation only")
    add("--num-gpus", type=int, default=1,
        help="number of GPUs *per machine*; on a CPU number of processes")  # fmt: skip
    add("--num-machines", type=int, default=1, help="total number of machines")
    add("--machine-rank", type=int, default=0, help="the rank of this machine (unique)")
    add("--dist-url", default="auto",
        help="tcp://HOST:PORT: the machine with --machine-rank 0, a free port")  # fmt: skip
    add("--dist-timeout", type=float, default=600.0, metavar="SECONDS",
        help="how long processes wait for each other, at the start and later (default: 600)",
        )  # fmt: skip
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config; last")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_launch(parser)
    parser.add_argument("--check-dataset", action="store_true", help="read every image of the data "
                        "sets first (annotations of one's own data sets are always checked)",
                        )  # fmt: skip
    parser.add_argument("--trust-checkpoint", action="store_true", help="load checkpoints that "
                        "hold other Python objects than tensors, arrays and plain containers: this "
                        "can run code, so only files whose origin you trust")  # fmt: skip


def _add_new_config(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("photos", type=Path, help="folder of COCO, VOC or YOLO layout")
    add("--output", type=Path, required=True, metavar="YAML", help="the config file to write")
    add("--device", choices=("cpu", "cuda"), help="what to train on; default: a GPU if there is "
        "one")  # fmt: skip
    add("--weights", default="", help="MODEL.WEIGHTS; default: ImageNet's, which are downloaded")
    add("--epochs", type=float, help="default: what suits the device and the size of the set")
    add("--overwrite", action="store_true", help="replace --output if it is there")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add = parser.add_argument
    add("--quick", action="store_true", help="do not read the images")
    add("--pictures", metavar="FOLDER", help="draw the boxes of some images there")
    add("--strict", action="store_true",
        help="exit with 1 for any problem, not only for those that would spoil a training",
        )  # fmt: skip
    add("--most", type=_at_least(0), default=10, help="problems named of each kind")
    _add_opts(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    formats = (f"{name}: {what}" for name, what in CONVERTED_FORMATS.items())
    parser.epilog = "formats: " + "; ".join(formats)
    add("format", choices=CONVERTED_FORMATS)
    add("annotations", type=Path, help="file or folder")
    add("output", type=Path, help="the COCO JSON file to write")
    add("--images", type=Path, help="folder of the images; default: that of the annotations")
    add("--classes", nargs="+", help="names in their order; default: those found")
    add("--label-key", help="via: the region attribute that is the class")


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ground-truth", metavar="JSON", help="annotations in COCO's format")
    add("--detections", metavar="[NAME=]JSON", nargs="+", help="detections in COCO's result "
        "format, of any framework; several are laid over each other")  # fmt: skip
    add("--images", metavar="FOLDER", help="for pictures of the worst cases")
    add("--run", metavar="[NAME=]OUTPUT_DIR", nargs="+", help="evaluated runs of train_net.py on "
        "the same data set, instead of the files above")  # fmt: skip
    add("--output", metavar="FOLDER", help="for the report; OUTPUT_DIR/alignment")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sides", nargs="+", metavar="[NAME=]RUN[,RUN...]",
        help="run directories or files of detections")  # fmt: skip
    add("--ground-truth", action="append", default=[], metavar="NAME=FILE", help="annotations in "
        "COCO's format, in place of the runs' data sets; may be repeated")  # fmt: skip
    add("--by-dataset", action="store_true", help="runs are of several data sets: compare on "
        "each, and pool; takes records of runs (JSON), too")  # fmt: skip
    add("--output", metavar="DIR", help="folder of the report; none by default")
    add("--resamples", type=int, default=1000, help="default: 1000")
    add("--seed", type=int, default=0, help="of the resampling; default: 0")


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("protocol", nargs="?", help="YAML file, see "
                      "iou_balanced_d2/experiments/protocol.py")  # fmt: skip
    what.add_argument("--config-file", help="any config: run it with and without the IoU-balanced "
                      "losses, --seeds times each")  # fmt: skip
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="of --config-file; default: 3")
    add("--data", default=".", help='what "{data}" in the protocol stands for')
    add("--weights", default="", help="MODEL.WEIGHTS of all runs")
    add("--output", help="folder of the runs; output/<protocol> if not given")
    add("--records", help="folder for a small record of each complete run, see "
        "docs/reproducing.md; of several data sets its detections may then be deleted")  # fmt: skip
    add("--at-once", type=_at_least(1), help="runs at the same time; else what memory and "
        "cores hold, of --config-file one")  # fmt: skip


def _add_visualize(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add = parser.add_argument
    add("--output", help="folder of the pictures; OUTPUT_DIR/pictures if not given")
    add("--num-images", type=_at_least(1), default=16, help="how many to draw of each set")
    add("--threshold", type=float, default=0.4, help="lowest score drawn")
    _add_opts(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add = parser.add_argument
    add("--format", choices=EXPORT_FORMATS, default="torchscript")
    add("--output", required=True, metavar="FOLDER", help="for the files")
    add("--image", metavar="FILE", help="to check with (default: noise)")
    _add_opts(parser)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="pictures, patterns, folders")
    add("--output", required=True, metavar="FOLDER", help="for what is drawn")
    add("--confidence-threshold", type=float, default=0.5, help="lowest score drawn")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the run; last")


COMMANDS = {
    "new-config": Command("new_config", "Write a config for a folder of photos with boxes: one's "
                          "own data, explained value by value.", _add_new_config),
    "check": Command("check_dataset", "Check the data sets of a config before hours are spent on "
                     "them. Nothing is changed.", _add_check),
    "train": Command("train_net", "Train or evaluate a detector from a config file, with "
                     "detectron2's flags.", _add_train),
    "reproduce": Command("reproduce", "Does it help? Train baseline and method with several seeds, "
                         "or carry out a protocol, and compare.", _add_reproduce),
    "compare": Command("compare_runs", "Does run B really beat run A? AP with intervals, p-values "
                       "and what could have been detected.", _add_compare),
    "analyze": Command("analyze_alignment", "Does a detector's score know how good its boxes are? "
                       "Writes a page of figures that show it.", _add_analyze),
    "visualize": Command("visualize_results", "Draw the detections of an evaluated run beside the "
                         "ground truth.", _add_visualize),
    "demo": Command("demo", "Draw what a trained detector finds in pictures of one's own.",
                    _add_demo),
    "export": Command("export_model", "Write a trained detector as a TorchScript or ONNX file, and "
                      "check the file against it.", _add_export),
    "convert": Command("convert_dataset", "Convert annotations of other tools into COCO JSON, for "
                       "DATASETS.COCO_JSON.", _add_convert),
}  # fmt: skip
