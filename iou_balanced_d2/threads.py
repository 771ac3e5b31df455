"""Work on blocks of tensors, divided among threads once.

A PyTorch operation on a large CPU tensor starts threads and waits for the last of them. Beside
other processes a sequence of such operations waits for a busy core at each of them. Here each
thread takes whole blocks, one after the other, and applies all operations to them. The only wait is
at the end, and a thread on a busy core takes fewer blocks.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# Elements of a block: as many as an operation handles on the thread that calls it. From 2^15 on,
# PyTorch's grain, it would start threads of its own.
CPU_BLOCK = (1 << 15) - 1


def run_in_threads(work: Callable[[Iterator[T]], None], blocks: list[T], num_threads: int) -> None:
    """Let ``num_threads`` threads, of which the caller is one, work on blocks.

    Threads are started for each call, which takes less than a millisecond: none is alive when a
    process forks its data workers or ends.

    Args:
        work: called once in each thread with an iterator that all of them share. It writes the
            results of a block to the block's own place, so that threads don't change them.
        blocks: the blocks to work on.
        num_threads: how many threads to use at most; PyTorch's number is
            ``torch.get_num_threads()``.

    Raises:
        Exception: an error of ``work``.
    """
    shared = iter(blocks)
    # Each thread has its own inference mode; without the caller's it can't write to its tensors.
    inference_mode = torch.is_inference_mode_enabled()

    def help_out() -> None:
        with torch.inference_mode(inference_mode):
            work(shared)

    helpers = min(num_threads, len(blocks)) - 1
    if helpers < 1:
        work(shared)
        return
    with ThreadPoolExecutor(helpers) as pool:
        futures = [pool.submit(help_out) for _ in range(helpers)]
        work(shared)
    for future in futures:
        future.result()
