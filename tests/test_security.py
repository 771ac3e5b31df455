"""What comes from others - checkpoints, configs, annotations - runs no code and stays in its place.

Checkpoints that hold code are tried in tests/engine/test_checkpoint.py.
"""

import ast
import copy
import json
import os
import pickle
import re
import socket
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from iou_balanced_d2.analysis.page import Page
from iou_balanced_d2.commands import run_command
from iou_balanced_d2.data import conversion, register_coco_json, register_voc_folder
from iou_balanced_d2.data.anchors import anchor_recall
from iou_balanced_d2.data.checks import check_datasets
from iou_balanced_d2.data.coco_format import read_coco_json
from iou_balanced_d2.data.conversion import check_name
from iou_balanced_d2.data.inspection import inspect_annotations, inspect_images
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.engine.safe_load import PlainUnpickler, read_checkpoint
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from .command import forget_own_data

ROOT = Path(__file__).parent.parent
CONFIG = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sources():
    folders = ("iou_balanced_d2", "projects", "tools", "demo")
    return [ROOT / "train_net.py", *(f for name in folders for f in (ROOT / name).rglob("*.py"))]


def calls():
    """(file, dotted name of what is called, the call) of all of the project's code."""
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield file.relative_to(ROOT), ast.unparse(node.func), node


def test_nothing_reads_files_in_a_way_that_runs_code():
    """YAML safely, checkpoints by weights_only, no eval; LazyConfigs, which are code, are named."""
    lazy = set()
    for file, name, call in calls():
        arguments = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name.endswith(".merge_from_file"):
            assert arguments.get("allow_unsafe") == "False", file
        if name == "torch.load":
            assert arguments.get("weights_only") in ("True", "not trust"), file
        if name == "LazyConfig.load":
            lazy.add(str(file))
        assert name not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "pickle.load",
                            "pickle.loads", "os.system"), (file, name)  # fmt: skip
        if name == "np.load":
            assert arguments.get("allow_pickle", "False") == "False", file
        assert arguments.get("shell", "False") == "False", file
    assert lazy == {"iou_balanced_d2/model_zoo/__init__.py", "tools/lazyconfig_train_net.py"}


@pytest.mark.parametrize("where", ["file", "base"])
@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]",
     "!!python/name:os.mkdir"],
)  # fmt: skip
def test_a_config_that_would_run_code_is_refused(tmp_path, where, tag):
    made = tmp_path / "made"
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text(f"OUTPUT_DIR: {tag.format(json.dumps(str(made)))}\n")
    good.write_text("_BASE_: bad.yaml\n")
    file = bad if where == "file" else good
    with pytest.raises(UserError) as caught:
        load_config(str(file))
    message = str(caught.value)
    assert message.startswith(f"config file {str(file)!r}: only plain values are allowed: ")
    assert f"in line 1 of {str(bad)!r}" in message
    assert "\n" not in message
    assert not made.exists()


@pytest.mark.parametrize("where", ["file", "base"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [{f'*x{i - 1},' * 9}]\n" for i in range(1, 30)),
            "has over 100000 values, as its aliases (*) repeat them",
        ),
        ("OUTPUT_DIR: &x [*x]\n", "has over 100000 values"),
        ("[" * 100_000, "recursion"),
        ("_BASE_: bad.yaml\n", "leads back to itself"),
        ("_BASE_: good.yaml\n", "leads back to itself"),
    ],
    ids=["a bomb", "a circle", "deep", "itself", "a circle of files"],
)  # fmt: skip
def test_a_config_that_takes_forever_is_refused(tmp_path, where, text, said):
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("_BASE_: bad.yaml\n")
    file = tmp_path / ("bad.yaml" if where == "file" else "good.yaml")
    with pytest.raises(UserError) as caught:
        load_config(str(file))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_of_a_usual_number_are_read(tmp_path):
    """PyYAML writes them for values that are one object."""
    (tmp_path / "x.yaml").write_text(
        "SOLVER:\n  STEPS: &id001 [7, 8]\nTEST:\n  AUG:\n    MIN_SIZES: *id001\n"
    )
    assert load_config(str(tmp_path / "x.yaml")).TEST.AUG.MIN_SIZES == (7, 8)


def test_options_of_the_command_line_are_values_only(tmp_path):
    word = f"__import__('os').mkdir({str(tmp_path / 'made')!r})"
    cfg = load_config(CONFIG, ["OUTPUT_DIR", word])
    assert word == cfg.OUTPUT_DIR
    assert not (tmp_path / "made").exists()


def names_of_paths():
    """Names made of what paths are made of, and any others."""
    pieces = st.sampled_from(["..", ".", "/", "\\", "a", "~", "%2e", " ", "\n", "\0", "é", "$x"])
    return st.lists(pieces, max_size=6).map("".join) | st.text(max_size=300)


