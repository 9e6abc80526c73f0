"""A dense log of films, the opposite of a shop: 800 users, 1,300 films, a hundred seen by each.

    python benchmarks/dense.py /tmp/dense
    streamctl data prepare /tmp/dense/log.csv --items /tmp/dense/items.csv --run runs/dense
    streamctl tokenize --run runs/dense --encoder tfidf --set codes=32 --set levels=3
    streamctl reproduce runs/dense --size tiny --no-rerank --save benchmarks/results
        --methods popularity,transitions,knn,ranker,stream,sasrec_ce,tiger
        --set pretrain.epochs=3 --set tiger.epochs=3 --set sft.epochs=8 --set rl.steps=25

On such logs an early prototype of the weights was below plain counts.
"""

import argparse
import math
import random
from pathlib import Path

GENRES = (
    "noir", "western", "space", "comedy", "horror", "war", "romance", "musical", "heist", "spy",
    "samurai", "family", "sport", "crime", "docu", "fantasy", "anime", "silent",
)  # fmt: skip
USERS, FILMS, SEEN, SPREAD = 800, 1300, 100, 30


def write(folder: Path, seed: int = 0) -> None:
    """Users with a taste in genres who stay with what they saw last, and drift through the years.

    A film is seen once; popular ones and those of near years are seen more often.
    """
    draw = random.Random(seed)
    genre = [draw.randrange(len(GENRES)) for _ in range(FILMS)]
    popularity = [1 / (1 + rank) ** 0.8 for rank in range(FILMS)]
    draw.shuffle(popularity)
    year = [draw.random() for _ in range(FILMS)]
    shelves = [[film for film in range(FILMS) if genre[film] == g] for g in range(len(GENRES))]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.csv").open("w", encoding="utf-8") as file:
        file.write("item_id,title\n")
        for film in range(FILMS):
            file.write(f"m{film},{GENRES[genre[film]]} film of {1940 + int(80 * year[film])}\n")
    with (folder / "log.csv").open("w", encoding="utf-8") as file:
        file.write("user_id,item_id,timestamp\n")
        for user in range(USERS):
            taste = [draw.gammavariate(0.35, 1) for _ in GENRES]
            seen, last, time = set(), None, 1_600_000_000 + draw.randrange(10**7)
            wanted, era = max(20, min(200, int(draw.gauss(SEEN, SPREAD)))), draw.random()
            while len(seen) < wanted:
                stays = last is not None and draw.random() < 0.45
                shelf = genre[last] if stays else draw.choices(range(len(GENRES)), taste)[0]
                unseen = [film for film in shelves[shelf] if film not in seen]
                if not unseen:
                    continue
                near = last is not None and draw.random() < 0.5
                pull = [
                    popularity[film]
                    * math.exp(-3 * abs(year[film] - era))
                    * (math.exp(-6 * abs(year[film] - year[last])) if near else 1)
                    for film in unseen
                ]
                last = draw.choices(unseen, pull)[0]
                seen.add(last)
                time += draw.randrange(3600, 90000)
                era = min(1, max(0, era + draw.gauss(0, 0.03)))
                file.write(f"u{user},m{last},{time}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
