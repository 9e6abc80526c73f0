"""The public sets that `data fetch` knows: where they lie, and their owners' checksums."""

from __future__ import annotations

from dataclasses import dataclass

from streamctl.errors import UsageError, did_you_mean

_GROUPLENS = ("https://files.grouplens.org/datasets/movielens",)
_UCSD = (
    "https://mcauleylab.ucsd.edu/public_datasets/data",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data",
)
_SNAP = ("https://snap.stanford.edu/data/amazon/productGraph/categoryFiles",)
# Of the releases of 2014 and 2018 those whose 5-core papers compare on.
CATEGORIES_2014 = (
    "Automotive", "Baby", "Beauty", "CDs_and_Vinyl", "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry", "Digital_Music", "Grocery_and_Gourmet_Food",
    "Health_and_Personal_Care", "Home_and_Kitchen", "Movies_and_TV", "Musical_Instruments",
    "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies", "Sports_and_Outdoors",
    "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games",
)  # fmt: skip
CATEGORIES_2018 = (
    "Arts_Crafts_and_Sewing", "Automotive", "CDs_and_Vinyl", "Cell_Phones_and_Accessories",
    "Grocery_and_Gourmet_Food", "Industrial_and_Scientific", "Luxury_Beauty",
    "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Prime_Pantry", "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games",
    "Video_Games",
)  # fmt: skip
CATEGORIES = (
    "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive",
    "Baby_Products", "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics",
    "Gift_Cards", "Grocery_and_Gourmet_Food", "Handmade_Products", "Health_and_Household",
    "Health_and_Personal_Care", "Home_and_Kitchen", "Industrial_and_Scientific", "Kindle_Store",
    "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments", "Office_Products",
    "Patio_Lawn_and_Garden", "Pet_Supplies", "Software", "Sports_and_Outdoors",
    "Subscription_Boxes", "Tools_and_Home_Improvement", "Toys_and_Games", "Unknown",
    "Video_Games",
)  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """A file on one or more servers.

    Attributes:
        path: below each server's address; its last part names the file.
        servers: addresses, in the order in which they are asked.
        md5: the checksum that the owner publishes, or None.
    """

    path: str
    servers: tuple[str, ...]
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def urls(self, mirror: str | None = None) -> list[str]:
        """Where to ask: the user's mirror alone, which holds the file by its name, or servers."""
        if mirror is not None:
            return [f"{mirror.rstrip('/')}/{self.name}"]
        return [f"{server}/{self.path}" for server in self.servers]


@dataclass(frozen=True)
class PublicSet:
    """A public data set: its files and the terms under which its owner gives them."""

    name: str
    files: tuple[Remote, ...]
    terms: str


_ML_TERMS = "research use, no redistribution without permission; see its README"
_MOVIELENS = {
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": None,
}
_TERMS_2023 = "see amazon-reviews-2023.github.io; cite Hou et al., 2024"
_META = "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz"
_CORE = "amazon_2023/benchmark/5core/"
_PARTS = (".train", ".valid", ".test")
# Release, what its sets' names end in, categories, servers, files of a category, terms. The release
# of 2023 also comes split: the last two of each user, or at two moments.
_AMAZON = (
    ("2014", "", CATEGORIES_2014, _SNAP, ("reviews_{}_5.json.gz", "meta_{}.json.gz"),
     "cite He and McAuley, WWW 2016"),
    ("2018", "", CATEGORIES_2018, _UCSD,
     ("amazon_v2/categoryFilesSmall/{}_5.json.gz", "amazon_v2/metaFiles2/meta_{}.json.gz"),
     "cite Ni, Li and McAuley, EMNLP 2019"),
    ("2023", "", CATEGORIES, _UCSD, (_CORE + "rating_only/{}.csv.gz", _META), _TERMS_2023),
    *(
        ("2023", f"-{name}", CATEGORIES, _UCSD,
         (*(f"{_CORE}{folder}/{{}}{part}.csv.gz" for part in _PARTS), _META), _TERMS_2023)
        for name, folder in (("last-out", "last_out"), ("timestamp", "timestamp"))
    ),
)  # fmt: skip
SETS: dict[str, PublicSet] = {
    public.name: public
    for public in (
        *(
            PublicSet(name, (Remote(f"{name}.zip", _GROUPLENS, md5),), _ML_TERMS)
            for name, md5 in _MOVIELENS.items()
        ),
        *(
            PublicSet(
                f"amazon-{year}-{category.lower().replace('_', '-')}{end}",
                tuple(Remote(path.format(category), servers) for path in paths),
                terms,
            )
            for year, end, categories, servers, paths, terms in _AMAZON
            for category in categories
        ),
    )
}


def find_set(name: str) -> PublicSet:
    """A public set by name; `Musical_Instruments` means amazon-2023-musical-instruments.

    Raises:
        UsageError: an unknown name; names those like it.
    """
    plain = name.lower().replace("_", "-")
    for wanted in (plain, f"amazon-2023-{plain}"):
        if wanted in SETS:
            return SETS[wanted]
    near = did_you_mean(plain, {*SETS, *(n.removeprefix("amazon-2023-") for n in SETS)})
    raise UsageError(f"unknown data set {name!r}; {near or '`streamctl data fetch` lists them'}")
