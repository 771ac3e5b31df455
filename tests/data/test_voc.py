"""VOC's layout: coordinates, difficult objects, unions, folders of one's own, broken files."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode

from iou_balanced_d2.config import add_iou_balanced_config
from iou_balanced_d2.data import (
    check_difficult_policy,
    prepare_dataset,
    register_datasets_of,
    register_voc_folder,
    training_dicts,
)
from iou_balanced_d2.data.conversion import register_converted
from iou_balanced_d2.data.loading import load_training_dicts
from iou_balanced_d2.data.voc import VOC_CLASSES, VocSource, parse_voc_xml, register_voc
from iou_balanced_d2.engine import Trainer, load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from ..toy import toy_config

BCCD = Path(__file__).parent.parent.parent.parent / "shared/data/bccd"


def xml(*objects, size="<size><width>20</width><height>10</height><depth>3</depth></size>"):
    """An annotation; each object is (class, xmin, ymin, xmax, ymax, difficult)."""
    text = "".join(
        f"<object><name>{name}</name>{'' if d is None else f'<difficult>{d}</difficult>'}<bndbox>"
        f"<xmax>{x2}</xmax><xmin>{x1}</xmin><ymax>{y2}</ymax><ymin>{y1}</ymin></bndbox>"
        "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></part></object>"
        for name, x1, y1, x2, y2, d in objects
    )
    return f"<annotation>{size}{text}</annotation>"


def write_voc(folder, splits, annotations):
    """Write a folder of VOC's layout: {split: ids} and {id: XML}."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    for i, text in annotations.items():
        (folder / "Annotations" / f"{i}.xml").write_text(text)
        cv2.imwrite(str(folder / "JPEGImages" / f"{i}.jpg"), np.zeros((10, 20, 3), np.uint8))


@pytest.fixture(autouse=True)
def _catalog(tmp_path, monkeypatch):
    """Puts back what was registered, and keeps the user's cache out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = dict(DatasetCatalog), dict(MetadataCatalog)
    # Other tests leave data sets of this name behind.
    DatasetCatalog.pop("own", None)
    MetadataCatalog.pop("own", None)
    yield
    for catalog, content in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        catalog.clear()
        catalog.update(content)


@pytest.fixture
def folder(tmp_path):
    """A folder of one's own: 2 images to train on, 1 to validate on, which alone has a zebra."""
    write_voc(
        tmp_path / "own",
        {"train": ["a", "b"], "val": ["c"]},
        {
            "a": xml(("dog", 1, 1, 20, 10, 0), ("cat", 3, 2, 3, 7, 1)),
            "b": xml(("cat", 5, 5, 5, 5, None), ("cat", 2.5, 1, 7.5, 6, 1)),
            "c": xml(("zebra", 4, 3, 10, 9, 1)),
        },
    )
    return tmp_path / "own"


def content_of(name):
    prepare_dataset(name)
    return json.loads(Path(MetadataCatalog.get(name).json_file).read_text())


def test_coordinates_are_edges_of_1_based_inclusive_pixels(folder):
    register_voc_folder("own", str(folder), "train")
    content = content_of("own")
    boxes = [a["bbox"] for a in content["annotations"]]
    # XYWH: the whole image, a column of 6 pixels, corners that coincide, fractions as they are.
    assert boxes == [[0, 0, 20, 10], [2, 1, 1, 6], [4, 4, 0, 0], [1.5, 0, 6.0, 6]]
    assert [a["area"] for a in content["annotations"]] == [200, 6, 0, 36]
    records = DatasetCatalog.get("own")
    first = records[0]["annotations"][0]
    assert BoxMode.convert(first["bbox"], first["bbox_mode"], BoxMode.XYXY_ABS) == [0, 0, 20, 10]


