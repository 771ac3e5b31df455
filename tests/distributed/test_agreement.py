"""What must be the same in all processes."""

import socket

import pytest
from detectron2.utils import comm

from iou_balanced_d2.engine import agreement
from iou_balanced_d2.engine.agreement import check_same_data, versions
from iou_balanced_d2.engine.placement import Placement
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

R50 = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")
FOUR = Placement(world_size=4, local_size=2, timeout=30)


@pytest.fixture(autouse=True)
def _hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "host-a")


def test_versions_tell_one_source_from_another(tmp_path, monkeypatch):
    before = versions()
    assert set(before) == {"iou_balanced_d2", "detectron2", "torch"}
    (tmp_path / "losses.py").write_text("eta = 1")
    monkeypatch.setattr(agreement.iou_balanced_d2, "__file__", str(tmp_path / "__init__.py"))
    first = versions()
    (tmp_path / "losses.py").write_text("eta = 2")
    second = versions()
    project = tmp_path / "projects/SSD/ssd/ssd.py"
    for path in (project, project.with_name("__init__.py"), tmp_path / "projects/SSD/convert.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(agreement.iou_balanced_d2, "__file__", str(tmp_path / "package/x.py"))
    monkeypatch.setattr(agreement.projects, "__path__", [str(tmp_path / "projects/SSD")])
    third = versions()
    project.write_text("eta = 3")
    seen = (before, first, second, third, versions())
    assert len({v["iou_balanced_d2"] for v in seen}) == 5
    project.parent.rename(tmp_path / "moved")  # as a wheel has it: in the package
    (tmp_path / "package/projects").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "package/projects/ssd")
    monkeypatch.setattr(agreement.projects, "__path__", [str(tmp_path / "package/projects")])
    assert versions() == seen[-1]


def example(name="a/1.jpg", box=(0, 0, 5, 5)):
    return {"file_name": name, "annotations": [{"bbox": box, "category_id": 1}]}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([example("b/1.jpg")], None),
        ([example(), example()], "number of images: 2 there, 1 here"),
        ([example("a/2.jpg")], "names of image files"),
        ([{**example(), "annotations": []}], "number of boxes: 0 there, 1 here"),
        ([example(box=(0, 0, 5, 6))], "boxes and classes"),
    ],
)
def test_training_data_are_compared(monkeypatch, other, said):
    gathered = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda x: gathered.append(x) or gathered)
    check_same_data([example()])
    if said is None:
        check_same_data(other)
        return
    with pytest.raises(UserError) as caught:
        check_same_data(other)
    assert said in str(caught.value)
    assert "rank 1 on host-a has other training data than rank 0 on host-a" in str(caught.value)