@quick
@given(name=names_of_paths())
def test_a_data_set_s_name_is_a_folder_in_the_output_folder(tmp_path, name):
    """Or it is refused in one line; whatever is made of it has the folder as its parent."""
    try:
        register_coco_json(name, "a.json", "images")
    except UserError as error:
        message = str(error)
        assert message.startswith("DATASETS.COCO_JSON: the name ")
        assert message.isprintable()
        return
    try:
        folder = os.path.normpath(tmp_path / "inference" / name)
        assert os.path.dirname(folder) == str(tmp_path / "inference")
        os.makedirs(os.path.join(tmp_path, "inference", name), exist_ok=True)
        file = tmp_path / f"{name}_coco_format.json"
        file.touch()
        assert file.resolve().parent == tmp_path.resolve()
    finally:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../../x", "/tmp/x", "a\\b", "a\nb", "x" * 300]
)
def test_names_that_lead_elsewhere_are_refused(name):
    for register, key in ((register_coco_json, "COCO_JSON"), (register_voc_folder, "VOC_FOLDER")):
        with pytest.raises(UserError, match=rf"DATASETS\.{key}: the name .* choose another one"):
            register(name, "a", "b")


def test_good_names_are_not_refused():
    for name in ("coco_2017_val", "My data (v2.1)", "données", "..x", "$HOME", "x" * 200):
        check_name(name)


@dataclass(frozen=True)
class Converted:
    """A source of annotations whose conversion is empty."""

    folder: str
    metadata: ClassVar[dict[str, Any]] = {}

    @property
    def path(self):
        return self.folder

    image_root = path

    def fingerprint(self):
        return []

    def convert(self):
        return {"images": [], "annotations": [], "categories": []}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A data folder that came from others, and a folder of the user's own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("mine")
    return Converted(str(tmp_path / "data"))


def check_untouched(tmp_path):
    assert os.listdir(tmp_path / "precious") == ["file"]
    assert (tmp_path / "precious/file").read_text() == "mine"


def test_a_cache_folder_that_is_a_link_is_not_written_through(tmp_path, source):
    (tmp_path / "data/iou_balanced_cache").symlink_to(tmp_path / "precious")
    assert Path(conversion.cached_json("x", source)).is_relative_to(tmp_path / "home")
    check_untouched(tmp_path)


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path, source):
    (tmp_path / "data/iou_balanced_cache").mkdir()
    (tmp_path / "data/iou_balanced_cache/x.lock").symlink_to(tmp_path / "precious/new")
    assert Path(conversion.cached_json("x", source)).is_relative_to(tmp_path / "home")
    check_untouched(tmp_path)


def own(own_data, *opts):
    """Options of a config with one's own data."""
    forget_own_data()
    return [
        "MODEL.RETINANET.NUM_CLASSES", "2", "DATASETS.COCO_JSON", repr((("own", *own_data),)),
        "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", *opts,
    ]  # fmt: skip


def test_pictures_stay_in_their_folder_whatever_images_are_called(tmp_path, own_data, monkeypatch):
    """Images from outside of the folder are read; of equal names none takes another one's place."""
    file = Path(own_data[0])
    content = json.loads(file.read_text())
    outside = tmp_path / "outside"
    outside.mkdir()
    picture = np.full((64, 64, 3), 90, np.uint8)
    cv2.imwrite(str(outside / "0.png"), picture)
    (tmp_path / "images/sub").mkdir()
    cv2.imwrite(str(tmp_path / "images/sub/0.png"), picture)
    names = ["0.png", "../outside/0.png", str(outside / "0.png"), "sub/../sub/0.png"]
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    file.write_text(json.dumps(content))
    output = tmp_path / "run"
    (output / "inference/own").mkdir(parents=True)
    (output / "inference/own/coco_instances_results.json").write_text("[]")
    before = {path for path in tmp_path.rglob("*") if output not in [path, *path.parents]}
    argv = [
        "visualize_results.py",
        "--config-file",
        CONFIG,
        *own(own_data, "OUTPUT_DIR", str(output)),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_command("visualize") == 0
    assert sorted(os.listdir(output / "pictures")) == [
        "own_0.png", "own_0_2.png", "own_0_3.png", "own_0_4.png",
    ]  # fmt: skip
    cache = tmp_path / "iou_balanced_cache"
    kept = {path for path in tmp_path.rglob("*") if not {output, cache} & {path, *path.parents}}
    assert kept == before
    assert cv2.imread(str(outside / "0.png")).mean() == 90


def voc_folder(folder, ids, images=("0",)):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for image in images:
        (folder / "JPEGImages" / f"{image}.jpg").touch()
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(ids))
    return folder