def test_boxes_equal_detectron2s(folder):
    """Against detectron2's own reader of VOC."""
    from detectron2.data.datasets.pascal_voc import load_voc_instances

    register_voc_folder("own", str(folder), "train", ["cat", "dog"])
    for ours, theirs in zip(
        DatasetCatalog.get("own"),
        load_voc_instances(str(folder), "train", ["cat", "dog"]),
        strict=True,
    ):
        assert ours["file_name"] == theirs["file_name"]
        assert (ours["height"], ours["width"]) == (theirs["height"], theirs["width"])
        for a, b in zip(ours["annotations"], theirs["annotations"], strict=True):
            assert a["category_id"] == b["category_id"]
            if a["bbox"][2] > 0:  # but where corners coincide
                assert BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) == b["bbox"]


def test_difficult_is_a_field_of_its_own(folder):
    register_voc_folder("own", str(folder), "train")
    annotations = content_of("own")["annotations"]
    assert [a["difficult"] for a in annotations] == [0, 1, 0, 1]
    assert {(a["iscrowd"], a["ignore"]) for a in annotations} == {(0, 0)}


def test_classes_are_those_of_the_whole_folder(folder):
    register_voc_folder("own_train", str(folder), "train")
    register_voc_folder("own_val", str(folder), "val")
    for name, images in (("own_train", 2), ("own_val", 1)):
        assert len(content_of(name)["images"]) == images
        assert MetadataCatalog.get(name).thing_classes == ["cat", "dog", "zebra"]
        assert MetadataCatalog.get(name).voc_style is True


def test_given_classes_keep_their_order(folder):
    register_voc_folder("own", str(folder), "train", ["dog", "horse", "cat"])
    assert MetadataCatalog.get("own").thing_classes == ["dog", "horse", "cat"], "read nothing yet"
    labels = [a["category_id"] for r in DatasetCatalog.get("own") for a in r["annotations"]]
    assert labels == [0, 2, 2, 2]


@pytest.mark.parametrize(
    ("policy", "left"), [("ignore", [1, 1, 0]), ("drop", [1, 1, 0]), ("count", [2, 2, 1])]
)
def test_the_policy_in_training(folder, policy, left):
    register_voc_folder("own_train", str(folder), "train")
    register_voc_folder("own_val", str(folder), "val")
    dicts = DatasetCatalog.get("own_train") + DatasetCatalog.get("own_val")
    before = json.dumps(dicts)
    kept = training_dicts(dicts, policy)
    assert [len(d["annotations"]) for d in kept] == left
    if policy != "count":
        assert all(a["difficult"] == 0 for d in kept for a in d["annotations"])
    assert json.dumps(dicts) == before, "those given are not changed"


