"""Loaders and mappers of one's own in a subclass of the Trainer."""

import copy
import logging

import pytest
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T

from iou_balanced_d2.data import check_datasets
from iou_balanced_d2.data.resumable_loader import EndlessLoader, ResumableLoader, as_loader
from iou_balanced_d2.engine import Trainer, load_config
from iou_balanced_d2.errors import UserError

from ..command import forget_own_data
from ..toy import toy_batch


@pytest.fixture
def cfg(own_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forget_own_data()
    cfg = load_config(str(own_config), ["MODEL.DEVICE", "cpu", "SOLVER.CHECKPOINT_PERIOD", "2"])
    check_datasets(cfg, training=True)
    yield cfg
    forget_own_data()


class OwnMapper(DatasetMapper):
    """No flip; writes down which images it was asked for."""

    seen: list[str]

    def __init__(self, cfg):
        super().__init__(cfg, is_train=True, augmentations=[T.ResizeShortestEdge(64)])
        self.seen = []

    def __call__(self, record):
        self.seen.append(record["file_name"])
        return super().__call__(record)


def with_loader(make):
    class OwnTrainer(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return make(cls, cfg)

    return OwnTrainer


def train(trainer_class, cfg):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "can't go on where it stopped" in r.message]


def test_detectron2s_documented_loader_trains_and_resumes(cfg, caplog):
    make = lambda cls, cfg: build_detection_train_loader(cfg, mapper=OwnMapper(cfg))  # noqa: E731
    with caplog.at_level(logging.WARNING):
        assert train(with_loader(make), cfg).iter == 4
    assert len(warnings_of(caplog)) == 1
    cfg = copy.deepcopy(cfg)
    cfg.SOLVER.MAX_ITER = 6
    trainer = train(with_loader(make), cfg)
    assert (trainer.start_iter, trainer.iter) == (4, 6)


def test_a_list_of_batches_is_repeated(cfg, caplog):
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert train(with_loader(lambda cls, cfg: [toy_batch()]), cfg).iter == 4
    assert len(warnings_of(caplog)) == 1


def test_a_mapper_of_ones_own_keeps_the_stream(cfg, caplog):
    """Images come in the order of the default mapper, without a warning."""
    mapper = OwnMapper(cfg)
    own = lambda cls, cfg: Trainer.build_train_loader(cfg, mapper)  # noqa: E731
    trainer = with_loader(own)(cfg)
    assert isinstance(trainer.loader, ResumableLoader)
    assert not warnings_of(caplog)
    batches = iter(trainer.loader)
    seen = [x["file_name"] for _ in range(4) for x in next(batches)]
    default = iter(Trainer(cfg).loader)
    assert seen == [x["file_name"] for _ in range(4) for x in next(default)]
    assert seen == mapper.seen[: len(seen)]
    assert next(batches)[0]["image"].shape[1:] == (64, 64)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_mapper_may_skip_images(cfg, grouped):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouped
    dicts = [{"id": i, "width": 9, "height": 5 + 9 * (i % 2), "annotations": []} for i in range(20)]

    def odd_thirds_only(record):
        return record if record["id"] % 3 == 1 else None

    def batches(first, number):
        loader = ResumableLoader(cfg, dicts, odd_thirds_only)
        loader.start_iter = first
        iterator = iter(loader)
        return [[record["id"] for record in next(iterator)] for _ in range(number)]

    found = batches(0, 12)
    assert {i % 3 for batch in found for i in batch} == {1}
    assert batches(7, 5) == found[7:]
    loader = ResumableLoader(cfg, dicts, lambda record: None)
    with pytest.raises(UserError, match="has skipped 100 images in a row"):
        next(iter(loader))


def test_errors_of_a_mapper_of_ones_own_name_the_image(cfg):
    def broken(record):
        raise ValueError("no such channel")

    with pytest.raises(UserError, match=r"data set 'own': image .*\.png' .*no such channel"):
        next(iter(Trainer.build_train_loader(cfg, broken)))


def test_an_exhausted_loader_is_named():
    batches = iter(as_loader(iter([1, 2]), seed=1))
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(UserError, match="no batch left"):
        next(batches)


def test_a_seed_is_drawn_where_none_is_given():
    assert EndlessLoader([], seed=3).seed == 3
    assert EndlessLoader([], seed=-1).seed >= 0
