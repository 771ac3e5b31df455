"""A protocol carried out: complete runs are skipped, those cut off go on, several run at once."""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog

from ..data import prepare_dataset, register_datasets_of
from ..data.coco_format import read_coco_json
from ..data.layouts import split_images
from ..engine import load_config
from ..errors import UserError
from ..files import write_text
from .evidence import read_record, record_file, write_record
from .protocol import Protocol, Settings, references
from .runs import Run, num_cores

_CORES_PER_RUN = 2
_Started = Callable[[subprocess.Popen[bytes]], None]
# detectron2's catalog of data sets is one for all threads.
_ONE_RECORD_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Experiment:
    """The runs of a protocol below one folder."""

    protocol: Protocol  #: what to run
    output: Path  #: folder of ``<data set>/<variant>/seed<n>``
    at_once: int  #: how many runs at the same time
    #: Folder for the record of each complete run; None writes none. Of several data sets a run with
    #: a record is done, also where its folder is gone.
    records: Path | None = None
    #: What Python is started with for a run.
    train: Sequence[str] = ("-m", "iou_balanced_d2", "train")

    def carry_out(self) -> dict[str, dict[str, list[Run]]]:
        """Run what is not complete yet.

        Returns:
            the runs by data set and variant.

        Raises:
            UserError: if runs have failed, naming them, after all others are through; or if a
                record can't be written.
        """
        bases = {name: self._judged_by(name) for name in self.protocol.data_sets}
        number = len(bases) * len(self.protocol.order())
        print(
            f"{number} runs, {self.at_once} at a time; each writes its output to "
            f"{self.output}/<data set>/<variant>/seed<n>/console.txt",
            flush=True,
        )
        runs: dict[str, dict[str, list[Run]]] = {
            name: {variant: [] for variant in self.protocol.variants} for name in bases
        }
        waiting: list[Run] = []
        # Seed by seed, so that the variants compare even if the experiment is cut off early.
        for seed, variant in self.protocol.order():
            needed = {r["variant"] for r in references(self.protocol.variants[variant])}
            if needed:
                self._execute(waiting)
                waiting = []
            for name, base in bases.items():
                others = {other: runs[name][other][-1] for other in needed}
                # A run that needs a failed one is left out; the failed one is reported below.
                if all(self._done(other) for other in others.values()):
                    run = self._run(name, variant, seed, base, others)
                    runs[name][variant].append(run)
                    waiting.append(run)
        self._execute(waiting)
        every_run = [r for groups in runs.values() for group in groups.values() for r in group]
        for run in every_run:
            self._record(run)
        failed = [run for run in every_run if not self._done(run)]
        if failed:
            where = ", ".join(str(run.folder / "console.txt") for run in failed)
            raise UserError(f"{len(failed)} of {len(every_run)} runs failed: see {where}")
        return runs

    def _done(self, run: Run) -> bool:
        """Whether the run is complete; of several data sets a record of it is enough to compare."""
        has_record = bool(self._kept(run))  # raises for one of other settings: before any run
        return run.complete or (has_record and len(self.protocol.data_sets) > 1)

    def _kept(self, run: Run) -> dict[str, Any]:
        """The record of a run; empty if there is none."""
        file = record_file(self.records, run.name) if self.records else None
        return read_record(file, run) if file and file.is_file() else {}

    def _mean(self, run: Run, scalar: str) -> float:
        """Mean of a logged scalar over a run that is done."""
        if run.complete:
            return run.mean(scalar)
        measured = self._kept(run)["measured"]
        if scalar != "iou_balanced/loc_mean_weight" or measured.get(scalar) is None:
            raise UserError(f"{run.name}: its record has no mean of {scalar!r}: delete the record")
        return measured[scalar]

    def _record(self, run: Run) -> None:
        """Write the record of a complete run, unless there is one."""
        if self.records and run.complete and not self._kept(run):
            with _ONE_RECORD_AT_A_TIME:
                write_record(run.folder, self.records)

    def _judged_by(self, name: str) -> Settings:
        """The data set's settings, judged by a part held out where the protocol says so."""
        settings, share = self.protocol.data_sets[name], self.protocol.held_out
        if not share:
            return settings
        return hold_out(self.protocol.config, settings, share, self._folder(name, "data"))

    def _run(
        self, name: str, variant: str, seed: int, base: Settings, others: dict[str, Run]
    ) -> Run:
        def resolve(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return round(self._mean(others[value["variant"]], value["mean_of"]), 4)

        own = {key: resolve(value) for key, value in self.protocol.variants[variant].items()}
        return Run(
            name=f"{name}/{variant}/seed{seed}",
            folder=self._folder(name, variant) / f"seed{seed}",
            config=self.protocol.config,
            settings=base | own | {"SEED": seed},
        )

    def _folder(self, *names: str) -> Path:
        return self.output.joinpath(*(name.replace("/", "_").replace(" ", "_") for name in names))

    def _execute(self, runs: Sequence[Run]) -> None:
        """Run those that are not complete, ``at_once`` of them at a time."""
        for run in runs:
            if run.folder.is_dir() or not self._done(run):
                run.prepare()
        waiting = [run for run in runs if not self._done(run)]
        threads = str(max(1, num_cores() // self.at_once))
        # The user's own number of threads stands: some experiments need the same in all runs.
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        processes: list[subprocess.Popen[bytes]] = []
        with ThreadPoolExecutor(self.at_once) as pool:
            results = [
                pool.submit(self._train, run, environment, processes.append) for run in waiting
            ]
            try:
                for result in results:
                    result.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    if process.returncode is None:
                        process.terminate()
                raise

    def _train(self, run: Run, environment: Mapping[str, str], started: _Started) -> None:
        print(f"{run.name}: started", flush=True)
        exit_code = run.execute(self.train, environment, started)
        minutes, state = run.record["seconds"] / 60, "FAILED" if exit_code else "done"
        print(f"{run.name}: {state} ({minutes:.1f} min)", flush=True)
        # A record that can't be written must not end the other trainings; carry_out tries again.
        with contextlib.suppress(UserError):
            self._record(run)


def how_many_at_once(memory_gib: float) -> int:
    """How many runs fit: into the GPU's free memory or the machine's, and on the cores."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        # (SC_AVPHYS_PAGES leaves out the cache of files, which makes room when asked.)
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    cores = num_cores() // _CORES_PER_RUN
    return max(1, min(int(free / 2**30 / memory_gib), cores))


def hold_out(config: Path, settings: Settings, share: float, folder: Path) -> Settings:
    """Settings to train on one part of DATASETS.TRAIN's images and test on a fixed ``share``.

    The two COCO JSON files of each training set are written into the folder.
    """
    # Values as they would be written on a command line.
    pairs = [(key, v if isinstance(v, str) else repr(v)) for key, v in settings.items()]
    cfg = load_config(str(config), [x for pair in pairs for x in pair])
    register_datasets_of(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    entries = [list(entry) for entry in cfg.DATASETS.COCO_JSON]
    parts: dict[str, list[str]] = {"rest": [], "held_out": []}
    for name in cfg.DATASETS.TRAIN:
        prepare_dataset(name)
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file is None:
            raise UserError(f"data set {name!r} has no COCO JSON file that a part can be taken of")
        content = read_coco_json(json_file)
        rest, held_out = split_images(content, share, name)
        for part, subset in (("held_out", held_out), ("rest", rest)):
            path = folder / f"{name}-{part}.json"
            write_text(path, json.dumps(subset))
            entries.append([f"{name}-{part}", str(path), metadata.image_root])
            parts[part].append(f"{name}-{part}")
    return settings | {
        "DATASETS.COCO_JSON": entries,
        "DATASETS.TRAIN": parts["rest"],
        "DATASETS.TEST": parts["held_out"],
    }
