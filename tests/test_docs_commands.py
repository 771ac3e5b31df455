"""The commands in the documents: those that can be are run, the others are right as far as known.

They run in a folder with the config of GETTING_STARTED.md on a toy scale, `my.yaml`.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from iou_balanced_d2.arguments import COMMANDS, parse
from iou_balanced_d2.engine import load_config

from .documents import DOCUMENTS, ROOT, blocks, ids, with_blocks

# A command that can't be run in a test says why, at the top of its block or behind it.
MARK = re.compile(r"(?:^|\s)#\s*(needs|takes)\b")


@dataclass(frozen=True)
class Command:
    """The words of a command of a document, and whether it says that it can't be run in a test."""

    words: tuple[str, ...]
    is_marked: bool

    @property
    def script(self):
        """Position of the Python script among the words, or None."""
        return next((i for i, word in enumerate(self.words) if word.endswith(".py")), None)


def commands(text):
    """The commands of a bash block; a mark on a line of its own is one of all that follow."""
    block_is_marked, found = False, []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            found.append(Command(tuple(words), block_is_marked or bool(MARK.search(line))))
        else:
            block_is_marked |= bool(MARK.search(line))
    return found


def commands_of(path):
    return [command for text in blocks(path, "bash") for command in commands(text)]


def test_marks_of_commands_are_read():
    assert commands("# takes hours\na b \\\n    'c d'  # what\n") == [
        Command(("a", "b", "c d"), True)
    ]
    assert commands("# a first\na\nb   # needs a GPU\nc # says what it needs\n") == [
        Command(("a",), False),
        Command(("b",), True),
        Command(("c",), False),
    ]


@pytest.mark.parametrize("path", with_blocks("bash"), ids=ids)
def test_commands_are_right(path, monkeypatch):
    """Files, flags and keys, whether a command is also run or not."""
    monkeypatch.chdir(ROOT)
    for command in commands_of(path):
        words, script = command.words, command.script
        for word in words:
            if word.startswith(("configs/", "projects/", "tools/", "tests/")):
                assert Path(word).exists(), f"{path.name}: {word} does not exist"
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], check=True, capture_output=True)
        elif script is None:
            module = words[words.index("-m") + 1] if "-m" in words else None
            assert command.is_marked or (words[0] == "python" and find_spec(module)), words
        else:
            check_arguments(command, script, monkeypatch)


def check_arguments(command, script, monkeypatch):
    name, arguments = command.words[script], list(command.words[script + 1 :])
    for command_name, ours in COMMANDS.items():
        if Path(name).stem == ours.module:
            args = parse(command_name, arguments)
            if command_name == "train" and args.config_file != "my.yaml":
                load_config(args.config_file, args.opts)
            return
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    names = runpy.run_path(name, run_name="docs")
    if "parse_arguments" in names:
        names["parse_arguments"]()
    elif "launch_argument_parser" in names:
        names["load"](names["launch_argument_parser"]().parse_args(arguments))  # checks the keys
    else:
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in Path(name).read_text(), f"{name} has no flag {flag}"


