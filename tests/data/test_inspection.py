"""What a data set check finds, each problem made on purpose; and anchor recall by hand."""

import copy
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_anchor_generator, build_backbone, build_model
from detectron2.structures import Boxes, BoxMode, ImageList, Instances, pairwise_iou

from iou_balanced_d2.commands import run_command
from iou_balanced_d2.data.anchors import (
    AnchorGrid,
    anchor_recall,
    best_anchor_iou,
    expected_w_loc,
    mean_recall,
    recall_in_words,
    scaled_boxes,
)
from iou_balanced_d2.data.coco_format import clean_coco, read_coco_json
from iou_balanced_d2.data.inspection import inspect_annotations, inspect_images, strips
from iou_balanced_d2.data.loading import CheckedMapper, drop_bad_boxes, load_training_dicts
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data

CONFIG = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
BCCD = Path(__file__).parents[3] / "shared/data/bccd"


@pytest.fixture
def content(own_data):
    return read_coco_json(own_data[0])


def test_a_good_data_set_has_no_problems(content, own_data):
    report = inspect_annotations(content)
    assert (report.num_images, report.num_annotations, report.num_empty) == (4, 4, 0)
    assert report.classes == {"square": 4, "circle": 0}
    assert report.problems == {}
    assert inspect_images(content, own_data[1]).problems == {}


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("no area", {"bbox": [5, 5, 0, 9]}),
        ("not finite", {"bbox": [5, 5, float("nan"), 9]}),
        ("not finite", {"bbox": [5, 5, 1e200, 9]}),
        ("not finite", {"bbox": [5, 5, 10**400, 9]}),
        ("outside", {"bbox": [64, 5, 9, 9]}),
        ("outside", {"bbox": [-20, 5, 20, 9]}),
        ("sticks out", {"bbox": [60, 5, 9, 9]}),
        ("sticks out", {"bbox": [5, -3, 9, 9]}),
        ("unknown category", {"category_id": 8}),
        ("unknown image", {"image_id": 99}),
    ],
)
def test_bad_annotations_are_found_and_named(content, problem, change):
    content["annotations"][1].update(change)
    report = inspect_annotations(clean_coco(content))
    assert list(report.problems) == [problem]
    (where,) = report.problems[problem]
    left_out = problem.startswith(("unknown", "not finite"))
    assert ("annotations[1] (id 2): " if left_out else "'1.png', annotation 2:") in where
    assert "bbox" not in change or "1.png" in where


def test_boxes_a_rounding_error_outside_are_fine(content):
    content["annotations"][0]["bbox"] = [-0.3, 0, 64.6, 64.4]
    assert inspect_annotations(content).problems == {}


def test_images_without_annotations_are_counted(content):
    content["annotations"].pop()
    assert inspect_annotations(content).num_empty == 1


def spoil_images(folder):
    """0 missing, 1 truncated, 2 no image, 3 of another size."""
    (folder / "0.png").unlink()
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_text("not an image")
    cv2.imwrite(str(folder / "3.png"), np.zeros((32, 64, 3), np.uint8))


def test_bad_images_are_found_and_named(content, own_data):
    spoil_images(Path(own_data[1]))
    problems = inspect_images(content, own_data[1]).problems
    assert {kind: len(places) for kind, places in problems.items()} == {
        "missing image": 1,
        "unreadable image": 2,
        "size mismatch": 1,
    }
    assert "3.png: 64x32, annotated 64x64" in problems["size mismatch"][0]


def config_of(own_data, *opts):
    forget_own_data()
    entry = ("own", *own_data)
    options = [
        "MODEL.RETINANET.NUM_CLASSES", "2", "DATASETS.COCO_JSON", repr((entry,)),
        "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", *opts,
    ]  # fmt: skip
    return load_config(CONFIG, options), options


def test_anchor_recall_by_hand(content, own_data):
    """Square anchors of 32 px every 8 px meet a 32 px square, but neither 8 px nor a thin one."""
    sizes = [[32], [64], [128], [256], [512]]
    options = [
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0]]",
        "MODEL.ANCHOR_GENERATOR.SIZES", repr(sizes),
    ]  # fmt: skip
    cfg, _ = config_of(own_data, *options)
    for annotation, box in zip(
        content["annotations"],
        ([16, 16, 32, 32], [16, 16, 8, 8], [10, 10, 50, 8], [0, 0, 0, 0]),
        strict=True,
    ):
        annotation["bbox"] = box
    assert anchor_recall(cfg, content) == pytest.approx({"square": 1 / 3})
    # At twice the size the 32 px square is 64 px, and the 8 px one 16 px: still one of three.
    cfg.INPUT.MIN_SIZE_TRAIN = (128,)
    assert anchor_recall(cfg, content) == pytest.approx({"square": 1 / 3})
    cfg.INPUT.MIN_SIZE_TRAIN = (256,)
    assert anchor_recall(cfg, content) == pytest.approx({"square": 2 / 3})
    content["annotations"][0]["category_id"] = content["categories"][1]["id"]
    recalls = anchor_recall(cfg, content)
    assert recalls == pytest.approx({"square": 1 / 2, "circle": 1})
    assert recall_in_words(recalls) == "75% of the boxes (mean of 2 classes; least: square, 50%)"
    assert math.isnan(mean_recall(anchor_recall(cfg, {**content, "annotations": []})))


