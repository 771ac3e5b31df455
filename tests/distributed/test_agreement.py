"""What processes agree on before they start: threads stand for them, a shared store for the net."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from detectron2.utils import comm
from torch.distributed import HashStore

from iou_balanced_d2.engine import agreement, load_config
from iou_balanced_d2.engine.agreement import abandon, agree, check_same_data, facts_of, versions
from iou_balanced_d2.engine.placement import Placement
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

R50 = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")
FOUR = Placement(world_size=4, local_size=2, timeout=30)


def facts(*opts, eval_only=False):
    return facts_of(load_config(R50, opts), SimpleNamespace(eval_only=eval_only))


def outcomes(processes, store=None):
    """What each process (placement, rank, facts) is told by a UserError; None where it agrees."""
    store, told = store or HashStore(), [None] * len(processes)

    def run(i, placement, rank, own):
        try:
            agree(store, placement, rank, own)
        except UserError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=run, args=(i, *p)) for i, p in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"
    return told


@pytest.fixture(autouse=True)
def _hosts(monkeypatch):
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "host-a")


def test_equal_processes_agree_whatever_their_folders():
    paths = [["DATASETS.COCO_JSON", (("x", f"/{i}/x.json", f"/{i}/images"),)] for i in range(4)]
    own = [facts("OUTPUT_DIR", f"o{i}", "MODEL.WEIGHTS", f"w{i}", *paths[i]) for i in range(4)]
    assert outcomes([(FOUR, rank, own[rank]) for rank in range(4)]) == [None] * 4


def test_the_keys_that_differ_are_named_with_both_values_to_all():
    other = facts("SOLVER.BASE_LR", "0.02", "DATASETS.VOC_FOLDER", (("v", "/voc", "train"),))
    told = outcomes([(FOUR, r, other if r == 2 else facts()) for r in range(4)])
    assert told == [told[0]] * 4
    assert told[0].startswith("rank 2 on host-a disagrees with rank 0 on host-a: ")
    assert "SOLVER.BASE_LR is 0.02 there, 0.01 here" in told[0]
    assert "DATASETS.VOC_FOLDER is [['v', 'train']] there, [] here" in told[0]


def test_three_differences_are_named_and_the_rest_counted():
    two = Placement(world_size=2, local_size=2, timeout=30)
    many = ["SOLVER.BASE_LR", "1.0", "SEED", "3", "SOLVER.GAMMA", "2.0", "VIS_PERIOD", "9"]
    told = outcomes([(two, 0, facts()), (two, 1, facts(*many, eval_only=True))])
    assert told[0] == told[1]
    assert told[0].count(" there, ") == 3
    assert "--eval-only is True there, False here" in told[0]
    assert told[0].endswith("(and 2 more)")


def test_versions_tell_one_source_from_another(tmp_path, monkeypatch):
    before = versions()
    assert set(before) == {"iou_balanced_d2", "detectron2", "torch"}
    (tmp_path / "losses.py").write_text("eta = 1")
    monkeypatch.setattr(agreement.iou_balanced_d2, "__file__", str(tmp_path / "__init__.py"))
    first = versions()
    (tmp_path / "losses.py").write_text("eta = 2")
    assert len({v["iou_balanced_d2"] for v in (before, first, versions())}) == 3


def test_who_never_comes_is_named():
    impatient = replace(FOUR, timeout=0.5)
    told = outcomes([(impatient, 0, {}), (impatient, 1, {})])
    assert told[0] == told[1]
    assert told[0].startswith("waited 0.5 s for rank 2, 3 of 4 (--machine-rank 1): ")
    told = outcomes([(impatient, 0, {}), (impatient, 2, {}), (impatient, 3, {})])
    assert told[2].startswith("waited 0.5 s for rank 1 of 4 (--machine-rank 0): ")


def test_two_processes_of_one_rank_end_the_waiting_of_all():
    told = outcomes([(FOUR, 0, {}), (FOUR, 1, {}), (FOUR, 1, {})])
    assert len(set(told)) == 1
    assert "two processes claim rank 1 of 4, on host-a and on host-a" in told[0]
    # One that comes when the others have begun is alone with the error.
    store = HashStore()
    assert outcomes([(FOUR, rank, {}) for rank in range(4)], store) == [None] * 4
    assert "two processes claim rank 3" in outcomes([(FOUR, 3, {})], store)[0]


def test_different_numbers_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(agreement, "_LINGER", 0.1)
    eight = Placement(world_size=8, local_size=4, timeout=30)
    told = outcomes([(FOUR, 0, {}), (eight, 4, {})])
    assert len(set(told)) == 1
    assert "the number of processes is" in told[0]
    assert "4 (2 x 2)" in told[0]
    assert "8 (2 x 4)" in told[0]


def test_who_can_not_start_tells_the_others(monkeypatch):
    monkeypatch.setattr(agreement, "_LINGER", 0.1)
    store = HashStore()
    assert abandon(store, 2, "MODEL.WEIGHTS 'x' not found")
    assert not abandon(store, 3, "MODEL.WEIGHTS 'x' not found"), "it has been told"
    told = outcomes([(FOUR, 0, {})], store)
    assert told == ["rank 2 on host-a can't start: MODEL.WEIGHTS 'x' not found"]


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