TOY = {
    "MODEL": {
        "WEIGHTS": "",
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "BN"},
        "FPN": {"OUT_CHANNELS": 16},
        "RETINANET": {"NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 2, "STEPS": [1]},
}
DATA = Path("data/vehicles")
VALID, IMAGES = DATA / "valid.json", DATA / "images"
RESULTS = Path("output/inference/vehicles_valid/coco_instances_results.json")


def write_data():
    """The data set that GETTING_STARTED.md's config is about: some bright boxes."""
    IMAGES.mkdir(parents=True)
    images, annotations = [], []
    for i in range(4):
        image = np.full((64, 64, 3), 40, np.uint8)
        image[10 + i : 40 + i, 8:36] = 220
        cv2.imwrite(str(IMAGES / f"{i}.jpg"), image)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 64})
        annotations.append(
            {"id": i + 1, "image_id": i, "category_id": 1 + i, "bbox": [8, 10 + i, 28, 30],
             "area": 840, "iscrowd": 0}
        )  # fmt: skip
    categories = [{"id": i, "name": f"kind {i}"} for i in range(1, 6)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name in ("train", "valid"):
        (DATA / f"{name}.json").write_text(json.dumps(content))


def write_what_commands_take():
    """Evaluated runs, detections and pictures by the names that the documents give them."""
    runs = ["baseline", "iou_balanced", "baseline_seed1", "both_seed1"]
    for name in [*(f"output/{run}" for run in runs), "out_plain", "out_balanced"]:
        ignore = shutil.ignore_patterns("*.pth", *runs)
        shutil.copytree("output", name, ignore=ignore)
    shutil.copy("output/model_final.pth", "output/model_ema.pth")
    for name in ("a.json", "b.json"):
        shutil.copy(RESULTS, name)
    shutil.copy(VALID, "instances_val2017.json")
    for name in ("photos", "more", "val2017"):
        shutil.copytree(IMAGES, name)
    shutil.copy(IMAGES / "0.jpg", "photo.jpg")
    shutil.copytree(ROOT / "docs/evidence", "docs/evidence")


def execute(words, folder, output):
    """Run ``python WORDS`` in this process, which is a fresh one, and end it with its exit code."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    is_module = words[0] == "-m"
    sys.argv = list(words[is_module:])
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            if is_module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            code = traceback.format_exc()
        if isinstance(code, str):
            print(code)
    os._exit(code if isinstance(code, int) else 1)


@functools.cache
def run(words, folder):
    """Run ``python WORDS`` as in a shell, but for the time that imports take; once each."""
    output = folder / "console.txt"
    process = multiprocessing.get_context("forkserver").Process(
        target=execute, args=(words, folder, output)
    )
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{shlex.join(words)}\n{output.read_text()[-3000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's clone with `my.yaml`, GETTING_STARTED.md's config on a toy scale, trained."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train_net.py", "tools", "demo", "configs", "projects", "iou_balanced_d2"):
        (folder / name).symlink_to(ROOT / name)
    (documented,) = blocks(ROOT / "GETTING_STARTED.md", "yaml")
    (folder / "documented.yaml").write_text(documented)
    (folder / "my.yaml").write_text(yaml.safe_dump({"_BASE_": "documented.yaml", **TOY}))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["iou_balanced_d2.engine", "iou_balanced_d2.analysis.comparison"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data()
        run(("train_net.py", "--config-file", "my.yaml"), folder)
        write_what_commands_take()
    return folder


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if any(not c.is_marked for c in commands_of(path))], ids=ids
)
def test_commands_run(path, folder):
    for command in commands_of(path):
        if not command.is_marked:
            assert command.words[0] == "python", f"{command.words}: neither run here nor marked"
            run(command.words[1:], folder)


def lines_after(text, path):
    """The code of a document that stands indented behind a text."""
    (code,) = re.findall(rf"{text}\n\n((?:    .*\n)+)", path.read_text())
    return textwrap.dedent(code)


CONFIG = 'load_config("my.yaml", ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", "own", "SEED", "1"])'
# Document -> lines that call what its Python code defines, in the folder with all that is needed.
CALLS = {
    "DATASETS.md": f"""
from iou_balanced_d2.data import check_datasets
from iou_balanced_d2.engine import load_config
{lines_after("is trained by", ROOT / "DATASETS.md").replace('load_config("my.yaml")', CONFIG)}
assert os.path.exists("own/model_final.pth")
""",
    "docs/alignment.md": """
os.chdir("data/vehicles")
report("valid.json", "../../a.json")
assert os.path.exists("report/index.html")
""",
    "docs/comparing_runs.md": """
report(["output/baseline", "output/baseline_seed1"], ["output/both_seed1"], "compared")
assert os.path.exists("compared/comparison.html")
""",
    "docs/evaluation.md": f"""
from iou_balanced_d2.data import check_datasets
from iou_balanced_d2.engine import Trainer, load_config
cfg = {CONFIG}
check_datasets(cfg, training=False)
loader = Trainer.build_test_loader(cfg, "vehicles_valid")
results = evaluate(Trainer.build_model(cfg), loader, "vehicles_valid", "evaluated")
assert results["bbox"]["AP"] >= 0
""",
    "docs/export.md": """
import cv2, numpy as np
image = cv2.imread("photo.jpg").transpose(2, 0, 1).astype(np.float32)
boxes, scores, classes = detect(image)
assert boxes.shape == (len(scores), 4)
assert len(scores) == len(classes) > 0
""",
    "docs/robustness.md": f"""
import itertools
from iou_balanced_d2.engine import load_config
cfg = {CONFIG}
batches = {{i: list(itertools.islice(batches_from(cfg, i), 4)) for i in (0, 2)}}
names = {{i: [[x["file_name"] for x in batch] for batch in batches[i]] for i in batches}}
assert names[2][:2] == names[0][2:]
assert all(len(batch) == 2 for batch in names[0])
""",
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_run(name, folder):
    path, script = ROOT / name, f"calls_of_{Path(name).stem}.py"
    if name == "docs/export.md":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        test_commands_run(path, folder)  # of which one writes the file
    code = "\n".join(["import os", *blocks(path, "python"), CALLS[name]])
    (folder / script).write_text(code)
    run((script,), folder)