@pytest.mark.parametrize(
    ("policy", "trained", "evaluated", "ignored"),
    [("ignore", 3, 4, 1), ("drop", 3, 3, 0), ("count", 4, 4, 0)],
)
def test_training_and_evaluation_follow_the_config(
    tmp_path, own_data, policy, trained, evaluated, ignored
):
    content = json.loads(Path(own_data[0]).read_text())
    content["annotations"][2]["difficult"] = 1
    Path(own_data[0]).write_text(json.dumps(content))
    cfg = toy_config(
        "DATASETS.COCO_JSON", [["own", *own_data]], "DATASETS.TRAIN", ("own",),
        "DATASETS.VOC_DIFFICULT", policy, "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    register_datasets_of(cfg)
    assert sum(len(d["annotations"]) for d in load_training_dicts(cfg)) == trained
    ground_truth = Trainer.build_evaluator(cfg, "own")._ground_truth
    assert len(ground_truth.boxes) == evaluated
    assert ground_truth.ignored.sum() == ignored


def test_the_policy_leaves_other_data_sets_alone():
    dicts = [{"file_name": "a"}, {"file_name": "b", "annotations": [{"bbox": [0, 0, 1, 1]}]}]
    assert training_dicts(dicts, "ignore") == dicts


def test_an_unknown_policy_is_one_line():
    with pytest.raises(UserError, match=r"DATASETS\.VOC_DIFFICULT must be one of 'ignore'"):
        training_dicts([], "skip")
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    check_difficult_policy(cfg.DATASETS.VOC_DIFFICULT)


def test_the_union_numbers_images_through(tmp_path):
    dog, cat = xml(("dog", 1, 1, 2, 2, 0)), xml(("cat", 1, 1, 2, 2, 0))
    write_voc(tmp_path / "VOC2007", {"trainval": ["000005"], "test": ["000006"]},
              {"000005": dog, "000006": cat})  # fmt: skip
    write_voc(tmp_path / "VOC2012", {"trainval": ["2008_1", "2008_2"]},
              {"2008_1": cat, "2008_2": dog})  # fmt: skip
    for name in [n for n in DatasetCatalog if n.startswith("voc_") and n.endswith("_coco")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_voc(str(tmp_path))
    records = DatasetCatalog.get("voc_0712_trainval_coco")
    assert [r["image_id"] for r in records] == [1, 2, 3]
    assert all(Path(r["file_name"]).is_file() for r in records)
    assert "VOC2012/JPEGImages/2008_2.jpg" in records[2]["file_name"]
    labels = [VOC_CLASSES[r["annotations"][0]["category_id"]] for r in records]
    assert labels == ["dog", "cat", "dog"]
    assert len(DatasetCatalog.get("voc_2007_test_coco")) == 1
    metadata = [MetadataCatalog.get(n) for n in ("voc_0712_trainval_coco", "voc_2007_test_coco")]
    assert metadata[0].thing_classes == metadata[1].thing_classes == list(VOC_CLASSES)


def test_names_and_classes_of_voc():
    assert VOC_CLASSES == CLASS_NAMES
    for year, split in [*((2007, s) for s in ("train", "val", "trainval", "test")),
                        *((2012, s) for s in ("train", "val", "trainval"))]:  # fmt: skip
        metadata = MetadataCatalog.get(f"voc_{year}_{split}_coco")
        assert (metadata.evaluator_type, metadata.voc_style) == ("coco", True)
        assert metadata.thing_classes == list(VOC_CLASSES)
        assert f"voc_{year}_{split}" in DatasetCatalog, "detectron2's own"


def test_changed_added_and_removed_annotations_are_seen(folder):
    register_voc_folder("own", str(folder), "train")
    assert len(content_of("own")["annotations"]) == 4
    assert len(DatasetCatalog.get("own")) == 2
    (folder / "Annotations/a.xml").write_text(xml(("dog", 1, 1, 20, 10, 0)))
    assert len(content_of("own")["annotations"]) == 3
    write_voc(folder, {"train": ["a", "b", "d"]}, {"d": xml(("emu", 1, 1, 2, 2, 0))})
    content = content_of("own")
    assert [len(content[k]) for k in ("images", "annotations", "categories")] == [3, 4, 4]
    labels = [a["category_id"] for r in DatasetCatalog.get("own") for a in r["annotations"]]
    assert [content["categories"][label]["name"] for label in labels] == [
        "dog",
        "cat",
        "cat",
        "emu",
    ]
    write_voc(folder, {"train": ["a"]}, {})
    assert len(content_of("own")["annotations"]) == 1
    (folder / "JPEGImages/a.jpg").rename(folder / "JPEGImages/a.png")
    assert Path(DatasetCatalog.get("own")[0]["file_name"]).is_file()
    # Of another split, but the classes come from all.
    (folder / "Annotations/d.xml").unlink()
    assert [c["name"] for c in content_of("own")["categories"]] == ["cat", "dog", "zebra"]
    assert len(list((folder / "iou_balanced_cache").glob("own-*.json"))) == 1


def test_unchanged_annotations_are_not_read_again(folder, monkeypatch):
    register_voc_folder("own", str(folder), "train")
    prepare_dataset("own")
    monkeypatch.setattr(VocSource, "convert", None)
    assert len(DatasetCatalog.get("own")) == 2


def test_other_image_formats_and_files_beside_them(folder):
    (folder / "JPEGImages/a.jpg").rename(folder / "JPEGImages/a.PNG")
    (folder / "JPEGImages/a.txt").write_text("")
    (folder / "JPEGImages/b.xml").write_text("")
    register_voc_folder("own", str(folder), "train")
    names = [Path(r["file_name"]).name for r in DatasetCatalog.get("own")]
    assert names == ["a.PNG", "b.jpg"]


def test_of_two_images_the_list_or_else_the_xml_names_one(folder):
    for name in "ab":
        (folder / f"JPEGImages/{name}.png").write_bytes(b"a mask")
    register_voc_folder("own", str(folder), "train")
    names = lambda: [Path(i["file_name"]).name for i in content_of("own")["images"]]  # noqa: E731
    assert names() == ["a.png", "b.png"]
    (folder / LIST).write_text("a.jpg 1\nb\n")
    assert names() == ["a.jpg", "b.png"]
    named = "<annotation><filename>C:\\photos\\{}.jpg</filename>"
    for name, stated in (("a", "b"), ("b", "b")):
        file = folder / f"Annotations/{name}.xml"
        file.write_text(file.read_text().replace("<annotation>", named.format(stated)))
    assert names() == ["a.jpg", "b.jpg"]
    (folder / LIST).write_text("a\nJPEGImages/b.png\n")
    assert names() == ["a.png", "b.png"], "another image's name, and the list comes first"


def spoil(path, text):
    """A change of one file, or its removal."""

    def change(folder):
        (folder / path).write_text(text) if text is not None else (folder / path).unlink()

    return change  # fmt: skip


DOG = ("dog", 1, 1, 20, 10, 0)
# What is wrong -> (change of the folder, what the message must say).
BROKEN = {
    "no folder": (shutil.rmtree, "own/JPEGImages: not found; VOC's layout is"),
    "no annotations": (lambda f: shutil.rmtree(f / "Annotations"), "Annotations"),
    "no split": (spoil("ImageSets/Main/train.txt", None), "train.txt: can't be read"),
    "empty split": (spoil("ImageSets/Main/train.txt", "\n"), "train.txt: lists no image"),
    "image twice": (spoil("ImageSets/Main/train.txt", "a\na\n"), "train.txt: lists 'a' twice"),
    "no image": (spoil("JPEGImages/b.jpg", None), "train.txt: lists 'b', of which JPEGImages"),
    "no XML": (spoil("Annotations/a.xml", None), "a.xml: can't be read: No such file"),
    "broken XML": (spoil("Annotations/a.xml", "<annotation>"), "a.xml: not an XML file"),
    "no size": (spoil("Annotations/a.xml", xml(DOG, size="")), "a.xml: no <size/width>"),
    "size 0": (
        spoil("Annotations/a.xml", xml(DOG).replace("<width>20", "<width>0")),
        "a.xml: the image size is 0 x 10",
    ),
    "no class": (spoil("Annotations/a.xml", xml(("", *DOG[1:]))), "a.xml: an object has no <name>"),
    "odd number": (
        spoil("Annotations/a.xml", xml(("dog", "left", 1, 2, 2, 0))),
        "a.xml: <bndbox/xmin> must be a number, got 'left'",
    ),
    "infinite": (spoil("Annotations/a.xml", xml(("dog", "inf", 1, 2, 2, 0))), "got 'inf'"),
    "no box": (
        spoil("Annotations/a.xml", xml(DOG).replace("bndbox", "box")),
        "a.xml: no <bndbox/xmin> in <object>",
    ),
    "odd difficult": (
        spoil("Annotations/a.xml", xml((*DOG[:5], 7))),
        "a.xml: <difficult> must be 0 or 1, got '7'",
    ),
}  # fmt: skip


def encoded(path, encoding, head=""):
    """A change of one file: the same text in another encoding."""

    def change(folder):
        file = folder / path
        file.write_bytes((head + file.read_text(encoding="utf-8")).encode(encoding))

    return change


def junk(folder):
    """What macOS leaves beside each file on foreign disks."""
    for path in [*folder.glob("Annotations/*.xml"), *folder.glob("JPEGImages/*")]:
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")


LIST, XML = "ImageSets/Main/train.txt", "Annotations/a.xml"
# What people bring -> the change of the folder; it means what the folder meant.
HABITS = {
    "files of macOS": junk,
    "list with a byte order mark": encoded(LIST, "utf-8-sig"),
    "list of UTF-16": encoded(LIST, "utf-16"),
    "list with endings": spoil(LIST, "a.jpg\nb.jpg\n"),
    "list with folders": spoil(LIST, "JPEGImages/a.jpg\nC:\\photos\\b.jpg\n"),
    "list of a class": spoil(LIST, "a  1\nb -1\n"),
    "XML of GB2312": encoded(XML, "gb2312", '<?xml version="1.0" encoding="GB2312"?>'),
    "XML of Shift JIS": encoded(XML, "shift_jis", "<?xml version='1.0' encoding='Shift_JIS'?>"),
    "XML with a byte order mark": encoded(XML, "utf-8-sig"),
}


@pytest.mark.parametrize("case", HABITS)
def test_what_people_bring_is_read_as_meant(folder, case):
    file = folder / XML
    file.write_text(file.read_text().replace("dog", "犬"), encoding="utf-8")
    register_voc_folder("own", str(folder), "train")
    prepare_dataset("own")
    expected = json.loads(Path(MetadataCatalog.get("own").json_file).read_text())
    HABITS[case](folder)
    prepare_dataset("own")
    assert json.loads(Path(MetadataCatalog.get("own").json_file).read_text()) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0), ("False", 0), ("Unspecified", 0), ("no", 0), ("True", 1), ("true", 1), ("yes", 1)],
)
def test_difficult_as_tools_write_it(text, value):
    content = xml((*DOG[:5], text)).encode()
    assert parse_voc_xml("a.xml", content)[2][0][2]["difficult"] == value


