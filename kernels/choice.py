"""Which of two ways to compute the same is the faster here: measured once, then remembered.

A hand-written pass wins on one processor and loses on another that has matrix units. The answer
to a question (a machine, a kind of work, its rough shape, the threads) is kept in choices.json in
the cache folder, so that every later process, and every rank of a job, does the same.
"""

import fcntl
import json
import os
import threading
import time

from .. import cache as places
from .compiled import machine

_BUDGET_S = 0.4  # of timed runs; each way runs at least twice
_ROUNDS = 7
_CLEARLY = 0.9  # a later way must take less than this share of the first one's time
_lock = threading.RLock()
_answers = {}


def fastest(question, ways):
    """The name of the fastest way.

    question: text; asked again, it is answered without measuring. ways: name -> function of no
    arguments, the usual way first: it is taken unless another one is clearly faster.
    """
    if (known := _answers.get(question)) in ways:
        return known
    with _lock:
        key = f"{machine()} {question}"
        known = _read().get(key)
        if known not in ways:
            known = _keep(key, _measured(ways), ways)
        _answers[question] = known
        return known


def times(ways):
    """Least seconds of each way, taking turns, the first turn unmeasured."""
    best = dict.fromkeys(ways, float("inf"))
    began = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
        if not turn:
            began = time.perf_counter()
        elif turn > 1 and time.perf_counter() - began > _BUDGET_S:
            break
    return best


def _measured(ways):
    best = times(ways)
    usual = next(iter(ways))
    quickest = min(best, key=best.get)
    return quickest if best[quickest] < _CLEARLY * best[usual] else usual


def _path():
    place = places.folder()
    return None if place is None else place / "choices.json"


def _read():
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key, answer, ways):
    """Write the answer down; what another process has written meanwhile holds."""
    if (path := _path()) is None:
        return answer
    try:
        with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _read()
            if known.get(key) in ways:
                return known[key]
            known[key] = answer
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            fresh.replace(path)
    except OSError:
        pass  # a full disk: the answer is kept in memory
    return answer
