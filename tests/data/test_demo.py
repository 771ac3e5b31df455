"""The drawn demo set: the same everywhere, tight boxes, written once and whole."""

import json
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from iou_balanced_d2.data import demo

SMALL = demo.DemoSpec(num_train=6, num_val=3)
NAMES = ("iou_balanced_demo_train", "iou_balanced_demo_val")


@pytest.fixture
def catalog():
    """Lets a test register the demo's names, and puts back what was registered."""
    before = {name: DatasetCatalog.pop(name) for name in NAMES if name in DatasetCatalog}
    metadata = {name: MetadataCatalog.pop(name) for name in NAMES if name in MetadataCatalog}
    yield
    for name in NAMES:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    DatasetCatalog.update(before)
    MetadataCatalog.update(metadata)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_scene_follows_from_seed_and_index_alone():
    first = demo.draw_scene(3)
    demo.draw_scene(4)
    again = demo.draw_scene(3)
    for field in ("image", "owner", "labels", "boxes"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.image, demo.draw_scene(4).image)
    assert not np.array_equal(first.image, demo.draw_scene(3, demo.DemoSpec(seed=1)).image)


@pytest.mark.parametrize("index", range(12))
def test_boxes_are_the_extent_of_the_visible_pixels(index):
    scene = demo.draw_scene(index)
    assert len(scene.boxes) == len(scene.labels) >= 1
    for row, (x1, y1, x2, y2) in enumerate(scene.boxes):
        ys, xs = (scene.owner == row).nonzero()
        assert (x1, y1, x2, y2) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("name", demo.DEMO_CLASSES)
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.1])
def test_the_mask_covers_the_outline_to_half_a_pixel(name, angle):
    """Against the exact polygon: its own extent bounds every pixel it half covers."""
    unit = demo._unit_polygon(name)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    polygon = unit @ rotation * 25.3 + 60.7
    coverage = demo._rasterize(polygon, 128)
    assert coverage.sum() == pytest.approx(demo._polygon_area(polygon), rel=0.03)
    box = demo._tight_box(coverage > 0)
    exact = [*polygon.min(axis=0), *polygon.max(axis=0)]
    # The pixels that are touched at all reach just around the exact extent ...
    np.testing.assert_allclose(box, exact, atol=1.25)
    if name in ("ellipse", "rectangle") and (name == "ellipse" or angle == 0.0):
        # ... and where no tip is thinner than a pixel, so do those that are half covered.
        np.testing.assert_allclose(demo._tight_box(coverage >= 0.5), exact, atol=0.75)


def test_boxes_agree_with_where_a_painted_object_changed_the_picture():
    rng = np.random.default_rng(5)
    canvas = np.full((128, 128, 3), 250.0, dtype=np.float32)
    polygon = demo._unit_polygon("ellipse") * [30.0, 20.0] + [60.0, 50.0]
    coverage = demo._rasterize(polygon, 128)
    painted = demo._paint(rng, canvas, coverage, 0.1)
    # The shadow only dims a grey canvas; what takes on a hue is the object.
    hue = np.ptp(painted, axis=2) > 0.5 * np.ptp(painted, axis=2).max()
    np.testing.assert_allclose(demo._tight_box(hue), demo._tight_box(coverage >= 0.5), atol=1)


def test_no_object_is_mostly_hidden():
    for index in range(30):
        scene = demo.draw_scene(index)
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        assert sides.min() >= 8
        assert np.bincount(scene.owner[scene.owner >= 0]).min() >= 60


def test_the_set_is_valid_coco_and_both_splits_differ(tmp_path):
    folder = demo.ensure_demo_datasets(str(tmp_path), SMALL)
    assert folder == tmp_path / "iou_balanced_demo"
    for split, count in (("train", 6), ("val", 3)):
        coco = COCO(str(folder / "annotations" / f"{split}.json"))
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(demo.DEMO_CLASSES)
        assert len(coco.getImgIds()) == count
        assert coco.getAnnIds()
        for info in coco.loadImgs(coco.getImgIds()):
            image = cv2.imread(str(folder / split / info["file_name"]))
            assert image.shape == (info["height"], info["width"], 3)
            scene = demo.draw_scene(int(Path(info["file_name"]).stem), SMALL)
            np.testing.assert_array_equal(image, scene.image)
            boxes = np.array([a["bbox"] for a in coco.imgToAnns[info["id"]]])
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_array_equal(boxes, scene.boxes)
    names = [{p.name for p in (folder / split).iterdir()} for split in ("train", "val")]
    assert not names[0] & names[1]


def test_a_second_call_draws_nothing(tmp_path, monkeypatch):
    folder = demo.ensure_demo_datasets(str(tmp_path), SMALL)
    before = files_of(folder)
    monkeypatch.setattr(demo, "draw_scene", None)
    demo.ensure_demo_datasets(str(tmp_path), SMALL)
    assert files_of(folder) == before


def test_other_parameters_replace_the_set(tmp_path):
    folder = demo.ensure_demo_datasets(str(tmp_path), SMALL)
    demo.ensure_demo_datasets(str(tmp_path), demo.DemoSpec(num_train=2, num_val=1, seed=9))
    assert len(list((folder / "train").iterdir())) == 2
    assert json.loads((folder / "stamp.json").read_text())["spec"]["seed"] == 9
    assert not list(tmp_path.glob(".iou*"))


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(index, spec):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure_demo_datasets(str(tmp_path), SMALL)
    assert not (tmp_path / "iou_balanced_demo").exists()
    assert not list(tmp_path.glob(".iou*"))


def _draw_and_log(root: str) -> None:
    drawn = demo.draw_scene

    def logged(index, spec):
        # O_APPEND keeps the two processes' lines apart.
        with open(f"{root}/drawn.txt", "a") as log:
            log.write(f"{index}\n")
        return drawn(index, spec)

    demo.draw_scene = logged
    demo.ensure_demo_datasets(root, SMALL)


def test_two_processes_draw_it_once(tmp_path):
    # fork: a spawned process would import torch again, for seconds.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_draw_and_log, args=(str(tmp_path),), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "drawn.txt").read_text().split() == [str(i) for i in range(9)]


def test_registering_touches_no_file_and_loading_draws(tmp_path, catalog, monkeypatch):
    root = tmp_path / "absent"
    ensure = demo.ensure_demo_datasets
    monkeypatch.setattr(demo, "ensure_demo_datasets", lambda root: ensure(root, SMALL))
    demo.register_demo_datasets(str(root))
    assert not root.exists()
    metadata = MetadataCatalog.get(NAMES[1])
    assert (metadata.evaluator_type, metadata.thing_classes) == ("coco", list(demo.DEMO_CLASSES))
    records = DatasetCatalog.get(NAMES[1])
    assert len(records) == 3
    assert Path(records[0]["file_name"]).is_file()
    assert Path(metadata.json_file).is_file()
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(5))