def test_all_broken_files_are_named_at_once(folder):
    for name in "ab":
        (folder / f"Annotations/{name}.xml").write_text("<annotation>")
    register_voc_folder("own", str(folder), "train")
    with pytest.raises(UserError, match=r"a\.xml: not an XML.*; .*b\.xml: not an XML"):
        prepare_dataset("own")


def test_an_unknown_encoding_is_named(folder):
    (folder / XML).write_bytes(b'<?xml version="1.0" encoding="klingon"?><annotation/>')
    register_voc_folder("own", str(folder), "train")
    with pytest.raises(UserError, match=r"a\.xml: not an XML file: .*klingon"):
        prepare_dataset("own")


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_line(folder, case):
    change, expected = BROKEN[case]
    change(folder)
    register_voc_folder("own", str(folder), "train")
    with pytest.raises(UserError) as caught:
        prepare_dataset("own")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("data set 'own': ")
    assert "\n" not in str(caught.value)
    assert not list(folder.parent.rglob("*.json"))


def test_a_class_outside_those_given_is_named(folder):
    register_voc_folder("own", str(folder), "train", ["dog"])
    with pytest.raises(UserError, match=r"a\.jpg: class 'cat' is not one of dog"):
        prepare_dataset("own")


def test_an_object_free_folder_without_classes_is_named(folder):
    for path in (folder / "Annotations").iterdir():
        path.write_text(xml())
    register_voc_folder("own", str(folder), "train")
    with pytest.raises(UserError, match="no object in any annotation"):
        prepare_dataset("own")


