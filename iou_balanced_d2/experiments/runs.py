"""One run of an experiment: a normal run of train_net.py in a folder of its own.

The folder holds, beside what the training writes, ``run.yaml`` (its config file), ``run.json``
(what was run where, and for how long) and ``console.txt``.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import yaml

from ..errors import UserError
from .protocol import Settings


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: "data set/variant/seed".
        folder: its OUTPUT_DIR.
        config: detectron2 config file to start from.
        settings: config keys and values that differ from it.
    """

    name: str
    folder: Path
    config: Path
    settings: Settings

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
                f"{self.folder} holds a run with other settings than the protocol's; delete it, or "
                "give another --output"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(text)

    def _config_text(self) -> str:
        content: dict[str, Any] = {"_BASE_": str(self.config)}
        for key, value in (self.settings | {"OUTPUT_DIR": str(self.folder)}).items():
            *parents, last = key.split(".")
            node = content
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return yaml.safe_dump(content, sort_keys=True)

    def command(self, train_script: Path) -> list[str]:
        """The command of the run; it goes on from the last checkpoint where there is one."""
        command = [sys.executable, str(train_script), "--config-file", str(self.config_file)]
        return [*command, "--resume"] if (self.folder / "last_checkpoint").is_file() else command

    def execute(self, train_script: Path, environment: Mapping[str, str]) -> int:
        """Train and evaluate; returns the exit code. Killed with this process's interruption."""
        command, before = self.command(train_script), self.record
        start = time.monotonic()
        with open(self.folder / "console.txt", "a") as console:
            process = subprocess.Popen(
                command,
                cwd=train_script.parent,
                env={**os.environ, **environment},
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        process.returncode = exit_code = os.waitstatus_to_exitcode(status)
        record = {
            "name": self.name,
            "command": command,
            "settings": self.settings,
            "exit_code": exit_code,
            "attempts": before.get("attempts", 0) + 1,
            "seconds": before.get("seconds", 0.0) + time.monotonic() - start,
            "peak_memory_mib": max(before.get("peak_memory_mib", 0), usage.ru_maxrss / 1024),
            "versions": versions(),
            "hardware": hardware(),
        }
        temporary = self.folder / "run.json.tmp"
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, self.folder / "run.json")
        return exit_code

    def scalars(self, name: str) -> list[float]:
        """The values of a scalar that the training has logged, in their order."""
        path = self.folder / "metrics.json"
        if not path.is_file():
            return []
        # A resumed run logs the iterations after its checkpoint again: the last value counts.
        values = {}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if name in entry:
                values[entry["iteration"]] = entry[name]
        return [values[iteration] for iteration in sorted(values)]

    def mean(self, name: str) -> float:
        """The mean of a scalar over the training.

        Raises:
            UserError: if it was never logged.
        """
        values = self.scalars(name)
        if not values:
            raise UserError(f"{self.folder / 'metrics.json'} has no scalar {name!r}")
        return float(np.mean(values))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
    }


def hardware() -> dict[str, Any]:
    """The device a run uses by default, and the cores."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0))}  # fmt: skip
