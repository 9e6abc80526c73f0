"""A seeded shop of any size, whose users follow multi-step intents.

A *project* has five steps, each with its own product: an opener, a shared step, a middle, another
shared step, and an ending. Four projects of a domain combine two openers with two middles, and
each has an ending of its own; the shared steps are the same in two neighbouring domains. So after
a shared step the last item leaves four middles or eight endings open, while the opener and the
middle, some items back, leave one. Users work on two projects at a time, taking turns at random,
in domains they like; they have a favourite brand; one item in sixteen is a whim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamctl.config import DataConfig
from streamctl.data.prepare import write_stage
from streamctl.data.sources.raw import ItemTable, RawLog
from streamctl.data.words import (
    BRANDS,
    DEPARTMENTS,
    DOMAINS,
    FINISHES,
    LINES,
    SHARED,
    SHARED_DEPARTMENTS,
    VARIANTS,
)
from streamctl.device import derive_seed
from streamctl.errors import UsageError
from streamctl.runs import RunDir, Stage

DOMAIN_PROJECTS = 4  # 2 openers x 2 middles
STEPS = 5
_OWN = 8  # products of one domain: 2 openers, 2 middles, 4 endings
PROJECTS = 2 * DOMAIN_PROJECTS  # of a pair of domains that share steps, in one product line
PRODUCTS = 2 * _OWN + 2  # of such a pair; the shared ones come last
# Product (0..17 within the pair) of each project's steps: opener, shared, middle, shared, ending.
PLAN = np.array(
    [
        [_OWN * side + p // 2, 2 * _OWN, _OWN * side + 2 + p % 2, 2 * _OWN + 1, _OWN * side + 4 + p]
        for side in range(2)
        for p in range(DOMAIN_PROJECTS)
    ]
)
MIN_ITEMS = 20
MIN_LENGTH, MEAN_LENGTH, MAX_LENGTH = 5, 9, 50
STAY = 0.6  # probability that the next item belongs to the project of the last one
WHIM = 1 / 16  # probability of an item that belongs to no project
LIKED = 3  # domains a user likes
LOYALTY = 0.75  # probability that a choice within a product is the user's favourite one
_ITEMS_PER_PRODUCT = 8
_YEAR_2020 = 1_577_836_800


@dataclass(frozen=True)
class Shop:
    """A generated shop, with the truth that a real log does not have.

    Attributes:
        catalogue: item columns; item i of the arrays is catalogue.ids[i].
        product: int32 (M,) product of each item.
        user, item: int32 (T,) interactions, sorted by user and then by time.
        times: int64 (T,) seconds.
        project: int32 (T,) the project that an interaction belongs to, -1 for a whim.
        step: int32 (T,) its step in the project.
        favourite: float64 (U,) in [0, 1): a user chooses row floor(favourite * n) of a product's
            n items with probability LOYALTY.
    """

    catalogue: ItemTable
    product: np.ndarray
    user: np.ndarray
    item: np.ndarray
    times: np.ndarray
    project: np.ndarray
    step: np.ndarray
    favourite: np.ndarray

    @property
    def plan(self) -> np.ndarray:
        """int64 (projects, STEPS): the product of each step of each project."""
        groups = (int(self.product.max()) + 1) // PRODUCTS
        return (PLAN[None] + PRODUCTS * np.arange(groups)[:, None, None]).reshape(-1, STEPS)


def generate_shop(users: int, items: int, seed: int) -> Shop:
    """A shop of `users` users and `items` items; the same arguments give the same shop.

    Raises:
        UsageError: fewer than 1 user or 20 items.
    """
    if users < 1 or items < MIN_ITEMS:
        raise UsageError(f"a shop needs at least 1 user and {MIN_ITEMS} items")
    groups = int(np.clip(items // (PRODUCTS * _ITEMS_PER_PRODUCT), 1, len(SHARED) * len(LINES)))
    product = (np.arange(items) * (groups * PRODUCTS) // items).astype(np.int32)
    counts = np.bincount(product, minlength=groups * PRODUCTS)
    firsts = np.cumsum(counts) - counts
    rng = np.random.default_rng(derive_seed(seed, "shop"))
    favourite = rng.random(users)
    lengths = np.minimum(
        MIN_LENGTH + rng.geometric(1 / (MEAN_LENGTH - MIN_LENGTH + 1), users) - 1, MAX_LENGTH
    )
    project, step, chosen = _walk(lengths, groups, favourite, counts, firsts, rng)

    inside = np.arange(MAX_LENGTH) < lengths[:, None]
    days = rng.geometric(1 / 6, (users, MAX_LENGTH)).cumsum(1) + rng.integers(0, 1000, (users, 1))
    times = _YEAR_2020 + days * 86_400 + rng.integers(0, 86_400, days.shape)
    return Shop(
        catalogue=_catalogue(product, counts, firsts, rng),
        product=product,
        user=np.repeat(np.arange(users, dtype=np.int32), lengths),
        item=chosen[inside],
        times=times[inside],
        project=project[inside],
        step=step[inside],
        favourite=favourite,
    )


def synthesize(run: RunDir, *, users: int, items: int, seed: int = 0, force: bool = False) -> Stage:
    """Write a generated shop as the data stage of a run.

    Raises:
        UsageError: fewer than 1 user or 20 items.
        StreamctlError: the run already has other data.
    """
    config = DataConfig(
        source=f"synthetic shop of {users} users and {items} items",
        format="synthetic",
        min_user=3,
        min_item=0,  # the catalogue keeps the size that was asked for
        seed=seed,
    )
    return write_stage(run, config, lambda: _raw(generate_shop(users, items, seed)), force=force)


def _raw(shop: Shop) -> RawLog:
    """The shop as a reader would give it."""
    users = len(shop.favourite)
    width = len(str(users - 1))
    return RawLog.of(
        [f"u{number:0{width}}" for number in shop.user],
        [shop.catalogue.ids[number] for number in shop.item],
        shop.times,
        catalogue=shop.catalogue,
        format="synthetic",
    )


def _walk(
    lengths: np.ndarray,
    groups: int,
    favourite: np.ndarray,
    counts: np.ndarray,
    firsts: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(project, step, item), each int32 (U, MAX_LENGTH): all users take their t-th item at once."""
    users = len(lengths)
    project = np.full((users, MAX_LENGTH), -1, np.int32)
    step, item = np.zeros_like(project), np.zeros_like(project)
    # Domains of all pairs; some are popular.
    liked = (2 * groups * rng.random((users, LIKED)) ** 1.5).astype(np.int64)
    hand = np.zeros(users, np.int64)  # which of the two projects the user works on
    working = _new_projects(liked, rng)  # (U, 2)
    at = np.stack([np.zeros(users, np.int64), rng.integers(0, STEPS, users)], 1)
    for t in range(int(lengths.max())):
        rows = np.flatnonzero(lengths > t)
        hand[rows] ^= rng.random(len(rows)) >= STAY
        side = hand[rows]
        current, place = working[rows, side], at[rows, side]
        wanted = current // PROJECTS * PRODUCTS + PLAN[current % PROJECTS, place]
        whim = rng.random(len(rows)) < WHIM
        wanted[whim] = (len(counts) * rng.random(int(whim.sum())) ** 2).astype(np.int64)
        project[rows, t] = np.where(whim, -1, current)
        step[rows, t] = np.where(whim, 0, place)
        item[rows, t] = firsts[wanted] + _choose(counts[wanted], favourite[rows], rng)

        moved = rows[~whim]
        at[moved, hand[moved]] += 1
        done = moved[at[moved, hand[moved]] == STEPS]
        at[done, hand[done]] = 0
        working[done, hand[done]] = _new_projects(liked[done], rng)[:, 0]
    return project, step, item


