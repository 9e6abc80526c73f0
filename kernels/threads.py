"""Compiled loops over row ranges on Python threads: safe to call from many threads at once.

Numba's own parallel layers abort the process when two threads enter them (workqueue) or after a
fork (OpenMP); a server and a data loader do just that. Compiled code releases the GIL instead.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool = None


def _forget():
    """In a forked child the parent's threads do not exist."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _executor(workers):
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < workers:
            _pool = ThreadPoolExecutor(workers, thread_name_prefix="streamctl-kernels")
        return _pool


def over_ranges(function, n, step):
    """[function(start, stop)] over [0, n) in ranges of `step`, on torch.get_num_threads() threads.

    Results come in order. The ranges depend on n and step alone, never on the thread count.
    """
    if n <= step:
        return [function(0, n)] if n else []
    starts = list(range(0, n, step))
    results = [None] * len(starts)
    turns = iter(range(len(starts)))  # next() on it is atomic

    def drain():
        for turn in turns:
            results[turn] = function(starts[turn], min(n, starts[turn] + step))

    helpers = min(torch.get_num_threads(), len(starts)) - 1
    if helpers < 1:
        drain()
        return results
    waiting = [_executor(helpers).submit(drain) for _ in range(helpers)]
    drain()
    for future in waiting:
        if not future.cancel():
            future.result()
    return results
