"""One run of an experiment: a normal run of train_net.py in a folder of its own.

The folder holds, beside what the training writes, ``run.yaml`` (its config file), ``run.json``
(what was run where, and for how long) and ``console.txt``.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import yaml
from detectron2.config import CfgNode

from ..analysis.curves import read_training_log
from ..errors import UserError
from ..files import write_text
from .protocol import Settings


@dataclass(frozen=True)
class Run:
    """A training run."""

    name: str  #: "data set/variant/seed"
    folder: Path  #: its OUTPUT_DIR
    config: Path  #: detectron2 config file to start from
    settings: Settings  #: config keys and values that differ from it

    @property
    def config_file(self) -> Path:
        """The config file that the run is started with."""
        return self.folder / "run.yaml"

    @property
    def record(self) -> dict[str, Any]:
        """What ``run.json`` says; empty before the first start."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def complete(self) -> bool:
        """Whether it was trained and evaluated to the end."""
        return self.record.get("exit_code") == 0

    def prepare(self) -> None:
        """Write the config file.

        Raises:
            UserError: if the folder holds a run with other settings.
        """
        text = self._config_text()
        if self.config_file.is_file() and self.config_file.read_text() != text:
            raise UserError(
                f"{self.folder} holds a run with other settings than those asked for now; delete "
                "it, or give another --output"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, text)

    def _config_text(self) -> str:
        content: dict[str, Any] = {"_BASE_": str(self.config)}
        for key, value in (self.settings | {"OUTPUT_DIR": str(self.folder)}).items():
            *parents, last = key.split(".")
            node = content
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        base = json.dumps(CfgNode.load_yaml_with_base(str(self.config)), sort_keys=True)
        digest = hashlib.sha256(base.encode()).hexdigest()
        return f"# {digest}: what _BASE_ says\n{yaml.safe_dump(content, sort_keys=True)}"

    def execute(
        self,
        train: Sequence[str],
        environment: Mapping[str, str],
        started: Callable[[subprocess.Popen[bytes]], None],
    ) -> int:
        """Train and evaluate, from the last checkpoint where there is one.

        Args:
            train: what Python is started with: the training script, or -m and the module.
            environment: variables to set.
            started: called with the process, so that it can be ended.

        Returns:
            the exit code.
        """
        command = [sys.executable, *train, "--config-file", str(self.config_file)]
        if (self.folder / "console.txt").is_file():  # it has been started before
            command.append("--resume")
        before, start = self.record, time.monotonic()
        with open(self.folder / "console.txt", "a") as console:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=console, stderr=console
            )
            started(process)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        record = {
            "name": self.name,
            "command": command,
            "settings": self.settings,
            "exit_code": process.returncode,
            "attempts": before.get("attempts", 0) + 1,
            "seconds": before.get("seconds", 0.0) + time.monotonic() - start,
            # What the run costs, also where other processes take the processor for a while.
            "cpu_seconds": before.get("cpu_seconds", 0.0) + usage.ru_utime + usage.ru_stime,
            "peak_memory_mib": max(before.get("peak_memory_mib", 0), usage.ru_maxrss / 1024),
            **_environment(),
        }
        write_text(self.folder / "run.json", json.dumps(record, indent=1))
        return process.returncode

    def scalars(self, name: str) -> list[float]:
        """The values of a scalar that the training has logged, in their order."""
        return [value for _, value in read_training_log(self.folder).get(name, [])]

    def mean(self, name: str) -> float:
        """The mean of a scalar over the training.

        Raises:
            UserError: if it was never logged.
        """
        values = self.scalars(name)
        if not values:
            raise UserError(f"{self.folder / 'metrics.json'} has no scalar {name!r}")
        return float(np.mean(values))


def _environment() -> dict[str, Any]:
    """Versions of what the numbers depend on, and the device that a run uses by default."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
            "numpy": np.__version__,
        },
        "hardware": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processor": platform.processor() or platform.machine(),
            "cores": num_cores(),
        },
    }


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))