def _new_projects(liked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 (n, 2): projects in domains that each user likes."""
    domain = liked[np.arange(len(liked))[:, None], rng.integers(0, LIKED, (len(liked), 2))]
    return domain * DOMAIN_PROJECTS + rng.integers(0, DOMAIN_PROJECTS, domain.shape)


def _choose(counts: np.ndarray, favourite: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 (n,): row within a product; the favourite one, or one of the first more often."""
    loyal = rng.random(len(counts)) < LOYALTY
    other = rng.random(len(counts)) ** 2
    return (np.where(loyal, favourite, other) * counts).astype(np.int64)


def _catalogue(
    product: np.ndarray, counts: np.ndarray, firsts: np.ndarray, rng: np.random.Generator
) -> ItemTable:
    """Ids, titles and columns: a product's items, in order, go through brands, then finishes."""
    width = len(str(len(product) - 1))
    prices = np.round(np.exp(rng.normal(3, 0.5, len(product))), 2)
    columns: dict[str, list[str]] = {
        name: [] for name in ("title", "department", "project", "brand", "price")
    }
    for index, kind in enumerate(product.tolist()):
        pair, position = divmod(kind, PRODUCTS)
        line, pair = divmod(pair, len(SHARED))
        name, department, purpose = _product(pair, position)
        # Brands are spread over the rows, so that a user's favourite row is a favourite brand.
        row, rows = index - firsts[kind], int(counts[kind])
        kinds = -(-rows // len(BRANDS))  # items of one brand, in this product
        brand = BRANDS[row // kinds * len(BRANDS) // -(-rows // kinds)]
        variant, finish = divmod(row % kinds, len(FINISHES))
        number, variant = divmod(variant, len(VARIANTS))
        words = [brand, FINISHES[finish], LINES[line], name]
        title = " ".join(filter(None, words))
        title += f", {VARIANTS[variant]}" if VARIANTS[variant] else ""
        columns["title"].append(title + (f", no. {number + 1}" if number else ""))
        columns["department"].append(department)
        columns["project"].append(f"for {LINES[line]} {purpose}".replace("  ", " "))
        columns["brand"].append(brand)
        columns["price"].append(f"{prices[index]:.2f}")
    # Ids say nothing about products: no model can read the order of a project from them.
    ids = [f"i{number:0{width}}" for number in rng.permutation(len(product)).tolist()]
    return ItemTable(ids, columns, "title", ("title", "department", "project"))


def _product(pair: int, position: int) -> tuple[str, str, str]:
    """(name, department, what it is for) of a product of a pair of domains."""
    domains = list(DOMAINS)[2 * pair : 2 * pair + 2]
    if position >= 2 * _OWN:
        shared = position - 2 * _OWN
        return SHARED[pair][shared], SHARED_DEPARTMENTS[shared], " and ".join(domains)
    side, own = divmod(position, _OWN)
    return DOMAINS[domains[side]][own], DEPARTMENTS[own], domains[side]
