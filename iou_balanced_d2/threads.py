"""Work on blocks of tensors, divided among threads once.

A PyTorch operation on a large CPU tensor starts its threads and waits for the last of them. On a
machine that does something else too, a long row of such operations waits for a busy core again and
again. Here each thread takes whole blocks, one after the other, and applies all operations to them;
the only wait is at the end, and a thread on a busy core simply takes fewer blocks.
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
        work: called once in each thread with an iterator that all of them share. It should
            write its results to where the block says, so that no result depends on threads.
        blocks: what there is to do.
        num_threads: how many threads to use at most; PyTorch's number is
            ``torch.get_num_threads()``.

    Raises:
        Exception: whatever ``work`` raises.
    """
    shared = iter(blocks)
    # The mode belongs to a thread; without it the caller's tensors could not be written to.
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
