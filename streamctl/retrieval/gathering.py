"""The hops of one history, in loops that `compiled` has Numba compile.

Uncompiled they are the reference, and answer the first few users of a process sooner than
compiling, or reading what was compiled, would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from streamctl.retrieval.memory import WIDTH
from streamctl.retrieval.transitions import NEXT, RECENCY, UNIT, paid

BACK = 0.6  # weight of a history item against the one after it, in hop 1
LAST = 5  # items whose text counts
TEXT_BACK = 0.7  # weight of an item's text against the one after it
SPREAD = 16  # strongest pieces of a hop from which the next one starts
OWN_BACK = 0.8
NEXT_, ALIKE, NEXT_NEXT, NEXT_ALIKE, OTHERS, OWN = range(6)


def gather_one(
    history, user, mine, mine_worth, sizes, pair_weights,
    starts, counted, followers, counts, totals,
    row_starts, row_sizes, row_ids, row_weights, owners, following, worth, idf,
    vectors, neighbours, popularity,
    score, touched, own, mark, row_score, row_touched, best, near,
    out_items, out_hops, out_strengths, out_ranks, out_text, out_sums, out_popularity,
):  # fmt: skip
    """Fill the outputs of one user; see `Evidence.gather` and `Pieces`.

    score (6, N) and own, mark (N,), row_score (R,): zeros, and zeros again afterwards.
    """
    length = 0
    while length < len(history) and history[length] >= 0:
        length += 1
    for place in range(len(mine)):
        mark[mine[place]] |= 2  # this user's own pairs begin here
    reached = np.zeros(6, np.int64)  # items that each hop touched

    # 1 next: what followed the history's items, in other users' sequences
    weight = 1.0
    for place in range(length - 1, -1, -1):
        reached[NEXT_] = follow(
            history[place], weight, 0.5, mine, mine_worth, pair_weights, starts, counted,
            followers, counts, totals, own, mark, score[NEXT_], touched[NEXT_], reached[NEXT_],
        )  # fmt: skip
        weight *= BACK

    # 2 alike: text neighbours of the last items, by the cosine with their mean
    dim = vectors.shape[1]
    mean = np.zeros(dim, np.float32)
    recent = min(LAST, length)
    weight = 1.0
    for age in range(recent):
        item = history[length - 1 - age]
        for column in range(dim):
            mean[column] += np.float32(weight) * vectors[item, column]
        weight *= TEXT_BACK
    norm = math.sqrt(np.dot(mean, mean))
    if norm > 0:
        mean /= np.float32(norm)
    for age in range(recent):
        item = history[length - 1 - age]
        for place in range(neighbours.shape[1]):
            other = neighbours[item, place]
            if score[ALIKE, other] == 0:
                touched[ALIKE, reached[ALIKE]] = other
                reached[ALIKE] += 1
                score[ALIKE, other] = max(np.dot(mean, vectors[other]), np.float32(1e-6))

    for place in range(length):
        mark[history[place]] |= 1  # already had

    # 3 and 4: what followed the strongest of hops 1 and 2
    for start, hop in ((NEXT_, NEXT_NEXT), (ALIKE, NEXT_ALIKE)):
        if sizes[hop] == 0:
            continue
        size = strongest(score[start], touched[start], reached[start], mark, 1, best[:SPREAD])
        for place in range(size):
            item = best[place]
            reached[hop] = follow(
                item, score[start, item], 1.0, mine, mine_worth, pair_weights, starts, counted,
                followers, counts, totals, own, mark, score[hop], touched[hop], reached[hop],
            )  # fmt: skip

    # 5 others: the next items of the rows nearest to the history
    if sizes[OTHERS] > 0:
        reached[OTHERS] = vote(
            history, length, user, row_starts, row_sizes, row_ids, row_weights, owners, following,
            worth, idf, row_score, row_touched, near, score[OTHERS], touched[OTHERS], mark,
        )  # fmt: skip

    # 6 own: what the user had before
    weight = 1.0
    for place in range(length - 1, -1, -1):
        item = history[place]
        if score[OWN, item] == 0:
            touched[OWN, reached[OWN]] = item
            reached[OWN] += 1
            score[OWN, item] = weight
        weight *= OWN_BACK

    # The union: each hop brings what the hops before it could not.
    taken = 0
    for hop in range(6):
        for place in range(reached[hop]):
            out_sums[hop] += score[hop, touched[hop, place]]
        size = strongest(
            score[hop], touched[hop], reached[hop], mark, 4 if hop == OWN else 5,
            best[: sizes[hop]],
        )  # fmt: skip
        for place in range(size):
            mark[best[place]] |= 4
            out_items[taken] = best[place]
            out_hops[taken] = hop
            taken += 1
    for hop in range(6):
        if sizes[hop] == 0:
            continue
        size = strongest(
            score[hop], touched[hop], reached[hop], mark, 0 if hop == OWN else 1, best[:taken]
        )  # fmt: skip
        for place in range(size):
            own[best[place]] = place + 1
        for place in range(taken):
            item = out_items[place]
            out_strengths[place, hop] = score[hop, item]
            out_ranks[place, hop] = own[item]
        for place in range(size):
            own[best[place]] = 0
    if taken > 0:
        lines = np.empty((1 + recent, dim), np.float32)
        lines[0] = mean
        for age in range(recent):
            lines[1 + age] = vectors[history[length - 1 - age]]
        cosines = np.dot(vectors[out_items[:taken]], lines.T)
        for place in range(taken):
            out_text[place, 0] = cosines[place, 1]
            out_text[place, 1] = cosines[place, 0]
            out_text[place, 2] = cosines[place, 1:].max()

    for place in range(taken):
        out_popularity[place] = log_popularity(out_items[place], popularity, mine, mine_worth, mark)
    if length > 0:
        last = history[length - 1]
        out_popularity[-1] = log_popularity(last, popularity, mine, mine_worth, mark)

    for hop in range(6):
        for place in range(reached[hop]):
            score[hop, touched[hop, place]] = 0
    for place in range(taken):
        mark[out_items[place]] = 0
    for place in range(length):
        mark[history[place]] = 0
    for place in range(len(mine)):
        mark[mine[place]] = 0


def follow(
    item, weight, power, mine, mine_worth, pair_weights, starts, counted, followers, counts,
    totals, own, mark, score, touched, reached,
):  # fmt: skip
    """Add weight * C[item, y] / (sum C[item])^power to score[y], without the user's own pairs."""
    total = totals[item]
    ours = mark[item] & 2 != 0
    reach = len(pair_weights) - 1
    if ours:
        for place in range(len(mine)):
            if mine[place] == item:
                for distance in range(1, min(reach, len(mine) - 1 - place) + 1):
                    pair = paid(pair_weights[distance], mine_worth[place + distance])
                    own[mine[place + distance]] += pair
                    total -= pair
    if total > 0:
        scale = np.float32(weight / total**power)
        for entry in range(starts[item], starts[item] + counted[item]):
            other = followers[entry]
            count = counts[entry] - own[other] if ours else counts[entry]
            if count > 0:
                if score[other] == 0:
                    touched[reached] = other
                    reached += 1
                score[other] += scale * np.float32(count)
    if ours:
        for place in range(len(mine)):
            if mine[place] == item:
                for distance in range(1, min(reach, len(mine) - 1 - place) + 1):
                    own[mine[place + distance]] = 0
    return reached


