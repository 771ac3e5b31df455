"""What must be the same in all processes."""

import socket
from types import SimpleNamespace

import pytest
from detectron2.utils import comm

from iou_balanced_d2.engine import agreement, load_config
from iou_balanced_d2.engine.agreement import check_same, check_same_data, facts_of, versions
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

R50 = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")


def facts(*opts, eval_only=False):
    return facts_of(load_config(R50, opts), SimpleNamespace(eval_only=eval_only))


@pytest.fixture
def check(monkeypatch):
    """Check as several processes do, one after the other; the error of the last one or None."""
    monkeypatch.setattr(socket, "gethostname", lambda: "host-a")
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)

    def check_each(function, *each):
        gathered = []
        monkeypatch.setattr(comm, "all_gather", lambda x: gathered.append(x) or gathered)
        for one in each[:-1]:
            function(one)
        try:
            function(each[-1])
        except UserError as error:
            return str(error)
        return None

    return check_each


def test_folders_may_differ(check):
    paths = [["DATASETS.COCO_JSON", (("x", f"/{i}/x.json", f"/{i}/images"),)] for i in range(3)]
    own = [facts("OUTPUT_DIR", f"o{i}", "MODEL.WEIGHTS", f"w{i}", *paths[i]) for i in range(3)]
    assert check(check_same, *own) is None


def test_three_differences_are_named_and_the_rest_counted(check):
    many = ["SOLVER.BASE_LR", "0.02", "DATASETS.VOC_FOLDER", (("v", "/voc", "train"),)]
    message = check(check_same, facts(), facts(*many, "SEED", "3", eval_only=True))
    assert message.startswith("rank 1 on host-a disagrees with rank 0 on host-a: ")
    assert message.count(" there, ") == 3
    assert "--eval-only is True there, False here" in message
    assert "DATASETS.VOC_FOLDER is [['v', 'train']] there, [] here" in message
    assert message.endswith("(and 1 more)")
    message = check(check_same, facts(), facts(), facts("SOLVER.BASE_LR", "0.02"))
    assert message.startswith("rank 2 ")
    assert message.endswith(": SOLVER.BASE_LR is 0.02 there, 0.01 here")


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
        ([example(), example()], "number of training images is 2 there, 1 here"),
        ([example("a/2.jpg")], "digest of the image files' names is "),
        ([{**example(), "annotations": []}], "number of boxes is 0 there, 1 here"),
        ([example(box=(0, 0, 5, 6))], "digest of boxes and classes is "),
    ],
)
def test_training_data_are_compared(check, other, said):
    message = check(check_same_data, [example()], other)
    assert message is None if said is None else said in message
