"""The training data as one stream of samples, which a resumed training continues.

Sample number n of the stream is an image and a seed for its augmentations, both given by the
training's seed and n alone: workers, processes and evaluations in between change nothing of it.
"""

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import build_batch_data_loader
from detectron2.utils import comm
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import UserError

logger = logging.getLogger(__name__)

Sample = tuple[int, int]  # its number in this process's part of the stream, its image's index
Mapper = Callable[[dict[str, Any]], Any]
_SAMPLER, _AUGMENTATION, _STEP = range(3)
_MOST_SKIPPED = 100  # images in a row


def seed_all(*entropy: int) -> None:
    """Seed torch's, numpy's and Python's random states from some numbers.

    Args:
        entropy: non-negative; other numbers give an independent state.
    """
    words = np.random.SeedSequence(entropy).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    random.seed(int(words[3]))


def seed_step(seed: int, iteration: int) -> None:
    """Seed what is random in a step, e.g. dropout, by its iteration: nothing to save for resume.

    Args:
        seed: the training's.
        iteration: counted from 0.
    """
    seed_all(_STEP, seed, iteration, comm.get_rank())


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed as :func:`seed_all` does; afterwards random states of the CPU are what they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_all(*entropy)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class _Stream(IterableDataset[Any]):
    """This process's part of the stream, shared by its workers."""

    def __init__(
        self,
        load: Callable[[Sample], Any],
        samples: Callable[[], Iterator[Sample]],
        chunk: int,
        init_worker: Callable[[], None] | None,
    ):
        self._load = load
        self._samples = samples
        self._chunk = chunk  # consecutive samples of one worker: what it makes a batch of
        self._init_worker = init_worker

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and self._init_worker is not None:
            self._init_worker()
        number, id_ = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        for i, sample in enumerate(self._samples()):
            if i // self._chunk % number == id_:
                yield self._load(sample)


class ResumableLoader:
    """detectron2's training loader: batches without end, from any iteration on.

    Attributes:
        seed: of the stream; to be set before the first batch is asked for.
        start_iter: the iteration of the first batch; the same holds for it.
    """

    def __init__(
        self,
        cfg: CfgNode,
        dicts: list[dict[str, Any]],
        mapper: Mapper,
        *,
        init_worker: Callable[[], None] | None = None,
    ):
        """Keep what the loader is made of; it is made when the first batch is asked for.

        Args:
            cfg: the full config.
            dicts: detectron2's dataset dicts.
            mapper: makes a training example of a dict; None skips it, as in detectron2: another
                image takes its place.
            init_worker: called in each data worker before it loads anything.
        """
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self._cfg = cfg
        # Kept here, as a data worker may lack the process group.
        self._world_size, self._rank = comm.get_world_size(), comm.get_rank()
        self._batch = cfg.SOLVER.IMS_PER_BATCH // self._world_size
        self._grouping = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self._wide = [d["width"] > d["height"] for d in dicts] if self._grouping else []
        self._dicts = DatasetFromList(dicts, copy=False)
        self._mapper = mapper
        self._init_worker = init_worker

    def __iter__(self) -> Iterator[list[Any]]:
        # detectron2 seeds some samplers by numpy's random state; DataLoader draws from torch's.
        with seeded(_SAMPLER, self.seed):
            batches = iter(self.build())
            first = next(batches)
        yield first
        yield from batches

    def build(self) -> Iterable[list[Any]]:
        """detectron2's loader of the batches from ``start_iter`` on."""
        sampler = build_detection_train_loader.from_config(
            self._cfg, mapper=self._mapper, dataset=self._dicts
        )["sampler"]
        stream = _Stream(
            self._load,
            partial(_rest, sampler, *self._replay(sampler)),
            chunk=1 if self._grouping else self._batch,
            init_worker=self._init_worker,
        )
        loader: Iterable[list[Any]] = build_batch_data_loader(
            stream,
            None,
            self._cfg.SOLVER.IMS_PER_BATCH,
            aspect_ratio_grouping=self._grouping,
            num_workers=self._cfg.DATALOADER.NUM_WORKERS,
        )
        return loader

    def _load(self, sample: Sample) -> Any:
        number, index = sample
        number = number * self._world_size + self._rank
        with seeded(_AUGMENTATION, self.seed, number):
            for _ in range(_MOST_SKIPPED):
                if (example := self._mapper(self._dicts[index])) is not None:
                    return example
                index = self._another(index)
        raise UserError(f"the mapper has skipped {_MOST_SKIPPED} images in a row")

    def _another(self, index: int) -> int:
        """Some image; where images are grouped one of the same group, on which resuming relies."""
        shape = self._wide[index] if self._grouping else None
        while True:
            other = int(np.random.randint(len(self._dicts)))
            if shape is None or self._wide[other] == shape:
                return other

    def _replay(self, sampler: Iterable[int]) -> tuple[list[Sample], int]:
        """What the iterations before the first have left.

        Returns:
            samples taken from the stream but waiting for a batch of their shape, and the number of
            the first not taken.
        """
        if not self._grouping:
            return [], self.start_iter * self._batch
        waiting: dict[bool, list[Sample]] = {False: [], True: []}
        batches, taken = 0, 0
        stream = enumerate(sampler)
        while batches < self.start_iter:
            sample = next(stream)
            taken += 1
            group = waiting[self._wide[sample[1]]]
            group.append(sample)
            if len(group) == self._batch:
                group.clear()
                batches += 1
        return sorted(waiting[False] + waiting[True]), taken


class EndlessLoader:
    """Batches of any other loader, epoch after epoch; a resumed training starts it from the front.

    Attributes:
        seed: of what is random in the steps; the loader's own randomness does not follow it.
        start_iter: not used.
    """

    def __init__(self, loader: Iterable[list[Any]], seed: int):
        """Keep the loader.

        Args:
            loader: gives batches of training examples; with or without an end.
            seed: SEED of the config.
        """
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        self._loader = loader

    def __iter__(self) -> Iterator[list[Any]]:
        while True:
            batch = None
            for batch in self._loader:
                yield batch
            if batch is None:
                raise UserError("the training loader has no batch left; give one that can repeat")


Loader = ResumableLoader | EndlessLoader


def as_loader(loader: Iterable[list[Any]], seed: int) -> Loader:
    """A loader with a seed, whatever a subclass's ``build_train_loader`` has made.

    Args:
        loader: gives batches of training examples.
        seed: SEED of the config.

    Returns:
        the loader itself, or an :class:`EndlessLoader`, with a warning.
    """
    if isinstance(loader, ResumableLoader):
        return loader
    logger.warning(
        "the training loader can't go on where it stopped: a resumed training starts it from the "
        "front (build_train_loader of iou_balanced_d2's Trainer takes a mapper instead)"
    )
    return EndlessLoader(loader, seed)


class SeedState:
    """The seed of the data's stream as a checkpointable, for SEED -1: detectron2 draws one then."""

    def __init__(self, loader: Loader, seed: int):
        """Set whose seed it is.

        Args:
            loader: the training's.
            seed: SEED of the config; only a negative one is replaced by a checkpoint's.
        """
        self._loader = loader
        self._fixed = seed >= 0

    def state_dict(self) -> dict[str, int]:
        """The seed."""
        return {"seed": self._loader.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the seed of a checkpoint."""
        if not self._fixed:
            self._loader.seed = state["seed"]


def _rest(sampler: Iterable[int], pending: list[Sample], start: int) -> Iterator[Sample]:
    """The samples pending, then those of the stream from number ``start`` on."""
    yield from pending
    yield from itertools.islice(enumerate(sampler), start, None)