@quick
@given(id_=names_of_paths().map(str.strip).filter(bool))
def test_image_ids_of_voc_folders_do_not_lead_elsewhere(tmp_path_factory, id_):
    """An id is one of the images in JPEGImages, or an error of one line."""
    folder = voc_folder(tmp_path_factory.mktemp("voc"), [])
    (folder / "ImageSets/Main/train.txt").write_text(id_, encoding="utf-8", errors="replace")
    register_voc_folder("own_voc", str(folder), "train", ["x"])
    try:
        with pytest.raises(UserError) as caught:
            DatasetCatalog["own_voc"].prepare()
        assert "\n" not in str(caught.value).strip("\n")
    finally:
        DatasetCatalog.remove("own_voc")
        MetadataCatalog.remove("own_voc")


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.content = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.content += data


@quick
@given(
    name=st.text(max_size=40)
    | st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=a>', "]]>", "&lt;b>"])
)
@example(name="\x01")  # tabulate's own sign for a line between rows
@example(name="\ud800")  # as JSON may hold it; not to be written as UTF-8
def test_names_on_a_page_are_text(tmp_path, name):
    picture = tmp_path / "x.png"
    if not picture.exists():
        cv2.imwrite(str(picture), np.zeros((2, 2, 3), np.uint8))

    def page_of(text):
        page = Page(text)
        page.heading(text)
        page.text(text)
        page.table([text, "b"], [[text, 1.0]])
        page.tiles([picture], [text])
        page.figure(picture, text)
        page.link(text, "other.html")
        return page.html()

    page_of(name).encode()
    plain, page = Tags(page_of("plain")), Tags(page_of(name))
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes


def used(function, *args):
    """The result, or None for what is refused, in one line."""
    try:
        return function(*args)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


GOOD = {
    "images": [{"id": 1, "file_name": "a.png", "height": 9, "width": 9}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
    "categories": [{"id": 1, "name": "x"}],
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@quick
@given(
    place=st.sampled_from([(s, f) for s, rows in GOOD.items() for f in rows[0]]), value=json_values
)
def test_any_value_in_annotations_is_used_or_refused_in_one_line(tmp_path, place, value):
    content = copy.deepcopy(GOOD)
    content[place[0]][0][place[1]] = value
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    if (read := used(read_coco_json, str(file))) is None:
        return
    inspect_annotations(read)
    inspect_images(read, str(tmp_path))
    anchor_recall(load_config(CONFIG), read)


@quick
@given(content=st.binary(max_size=200) | json_values.map(lambda x: pickle.dumps(x, protocol=2)))
def test_any_bytes_are_a_checkpoint_or_refused_in_one_line(tmp_path, content):
    for suffix in (".pkl", ".pth"):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        used(read_checkpoint, str(file))


def test_the_unpickler_knows_arrays_and_plain_containers_only():
    unpickler = PlainUnpickler(open(os.devnull, "rb"))  # noqa: SIM115
    for module, names in (
        ("os", ("system",)), ("builtins", ("eval", "getattr", "bytes")), ("__builtin__", ("eval",)),
        ("numpy", ("load", "fromfile", "memmap")), ("subprocess", ("Popen",)),
        ("torch", ("load",)), ("torch._utils", ("_rebuild_tensor_v2",)),
        ("functools", ("partial",)), ("_codecs", ("decode",)), ("numpy.testing._private.utils",
                                                               ("runstring",)),
    ):  # fmt: skip
        for name in names:
            with pytest.raises(pickle.UnpicklingError, match=re.escape(f"{module}.{name}")):
                unpickler.find_class(module, name)
    assert {type(unpickler.find_class(m, n)) for m, n in (("numpy", "ndarray"),)} == {str}


def test_weights_that_can_not_be_downloaded_are_one_line(own_config, monkeypatch, capsys):
    """Nobody listens at the address; by the command, with exit code 2."""
    monkeypatch.chdir(own_config.parent)
    monkeypatch.setenv("FVCORE_CACHE", str(own_config.parent / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}/x.pth"
        argv = ["train_net.py", "--config-file", str(own_config), "MODEL.WEIGHTS", address]
        monkeypatch.setattr(sys, "argv", argv)
        forget_own_data()
        assert run_command("train") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"train_net.py: error: {address!r} can't be downloaded: ")
    assert "download it elsewhere" in message


def test_all_kinds_of_bad_images_are_listed_at_once(own_data, monkeypatch, capsys):
    folder = Path(own_data[1])
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:70])
    cv2.imwrite(str(folder / "2.png"), np.zeros((32, 64, 3), np.uint8))
    content = json.loads(Path(own_data[0]).read_text())
    content["annotations"][3]["category_id"] = 5
    Path(own_data[0]).write_text(json.dumps(content))
    kinds = ("unknown category", "missing image", "unreadable image", "size mismatch")
    with pytest.raises(UserError) as caught:
        check_datasets(load_config(CONFIG, own(own_data)), training=True, read_images=True)
    message = str(caught.value)
    assert "\n" not in message
    for kind in kinds:
        assert f"1 x {kind}: " in message
    argv = ["check_dataset.py", "--config-file", CONFIG, "--strict", *own(own_data)]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_command("check") == 1
    out = capsys.readouterr().out
    for kind in kinds:
        assert f"{kind}: 1 (" in out
