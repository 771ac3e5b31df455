"""Processes that meet: threads stand for them, a shared store for the net."""

import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from iou_balanced_d2.engine import load_config, meeting
from iou_balanced_d2.engine.agreement import facts_of
from iou_balanced_d2.engine.meeting import abandon, agree
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
    monkeypatch.setattr(socket, "gethostname", lambda: "host-a")


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


def test_who_never_comes_is_named():
    impatient = replace(FOUR, timeout=0.5)
    told = outcomes([(impatient, 0, {}), (impatient, 1, {})])
    assert told[0] == told[1]
    assert told[0].startswith("waited 0.5 s for rank 2, 3 of 4 (--machine-rank 1): ")
    told = outcomes([(impatient, 0, {}), (impatient, 2, {}), (impatient, 3, {})])
    assert told[2].startswith("waited 0.5 s for rank 1 of 4 (--machine-rank 0): ")


def test_two_processes_of_one_rank_end_the_waiting_of_all(monkeypatch):
    monkeypatch.setattr(meeting, "_LINGER", 0.1)
    told = outcomes([(FOUR, 0, {}), (FOUR, 1, {}), (FOUR, 1, {})])
    assert len(set(told)) == 1
    assert "two processes claim rank 1 of 4, on host-a and on host-a" in told[0]
    # One that comes when the others have begun is alone with the error.
    store = HashStore()
    assert outcomes([(FOUR, rank, {}) for rank in range(4)], store) == [None] * 4
    assert "two processes claim rank 3" in outcomes([(FOUR, 3, {})], store)[0]


def test_different_numbers_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(meeting, "_LINGER", 0.1)
    eight = Placement(world_size=8, local_size=4, timeout=30)
    told = outcomes([(FOUR, 0, {}), (eight, 4, {})])
    assert len(set(told)) == 1
    assert "the number of processes is" in told[0]
    assert "4 (2 x 2)" in told[0]
    assert "8 (2 x 4)" in told[0]


def test_who_can_not_start_tells_the_others():
    store = HashStore()
    first, _ = abandon(store, FOUR, 2, "MODEL.WEIGHTS 'x' not found")
    again, _ = abandon(store, FOUR, 0, "MODEL.WEIGHTS 'x' not found")
    assert first
    assert not again, "it has been told"
    told = outcomes([(FOUR, 0, {})], store)
    assert told == ["rank 2 on host-a can't start: MODEL.WEIGHTS 'x' not found"]


RESTARTED = Placement(world_size=2, local_size=1, timeout=20, restarts=True)


def test_processes_that_are_started_anew_meet_those_of_their_own_time():
    """Whoever is there first; some had not come before they were ended, one could not start."""
    store = HashStore()
    assert outcomes([(RESTARTED, 0, {}), (RESTARTED, 1, {})], store) == [None, None]
    late = threading.Timer(0.5, meeting.enter, (store, RESTARTED, 0))  # and is ended at once
    late.start()
    assert meeting.enter(store, RESTARTED, 1).number == 2, "it waits for a new rank 0"
    late.join()
    meeting.enter(store, RESTARTED, 0)  # round 3, ended before rank 1 had come
    told = []
    waiting = threading.Thread(
        target=lambda: told.append(outcomes([(RESTARTED, 1, {"x": "1"})], store))
    )
    waiting.start()
    time.sleep(0.3)
    assert outcomes([(RESTARTED, 0, {"x": "1"})], store) == [None], "rank 1 comes along"
    waiting.join()
    assert told == [[None]]
    abandon_one = threading.Thread(target=abandon, args=(store, RESTARTED, 1, "no such file"))
    abandon_one.start()
    assert outcomes([(RESTARTED, 0, {})], store) == ["rank 1 on host-a can't start: no such file"]
    abandon_one.join()
    assert outcomes([(RESTARTED, 0, {}), (RESTARTED, 1, {})], store) == [None, None]


def test_who_is_started_anew_alone_says_so():
    with pytest.raises(UserError, match=r"waited 0\.2 s for rank 0 of 2"):
        agree(HashStore(), replace(RESTARTED, timeout=0.2), 1, {})