def test_anchor_recall_is_of_what_is_trained_on(content, own_data):
    cfg, _ = config_of(own_data, "INPUT.MIN_SIZE_TRAIN", "(64,)")
    before = anchor_recall(cfg, content)
    tiny = {**content["annotations"][0], "id": 99, "bbox": [9, 9, 1, 1], "difficult": 1}
    with_tiny = {**content, "annotations": [*content["annotations"], tiny]}
    assert anchor_recall(cfg, with_tiny) == before, "difficult ones are left out"
    cfg.DATASETS.VOC_DIFFICULT = "count"
    assert anchor_recall(cfg, with_tiny) != before
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)  # the images as they are, of 64 px
    assert anchor_recall(cfg, content) == before
    boxes, *_ = scaled_boxes(cfg, content, 1.0)
    content["annotations"][0]["bbox"] = [8, 10, 28, 900]  # it is clipped
    assert scaled_boxes(cfg, content, 1.0)[0][0].tolist() == [8, 10, 36, 64]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (64, 192), "range"
    np.testing.assert_allclose(scaled_boxes(cfg, content, 1.0)[0][1:], 2 * boxes[1:])


def every_anchor_iou(cfg, content):
    """The best IoU of each box with all anchors of its image, all made by detectron2."""
    backbone = build_backbone(cfg)
    features = backbone.output_shape()
    features = [features[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    generator = build_anchor_generator(cfg, features)
    best = []
    for image in content["images"]:
        resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, "choice")
        pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
        transform = resize.get_transform(pixels)
        tensor = torch.zeros(3, transform.new_h, transform.new_w)
        padded = ImageList.from_tensors([tensor], backbone.size_divisibility).tensor.shape
        maps = [torch.zeros(1, 1, -(-padded[2] // f.stride), -(-padded[3] // f.stride))
                for f in features]  # fmt: skip
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = BoxMode.convert(np.array(boxes, float), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        iou = pairwise_iou(Boxes(transform.apply_box(boxes)), Boxes.cat(generator(maps)))
        best.append(iou.amax(dim=1).numpy())
    return np.concatenate(best)


def test_best_anchors_equal_those_among_all_of_detectron2s(own_data):
    rng = np.random.default_rng(0)
    images = [
        {"id": i, "file_name": f"{i}.png", "width": int(w), "height": int(h)}
        for i, (w, h) in enumerate(rng.integers(40, 200, (6, 2)))
    ]
    annotations = []
    for image in images:
        size = np.array([image["width"], image["height"]])
        for _ in range(20):
            # Some in the corner that is last, where the grid ends.
            corner = rng.uniform(0, size - 2) if rng.random() < 0.7 else size - 6
            extent = rng.uniform(1, size - corner)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 1,
                 "bbox": [*corner.tolist(), *extent.tolist()], "area": 1, "iscrowd": 0}
            )  # fmt: skip
    content = {"images": images, "annotations": annotations}
    for size, longest in ((64, 1333), (200, 256), (96, 1333)):
        cfg, _ = config_of(own_data, "INPUT.MIN_SIZE_TRAIN", f"({size},)")
        cfg.INPUT.MAX_SIZE_TRAIN = longest
        best = best_anchor_iou(*scaled_boxes(cfg, content, 1.0)[:2], AnchorGrid.of(cfg))
        assert best == pytest.approx(every_anchor_iou(cfg, content), abs=1e-5)


def test_records_registered_in_python_are_checked_before_training(own_data, tmp_path):
    from iou_balanced_d2.data import check_datasets

    record = {
        "file_name": f"{own_data[1]}/0.png", "image_id": 0, "height": 64, "width": 64,
        "annotations": [{"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}],
    }  # fmt: skip
    cfg, _ = config_of(own_data)
    cfg.DATASETS.COCO_JSON = ()
    names = []

    def load():  # as detectron2's load_coco_json, it sets the names itself
        if names:
            MetadataCatalog.get("own").thing_classes = names
        return [record]

    DatasetCatalog.register("own", load)
    with pytest.raises(UserError, match="evaluation needs its classes"):
        check_datasets(cfg, training=True)
    names += ["a", "b"]
    check_datasets(cfg, training=True)
    cfg.MODEL.RETINANET.NUM_CLASSES = 7
    with pytest.raises(UserError, match="NUM_CLASSES is 7, but data set 'own' has 2 classes"):
        check_datasets(cfg, training=True)
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    record["annotations"][0]["category_id"] = 2
    with pytest.raises(UserError, match=r"'own': record 0: annotations\[0\]: category_id must be"):
        check_datasets(cfg, training=True)
    del record["annotations"][0]["bbox"]
    with pytest.raises(UserError, match=r"record 0: annotations\[0\] has no 'bbox'"):
        check_datasets(cfg, training=True)
    record["file_name"] = "gone.png"
    with pytest.raises(UserError, match=r"record 0: image 'gone\.png' is not there"):
        check_datasets(cfg, training=True)


def test_advice_says_what_larger_images_and_other_anchors_would_give(own_data, content, caplog):
    from iou_balanced_d2.data import check_datasets

    content["annotations"][0]["bbox"] = [12, 12, 8, 8]
    content["annotations"] = content["annotations"][:1]
    Path(own_data[0]).write_text(json.dumps(content))
    cfg, _ = config_of(own_data, "INPUT.MIN_SIZE_TRAIN", "(64,)")
    check_datasets(cfg, training=True)
    assert "only 0% of the boxes meet an anchor" in caplog.text
    assert "100% with MODEL.ANCHOR_GENERATOR.SIZES x 0.25" in caplog.text
    assert "0% at INPUT.MIN_SIZE_TRAIN 96" in caplog.text


def test_the_tool_draws_boxes(own_data, tmp_path, monkeypatch, capsys):
    _, options = config_of(own_data)
    argv = [
        "check_dataset.py",
        "--config-file",
        CONFIG,
        "--pictures",
        str(tmp_path / "p"),
        *options,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_command("check") == 0
    assert len(list((tmp_path / "p").glob("own_*.jpg"))) == 4


def test_the_tool_reports_and_changes_nothing(own_data, content, monkeypatch, capsys):
    content["annotations"][2]["bbox"] = [1, 1, 0, 0]
    Path(own_data[0]).write_text(json.dumps(content))
    (Path(own_data[1]) / "3.png").unlink()
    before = sorted(p.read_bytes() for p in Path(own_data[1]).iterdir())

    def run(*flags):
        _, options = config_of(own_data)
        argv = ["check_dataset.py", "--config-file", CONFIG, *flags, *options]
        monkeypatch.setattr(sys, "argv", argv)
        return run_command("check"), capsys.readouterr().out

    code, out = run()
    assert code == 1  # for the missing image
    for text in ("4 images", "no area: 1", "annotation 3", "missing image: 1", "anchor recall: "):
        assert text in out
    code, out = run("--quick")
    assert code == 1
    assert "missing image: 1" in out
    content["images"].pop(3)
    content["annotations"].pop(3)
    Path(own_data[0]).write_text(json.dumps(content))
    assert run()[0] == 0
    assert run("--strict")[0] == 1
    assert sorted(p.read_bytes() for p in Path(own_data[1]).iterdir()) == before


def test_training_leaves_bad_boxes_out_and_keeps_the_rest(own_data, content, caplog):
    content["annotations"][2]["bbox"] = [1, 1, 0, 0]
    content["annotations"][1]["bbox"] = [60, 5, 9, 9]
    Path(own_data[0]).write_text(json.dumps(content))
    cfg, _ = config_of(own_data)
    from iou_balanced_d2.data import register_datasets_of

    register_datasets_of(cfg)
    dicts = load_training_dicts(cfg)
    assert [Path(d["file_name"]).stem for d in dicts] == ["0", "1", "3"]
    assert {d["dataset_name"] for d in dicts} == {"own"}
    assert "'own': 1 boxes of no area" in caplog.text
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(load_training_dicts(cfg)) == 4


def test_nothing_to_train_on_is_an_error(own_data, content):
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 0, 0]
    Path(own_data[0]).write_text(json.dumps(content))
    cfg, _ = config_of(own_data)
    from iou_balanced_d2.data import register_datasets_of

    register_datasets_of(cfg)
    with pytest.raises(UserError, match="no image has a usable box"):
        load_training_dicts(cfg)


def test_records_without_a_size_and_images_without_a_file_are_named():
    with pytest.raises(UserError, match="data set 'py': record 0 has no 'width'"):
        drop_bad_boxes([{"image_id": 1}], "py")
    with pytest.raises(UserError, match="data set 'py': image 17 can't be used: division by zero"):
        CheckedMapper(lambda record: 1 / 0, "py")({"image_id": 17})


def test_dicts_of_the_caller_are_not_changed():
    annotations = [{"bbox": [0, 0, 0, 0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    dicts = [{"file_name": "a", "width": 9, "height": 9, "annotations": annotations}]
    before = copy.deepcopy(dicts)
    assert drop_bad_boxes(dicts, "x")[0]["annotations"] == []
    assert dicts == before


@pytest.mark.parametrize("error", [OSError("image file is truncated"), SyntaxError("broken PNG")])
def test_images_that_can_not_be_used_are_named(error):
    def mapper(_):
        raise error

    with pytest.raises(UserError, match=r"'cars': image 'a\.jpg' can't be used: .*(trunc|broken)"):
        CheckedMapper(mapper, "cars")({"file_name": "a.jpg"})
    with pytest.raises(UserError, match="data set 'own': image"):
        CheckedMapper(mapper)({"file_name": "a.jpg", "dataset_name": "own"})


@pytest.mark.skipif(not BCCD.is_dir(), reason="no shared/data/bccd beside the repository")
def test_the_two_boxes_without_extent_of_a_real_folder_are_found(tmp_path):
    from iou_balanced_d2.data import prepare_dataset, register_voc_folder

    for name in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / name).symlink_to(BCCD / name)
    found = []
    for split in ("train", "val", "test"):
        name = f"bccd_inspected_{split}"
        register_voc_folder(name, str(tmp_path), split)
        prepare_dataset(name)
        report = inspect_annotations(read_coco_json(MetadataCatalog.get(name).json_file))
        found += report.problems.get("no area", [])
    assert len(found) == 2
    assert "BloodImage_00343" in found[0]
    assert "BloodImage_00338" in found[1]


def test_data_sets_of_one_run_must_have_the_same_classes(own_data, content, tmp_path):
    from iou_balanced_d2.data import check_datasets

    content["categories"] = [{"id": 9, "name": "square"}, {"id": 7, "name": "circle"}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    entries = (("own", *own_data), ("other_order", str(other), own_data[1]))
    cfg, _ = config_of(own_data, "DATASETS.COCO_JSON", repr(entries))
    check_datasets(cfg, training=True)
    cfg.DATASETS.TRAIN = ("own", "other_order")
    with pytest.raises(UserError, match="'own' and 'other_order' have different classes"):
        check_datasets(cfg, training=True)


def test_an_image_of_which_resizing_leaves_nothing_is_named():
    cfg = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    sizes = ((1, 100000), (100000, 1), (10, 1000))
    images = [{"file_name": f"{w}.png", "width": w, "height": h} for w, h in sizes]
    assert strips(cfg, {"images": images}) == ["1.png: 1x100000", "100000.png: 100000x1"]


def test_w_loc_to_expect_is_that_of_the_paper_at_the_anchors(own_data):
    """By detectron2's labels, and eq. 4's sums in NumPy."""
    rng = np.random.default_rng(1)
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 160} for i in range(3)]
    boxes = [[*rng.uniform(0, 80, 2).tolist(), *rng.uniform(20, 80, 2).tolist()] for _ in range(9)]
    annotations = [
        {"id": i, "image_id": i % 3, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    cfg, _ = config_of(own_data, "INPUT.MIN_SIZE_TRAIN", "(160,)")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNet", "cpu"
    model = build_model(cfg)
    anchors = model.anchor_generator([torch.zeros(1, 1, -(-160 // s), -(-224 // s))
                                      for s in (8, 16, 32, 64, 128)])  # fmt: skip
    flat, loss, balanced = Boxes.cat(anchors).tensor.double().numpy(), 0.0, 0.0
    for i in range(3):
        own = BoxMode.convert(np.array(boxes[i::3]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        gt = Instances((160, 200), gt_boxes=Boxes(own), gt_classes=torch.zeros(3).long())
        (labels,), (matched,) = model.label_anchors(anchors, [gt])
        at = (labels == 0).numpy()
        a, g = flat[at], matched.double().numpy()[at]
        size, gt_size = a[:, 2:] - a[:, :2], g[:, 2:] - g[:, :2]
        centre = (a[:, :2] + a[:, 2:] - g[:, :2] - g[:, 2:]) / 2 / size
        x = np.abs(np.concatenate([centre, np.log(gt_size / size)], axis=1))
        beta = cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA
        smooth = np.where(x < beta, x**2 / 2 / beta, x - beta / 2).sum(axis=1)
        common = np.minimum(a[:, 2:], g[:, 2:]) - np.maximum(a[:, :2], g[:, :2])
        common = common.clip(0).prod(axis=1)
        iou = common / (size.prod(axis=1) + gt_size.prod(axis=1) - common)
        loss, balanced = loss + smooth.sum(), balanced + (iou**1.5 * smooth).sum()
    cfg.MODEL.IOU_BALANCED.LOC_LAMBDA = 1.5
    found = expected_w_loc(cfg, {"images": images, "annotations": annotations})
    assert found == pytest.approx(loss / balanced, rel=1e-5)
    assert math.isnan(expected_w_loc(cfg, {"images": images, "annotations": []}))
