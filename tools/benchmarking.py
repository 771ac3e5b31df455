"""Side-by-side measurement of time and memory, shared by the benchmark scripts."""

import contextlib
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

Step = Callable[[], Any]


# What keeps the other cores busy: a process of two threads, as a small training is. It ends itself
# when the benchmark is gone.
_BUSY = """
import os, torch
torch.set_num_threads(2)
parent, x = os.getppid(), torch.rand(3, 512, 512)
print("ready", flush=True)
while os.getppid() == parent:
    x = torch.tanh(x @ x)
"""


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep the machine busy with ``number`` processes of two threads each, and end them after."""
    command = [sys.executable, "-c", _BUSY]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(number)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, device: str) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def time_side_by_side(
    steps: dict[str, Step], device: str, repeats: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each step, in turns, so that a busy machine slows all of them alike.

    A round to warm up is not counted; steps that have run need none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats + warm_up):
        for name, step in steps.items():
            value = seconds_of(step, device)
            if round_ >= warm_up:
                seconds[name].append(value)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b within a round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def compare(
    steps: dict[str, Step],
    device: str,
    repeats: int,
    *,
    num_busy: int = 0,
    memory: Callable[[str], int] | None = None,
) -> dict[str, float]:
    """A row of a table: time and memory of "ours" and of "detectron2".

    Medians of both, the median ratio, and our worst round; beside ``num_busy`` processes the steps
    must have run before.
    """
    with busy_processes(num_busy):
        seconds = time_side_by_side(steps, device, repeats, warm_up=not num_busy)
    ours, stock = seconds["ours"], seconds["detectron2"]
    row = {
        "busy processes": num_busy,
        "detectron2 ms": 1000 * statistics.median(stock),
        "ours ms": 1000 * statistics.median(ours),
        "ours / detectron2": median_ratio(ours, stock),
        "ours: worst / median": max(ours) / statistics.median(ours),
    }
    if memory:
        mib = {name: memory(name) / 2**20 for name in steps}
        row |= {f"{name} MiB": value for name, value in mib.items()}
        row["memory: ours / detectron2"] = mib["ours"] / mib["detectron2"]
    return row


def peak_extra_bytes(step: Step, device: str) -> int:
    """Memory that a step takes at its peak beyond what is held before it.

    On the CPU this is the process's resident memory: call it in a process of its own, as memory
    freed before is not always given back to the system.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def in_own_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module's function in a fresh process and return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *args, **kwargs).result()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device,
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def report(title: str, rows: list[dict[str, Any]], device: str, output: str | None) -> None:
    """Print the rows as a table; write them, with the machine, as JSON."""
    print(f"\n{title}")
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g", missingval="-"))
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "machine": machine(device), "rows": rows}
        Path(output).write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {output}")
