"""The layout of a data set's folder and its splits are found; the oracle is what was written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from iou_balanced_d2.data.layouts import dataset_name, find_splits, split_images
from iou_balanced_d2.errors import UserError

XML = """<annotation><size><width>64</width><height>64</height></size>
<object><name>square</name><bndbox><xmin>9</xmin><ymin>{0}</ymin><xmax>36</xmax><ymax>{1}</ymax>
</bndbox></object></annotation>"""


@pytest.fixture
def photos(own_data, tmp_path):
    """The four images of own_data in a folder of their own, without annotations."""
    shutil.copytree(own_data[1], tmp_path / "set/images")
    return tmp_path / "set"


def write_coco(own_data, file, ids=(0, 1, 2, 3)):
    content = json.loads(Path(own_data[0]).read_text())
    content["images"] = [i for i in content["images"] if i["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_voc(folder, lists):
    (folder / "images").rename(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for i in range(4):
        (folder / f"Annotations/{i}.xml").write_text(XML.format(11 + i, 40 + i))
    for name, ids in lists.items():
        (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Main/{name}.txt").write_text("\n".join(ids))


def write_yolo(folder, splits):
    for i in range(4):
        (folder / "labels").mkdir(exist_ok=True)
        (folder / f"labels/{i}.txt").write_text(f"0 {22 / 64} {(25 + i) / 64} {28 / 64} {30 / 64}")
    for split in splits:
        (folder / f"{split}.txt").write_text("images/0.png\nimages/1.png")
    lists = {split: f"{split}.txt" for split in splits}
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": ["square", "circle"], **lists}))


def check_boxes(splits):
    """The boxes of own_data: XYWH 8, 10 + i, 28, 30."""
    for split in splits.values():
        names = {i["id"]: Path(i["file_name"]).stem for i in split.content["images"]}
        assert all((Path(split.image_root) / i["file_name"]).is_file()
                   for i in split.content["images"])  # fmt: skip
        for a in split.content["annotations"]:
            assert a["bbox"] == pytest.approx([8, 10 + int(names[a["image_id"]]), 28, 30])


def sizes(splits):
    return {name: len(split.content["images"]) for name, split in splits.items()}


@pytest.mark.parametrize(
    "files",
    [
        {"annotations/instances_train2017.json": (0, 1, 2), "annotations/instances_val.json": (3,)},
        {"train.json": (0, 1, 2), "valid.json": (3,)},
        {"train/_annotations.coco.json": (0, 1, 2), "dev/_annotations.coco.json": (3,)},
    ],
)
def test_coco(photos, own_data, files):
    for file, ids in files.items():
        write_coco(own_data, photos / file, ids)
    write_coco(own_data, photos / "iou_balanced_cache/train.json")
    (photos / "notes.json").write_text("[]")
    splits = find_splits(photos)
    assert sizes(splits) == {"train": 3, "valid": 1}
    assert splits["train"].key == "COCO_JSON"
    assert splits["train"].place == [str(photos / next(iter(files))), str(photos / "images")]
    check_boxes(splits)


def test_photos_of_one_name_in_each_split(photos, own_data):
    for split in ("train", "val"):
        shutil.copytree(photos / "images", photos / f"training data/images/{split}")
        write_coco(own_data, photos / f"annotations/{split}.json")
    shutil.rmtree(photos / "images")
    for name, split in find_splits(photos).items():
        word = {"train": "train", "valid": "val"}[name]
        assert split.image_root == str(photos / f"training data/images/{word}")
    (photos / "annotations/train.json").unlink()  # val.json alone stands for all
    assert find_splits(photos)["train"].image_root.endswith("val")


def test_a_file_that_is_no_config_does_not_matter(photos, own_data):
    (photos / "notes.yaml").write_text("a: 1\na: 2\n")
    write_coco(own_data, photos / "annotations.json")
    assert find_splits(photos)["train"].image_root == str(photos / "images")
    (photos / "notes.yaml").rename(photos / "data.yaml")
    with pytest.raises(UserError, match="has the key 'a' twice, in lines 1 and 2"):
        find_splits(photos)


def test_which_folder_has_the_photos_is_not_guessed(photos, own_data):
    (photos / "images").rename(photos / "rgb")
    shutil.copytree(photos / "rgb", photos / "masks")
    write_coco(own_data, photos / "annotations.json")
    with pytest.raises(
        UserError, match=r"annotations.json: .*/masks and .*/rgb .*: move the wrong"
    ):
        find_splits(photos)
    (photos / "masks").rename(photos / "masks of train")
    with pytest.raises(UserError, match="move the wrong"):
        find_splits(photos)
    shutil.copytree(photos / "rgb", photos / "images")
    assert find_splits(photos)["train"].image_root == str(photos / "images")
    shutil.copytree(photos / "rgb", photos, dirs_exist_ok=True)
    assert find_splits(photos)["train"].image_root == str(photos), "beside the file"


@pytest.mark.parametrize("name", ["labels", "latest", "intervals"])
def test_coco_without_splits_and_with_too_many(photos, own_data, name):
    write_coco(own_data, photos / f"{name}.json")
    assert sizes(find_splits(photos)) == {"train": 4}
    (photos / f"{name}.json").rename(photos / "labels.json")
    write_coco(own_data, photos / "others.json")
    with pytest.raises(UserError, match=r"labels.json and .*others.json: both could be the train"):
        find_splits(photos)


def test_voc(photos):
    write_voc(photos, {"trainval": "012", "test": "3", "square_trainval": "0"})
    splits = find_splits(photos)
    assert sizes(splits) == {"train": 3, "test": 1}
    assert splits["train"].key == "VOC_FOLDER"
    assert splits["train"].place == [str(photos), "trainval"]
    check_boxes(splits)


def test_voc_without_lists_whatever_the_photos_are_called(photos):
    write_voc(photos, {})
    (photos / "JPEGImages/0.png").rename(photos / "JPEGImages/0.PNG")
    for name in ("JPEGImages/._0.png", "Annotations/._0.xml"):
        (photos / name).write_text("of macOS")
    check_boxes(splits := find_splits(photos))
    assert len(splits["train"].content["images"]) == 4


def test_voc_without_lists(photos):
    write_voc(photos, {})
    splits = find_splits(photos)
    assert sizes(splits) == {"train": 4}
    check_boxes(splits)


def test_yolo(photos):
    write_yolo(photos, ["train", "val"])
    splits = find_splits(photos)
    assert sizes(splits) == {"train": 2, "valid": 2}
    assert splits["valid"].key == "YOLO_FOLDER"
    assert splits["valid"].place == [str(photos / "data.yaml"), "val"]
    check_boxes(splits)


def test_what_is_no_data_set_is_one_line(photos, own_data):
    with pytest.raises(UserError, match=r"neither COCO's layout .* nor VOC's .* nor YOLO's"):
        find_splits(photos)
    with pytest.raises(UserError, match=r"no: not a folder"):
        find_splits(photos / "no")
    for name in ("test", "valid"):
        write_coco(own_data, photos / f"{name}.json")
    with pytest.raises(UserError, match="has a split test, valid, but none to train on"):
        find_splits(photos)
    shutil.rmtree(photos / "images")
    with pytest.raises(UserError, match=r"its images \(0.png, ...\) are in no folder below"):
        find_splits(photos)


def test_the_same_share_is_drawn_each_time(own_data, photos):
    write_coco(own_data, photos / "all.json")
    content = find_splits(photos)["train"].content
    rest, drawn = split_images(content, 0.25, "set")
    assert (rest, drawn) == split_images(content, 0.25, "set")
    ids = [{i["id"] for i in part["images"]} for part in (rest, drawn)]
    assert len(ids[1]) == 1
    assert ids[0] | ids[1] == {0, 1, 2, 3}
    for part in (rest, drawn):
        assert {a["image_id"] for a in part["annotations"]} == {i["id"] for i in part["images"]}


def test_names_of_folders_become_names_of_data_sets(tmp_path):
    assert dataset_name(tmp_path / "my photos/", "train") == "my_photos_train"