def log_popularity(item, popularity, mine, mine_worth, mark):
    """log(1 + how often an item was taken), what this user took left out."""
    count = popularity[item]
    if mark[item] & 2:
        for place in range(len(mine)):
            if mine[place] == item:
                count -= mine_worth[place] / UNIT
    return math.log1p(max(count, 0.0))


def vote(
    history, length, user, starts, sizes, rows, weights, owners, following, worth, idf,
    row_score, row_touched, best, score, touched, mark,
):  # fmt: skip
    """Add cosine^2 * NEXT (* worth) of the nearest rows' next items; returns how many items."""
    latest = min(WIDTH, length)
    norm = 0.0
    for age in range(latest):
        norm += (idf[history[length - 1 - age]] * RECENCY**age) ** 2
    norm = math.sqrt(max(norm, 1e-24))
    count = 0
    for age in range(latest):
        item = history[length - 1 - age]
        weight = np.float32(idf[item] * RECENCY**age / norm)
        for entry in range(starts[item], starts[item] + sizes[item]):
            row = rows[entry]
            if row_score[row] == 0:
                if user >= 0 and owners[row] == user:
                    continue
                row_touched[count] = row
                count += 1
            row_score[row] += weight * weights[entry]
    size = strongest(row_score, row_touched, count, mark, 0, best)
    reached = 0
    for place in range(size):
        cosine = row_score[best[place]]
        for step in range(following.shape[1]):
            other = following[best[place], step]
            if other < 0:
                break
            if score[other] == 0:
                touched[reached] = other
                reached += 1
            vote = cosine * cosine * NEXT[step]
            if len(worth):
                vote *= worth[best[place], step]
            score[other] += np.float32(vote)
    for place in range(count):
        row_score[row_touched[place]] = 0
    return reached


def strongest(score, index, count, mark, barred, best):
    """Fill best (k,) int32 with the items of index[:count] of highest score, best first.

    Those with a mark in `barred` stay out; the lower index wins among equals. Returns how many
    there are. A heap, its root the worst kept: most items only lose to it.
    """
    most, size = len(best), 0
    if most == 0:
        return 0
    for place in range(count):
        item = index[place]
        if barred != 0 and mark[item] & barred:  # rows of the memory have no marks
            continue
        value = score[item]
        if size < most:
            node = size
            size += 1
            while node > 0:
                up = (node - 1) // 2
                if worse(value, item, score[best[up]], best[up]):
                    best[node] = best[up]
                    node = up
                else:
                    break
            best[node] = item
        elif worse(score[best[0]], best[0], value, item):
            sink(score, best, size, item)
    for last in range(size - 1, 0, -1):
        item, worst = best[last], best[0]
        sink(score, best, last, item)
        best[last] = worst
    return size


def worse(value, item, other_value, other):
    return value < other_value or (value == other_value and item > other)


def sink(score, best, size, item):
    """Put `item` at the root of the heap best[:size], in place of what is there."""
    node, value = 0, score[item]
    while True:
        down = 2 * node + 1
        if down >= size:
            break
        if down + 1 < size and worse(
            score[best[down + 1]], best[down + 1], score[best[down]], best[down]
        ):
            down += 1
        if not worse(score[best[down]], best[down], value, item):
            break
        best[node] = best[down]
        node = down
    best[node] = item


@cache
def compiled() -> Callable[..., None]:
    """`gather_one`, compiled."""
    import numba  # a third of a second, which an answer without it does not wait for
    from numba.extending import register_jitable

    for function in (follow, log_popularity, vote, strongest, worse, sink, paid):
        register_jitable(function)
    return numba.njit(cache=True, nogil=True)(gather_one)