def config_of(*entries):
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    cfg.merge_from_list(["DATASETS.VOC_FOLDER", repr(entries)])
    return cfg


def test_registered_from_the_config(folder):
    cfg = config_of(
        ["own", str(folder), "train"], ["own_val", str(folder), "val", ["zebra", "dog", "cat"]]
    )
    register_datasets_of(cfg)
    register_datasets_of(cfg)
    assert len(DatasetCatalog.get("own")) == 2
    prepare_dataset("own_val")
    assert MetadataCatalog.get("own_val").thing_classes == ["zebra", "dog", "cat"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (["own"], "expected [name, folder, split]"),
        ("own", "expected [name, folder, split]"),
        (["own", "f", "train", "dog"], "expected [name, folder, split]"),
        (["own", "f", "train", [1]], "expected [name, folder, split]"),
        (["own", "f", "train", []], "needs class names, each once"),
        (["own", "f", "train", ["a", "a"]], "needs class names, each once"),
        (["coco_2017_val", "f", "train"], "the name 'coco_2017_val' is taken"),
    ],
)
def test_a_wrong_entry_is_one_line(entry, expected):
    with pytest.raises(UserError) as caught:
        register_datasets_of(config_of(entry))
    assert str(caught.value).startswith("DATASETS.VOC_FOLDER: ")
    assert expected in str(caught.value)


