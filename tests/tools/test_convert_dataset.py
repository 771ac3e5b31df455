"""Annotations of other tools, written as those tools do, become boxes worked out by hand."""

import json
import sys

import pytest
from PIL import Image

from iou_balanced_d2.arguments import CONVERTED_FORMATS
from iou_balanced_d2.commands import run_command
from iou_balanced_d2.data.coco_format import read_coco_json

globox_only = pytest.mark.usefixtures("globox")
BOX = [10.0, 5.0, 30.0, 20.0]


@pytest.fixture
def globox():
    return pytest.importorskip("globox", reason="globox is not installed; `make setup` installs it")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / "photos" / name)
    return tmp_path


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the tool in the folder; returns exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["convert_dataset.py", *args, "--images", "photos"])
        code = run_command("convert")
        return code, *capsys.readouterr()

    return run


def converted(folder):
    """Per file the (class, box, crowd) of its objects; sizes are those of the photos."""
    content = read_coco_json(str(folder / "out.json"))
    assert not content["info"]["repairs"]
    assert {(i["width"], i["height"]) for i in content["images"]} == {(100, 50)}
    names = {c["id"]: c["name"] for c in content["categories"]}
    found = {image["file_name"]: [] for image in content["images"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for a in content["annotations"]:
        objects = found[files[a["image_id"]]]
        objects.append((names[a["category_id"]], pytest.approx(a["bbox"]), a["iscrowd"]))
    return found


def write_labelme(folder, **changes):
    shapes = [
        {"label": "cat", "shape_type": "rectangle", "points": [[40, 25], [10, 5]]},
        {"label": "dog", "shape_type": "polygon", "points": [[10, 5], [40, 9], [20, 25]]},
        {"label": "dog", "shape_type": "point", "points": [[1, 1]]},
    ]
    content = {"imagePath": "..\\photos\\a.jpg", "imageWidth": 100, "imageHeight": 50,
               "imageData": None, "shapes": shapes, **changes}  # fmt: skip
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/a.json").write_text(json.dumps(content))
    empty = {**content, "imagePath": "b.png", "shapes": []}
    (folder / "labels/b.json").write_text(json.dumps(empty))


@globox_only
def test_labelme(folder, command):
    write_labelme(folder)
    code, out, err = command("labelme", "labels", "out.json")
    assert code == 0
    assert converted(folder) == {"a.jpg": [("cat", BOX, 0), ("dog", BOX, 0)], "b.png": []}
    assert "2 images, 2 boxes, classes: cat, dog" in out
    assert 'DATASETS.COCO_JSON: [["NAME", "out.json", "photos"]]' in out
    assert err == "1 shapes that are no boxes are left out\n"


@globox_only
@pytest.mark.parametrize("changes", [{"imageWidth": None}, {"shapes": [{"label": "cat"}]}])
def test_a_broken_file_is_named(folder, command, changes):
    write_labelme(folder, **changes)
    code, _, err = command("labelme", "labels", "out.json")
    assert code == 2
    assert err.startswith("convert_dataset.py: error: labels/a.json: can't be understood")
    assert err.count("\n") == 1
    assert not (folder / "out.json").exists()


@globox_only
def test_cvat(folder, command):
    (folder / "cvat.xml").write_text(
        '<annotations><version>1.1</version><image id="0" name="a.jpg" width="100" height="50">'
        '<box label="cat" xtl="10" ytl="5" xbr="40" ybr="25" occluded="0"><attribute name="x">1'
        '</attribute></box><polygon label="cat" points="1,1;2,2;3,1"/></image>'
        '<image id="1" name="b.png" width="100" height="50"><tag label="blurred"/></image>'
        "</annotations>"
    )
    code, _, err = command("cvat", "cvat.xml", "out.json")
    assert code == 0
    assert converted(folder) == {"a.jpg": [("cat", BOX, 0)], "b.png": []}
    assert err == "1 shapes that are no boxes are left out\n"
    (folder / "cvat.xml").write_text("<annotations><track/></annotations>")
    assert "CVAT for images" in command("cvat", "cvat.xml", "out.json")[2]


@globox_only
def test_a_box_that_cvat_turns(folder, command):
    (folder / "cvat.xml").write_text(
        '<annotations><image id="0" name="a.jpg" width="100" height="50"><box label="cat" '
        'xtl="30" ytl="20" xbr="60" ybr="30" rotation="90.0"/></image></annotations>'
    )
    assert command("cvat", "cvat.xml", "out.json")[0] == 0
    (((_, box, _),),) = converted(folder).values()
    assert [40, 10, 10, 30] == box  # (approximate)


@globox_only
def test_a_class_of_via_that_is_no_text_is_named(folder, command):
    (folder / "via.json").write_text(json.dumps(via({"kind": {"cat": True}})))
    code, _, err = command("via", "via.json", "out.json")
    assert code == 2
    assert "the class must be a text, got {'cat': True}" in err


def via(attributes, shape="rect"):
    region = {"shape_attributes": {"name": shape, "x": 10, "y": 5, "width": 30, "height": 20},
              "region_attributes": attributes}  # fmt: skip
    return {"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": [region]}}


@globox_only
@pytest.mark.parametrize("is_project", [False, True])
def test_via(folder, command, is_project):
    content = via({"kind": "cat"})
    content = {"_via_img_metadata": content, "_via_settings": {}} if is_project else content
    (folder / "via.json").write_text(json.dumps(content))
    assert command("via", "via.json", "out.json")[0] == 0
    assert converted(folder) == {"a.jpg": [("cat", BOX, 0)]}


@globox_only
def test_via_asks_which_attribute_is_the_class(folder, command):
    (folder / "via.json").write_text(json.dumps(via({"kind": "cat", "colour": "red"})))
    code, _, err = command("via", "via.json", "out.json")
    assert code == 2
    assert "--label-key, one of colour, kind" in err
    assert command("via", "via.json", "out.json", "--label-key", "kind")[0] == 0
    assert converted(folder) == {"a.jpg": [("cat", BOX, 0)]}


VOC = """<annotation><filename>photo of old.jpg</filename><size><width>100</width>
<height>50</height></size><object><name>cat</name><difficult>1</difficult><bndbox><xmin>11</xmin>
<ymin>6</ymin><xmax>40</xmax><ymax>25</ymax></bndbox></object></annotation>"""


def test_a_flat_folder_of_photos_and_xml(folder, command):
    """The box and "difficult" are read as those of VOC; the file's own name finds the photo."""
    (folder / "photos/a.xml").write_text(VOC)
    (folder / "photos/._a.xml").write_text("of macOS")
    assert command("voc", "photos", "out.json")[0] == 0
    assert converted(folder) == {"a.jpg": [("cat", BOX, 0)]}
    content = json.loads((folder / "out.json").read_text())
    assert content["annotations"][0]["difficult"] == 1


def test_xml_of_another_encoding(folder, command):
    (folder / "photos/a.xml").write_bytes(
        f'<?xml version="1.0" encoding="gbk"?>{VOC}'.replace("cat", "\u732b").encode("gbk")
    )
    assert command("voc", "photos", "out.json")[0] == 0
    assert converted(folder) == {"a.jpg": [("\u732b", BOX, 0)]}


def test_classes_in_an_order_of_ones_own(folder, command):
    (folder / "photos/a.xml").write_text(VOC)
    assert command("voc", "photos", "out.json", "--classes", "dog", "cat")[0] == 0
    content = json.loads((folder / "out.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["dog", "cat"]
    code, _, err = command("voc", "photos", "out.json", "--classes", "dog")
    assert code == 2
    assert "class 'cat' is not one of dog" in err


def test_openimages(folder, command):
    (folder / "boxes.csv").write_text(
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf\n"
        "a,x,/m/01,1,.1,.4,.1,.5,0,0\nb,x,/m/02,1,.1,.4,.1,.5,0,1\n"
    )
    assert command("openimages", "boxes.csv", "out.json")[0] == 0
    assert converted(folder) == {"a.jpg": [("/m/01", BOX, 0)], "b.png": [("/m/02", BOX, 1)]}
    (folder / "boxes.csv").write_text("ImageID,LabelName\na,cat\n")
    code, _, err = command("openimages", "boxes.csv", "out.json")
    assert code == 2
    assert "boxes.csv, line 2" in err


def test_missing_photos_are_counted(folder, command):
    (folder / "photos/a.xml").write_text(VOC)
    (folder / "photos/a.jpg").unlink()
    code, _, err = command("voc", "photos", "out.json")
    assert code == 0
    assert "1 of 1 images are missing, such as" in err


def test_without_globox_one_line_says_what_to_install(folder, command, monkeypatch):
    write_labelme(folder)
    monkeypatch.setitem(sys.modules, "globox", None)
    code, _, err = command("labelme", "labels", "out.json")
    assert code == 2
    assert err == ("convert_dataset.py: error: this format is read by globox: pip install globox\n")


@pytest.mark.parametrize("kind", CONVERTED_FORMATS)
@pytest.mark.parametrize("place", ["nowhere", "photos", "photos/a.jpg"])
def test_a_wrong_place_is_one_line(folder, command, kind, place):
    code, out, err = command(kind, place, "out.json")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert place in err or "globox" in err