def test_a_name_is_taken_across_the_two_keys(folder):
    cfg = config_of(["own", str(folder), "train"])
    cfg.DATASETS.COCO_JSON = (["own", "a.json", "images"],)
    register_voc_folder("own", str(folder), "train")
    with pytest.raises(UserError, match=r"COCO_JSON: the name 'own' is taken"):
        register_datasets_of(cfg)


def test_the_files_of_a_real_folder(tmp_path):
    """Blood cells: class names unlike VOC's, two boxes of xmin = xmax and ymin = ymax."""
    if not BCCD.is_dir():
        pytest.skip(f"no {BCCD.name} beside the repository in shared/data")
    for name in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / name).symlink_to(BCCD / name)
    counts = {}
    for split in ("train", "val", "test"):
        register_voc_folder(f"bccd_{split}", str(tmp_path), split)
        records = DatasetCatalog.get(f"bccd_{split}")
        counts[split] = len(records)
        assert MetadataCatalog.get(f"bccd_{split}").thing_classes == ["Platelets", "RBC", "WBC"]
        assert all(Path(r["file_name"]).is_file() for r in records)
    assert counts == {"train": 205, "val": 87, "test": 72}
    boxes = [a["bbox"] for s in counts for a in content_of(f"bccd_{s}")["annotations"]]
    assert len(boxes) == 4888
    assert sorted(b for b in boxes if b[2] * b[3] <= 1) == [[180, 328, 0, 0], [503, 336, 0, 0]]


@pytest.mark.parametrize("depth", [50, 101])
def test_the_config_is_the_papers_set_up(depth):
    cfg = load_config(get_config_file(f"PascalVOC-Detection/retinanet_R_{depth}_FPN.yaml"))
    ablations = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x_600.yaml"))
    epoch = (5011 + 11540) / cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.STEPS == (round(8 * epoch), round(11 * epoch))
    assert round(12 * epoch) == cfg.SOLVER.MAX_ITER
    assert len(VOC_CLASSES) == cfg.MODEL.RETINANET.NUM_CLASSES
    assert cfg.MODEL.RESNETS.DEPTH == depth
    assert f"R-{depth}.pkl" in cfg.MODEL.WEIGHTS
    assert all(name in DatasetCatalog for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    # The rest is that of the paper's ablations on COCO.
    for key in ("STEPS", "MAX_ITER"):
        cfg.SOLVER[key] = ablations.SOLVER[key]
    assert cfg.SOLVER == ablations.SOLVER
    assert cfg.INPUT == ablations.INPUT


def test_registering_voc_twice_with_one_root_does_nothing():
    sets = {n: DatasetCatalog[n] for n in DatasetCatalog if n.startswith("voc_0712")}
    for name, dataset in sets.items():
        register_converted(name, dataset.source)
        assert DatasetCatalog[name] is dataset
