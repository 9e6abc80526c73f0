"""Words of the synthetic shop: projects, and the products that each step of one needs."""

from __future__ import annotations

# Domain -> eight products: two openers, two middles, four endings. An opener and a middle together
# tell the project, and the project tells the ending.
DOMAINS: dict[str, tuple[str, ...]] = {
    "painting": (
        "watercolour paper pad", "stretched canvas", "watercolour paints", "acrylic paints",
        "masking fluid", "picture frame", "varnish spray", "table easel",
    ),
    "calligraphy": (
        "layout paper", "parchment paper", "pointed nibs", "broad nibs",
        "black ink", "wax seal kit", "gold gouache", "envelope set",
    ),
    "gardening": (
        "seed starter tray", "raised bed kit", "tomato seeds", "flower bulbs",
        "bamboo stakes", "bird netting", "plant labels", "pruning shears",
    ),
    "aquarium keeping": (
        "glass aquarium", "betta bowl", "planted substrate", "coral gravel",
        "plant fertiliser", "driftwood piece", "salt mix", "moss ball",
    ),
    "baking": (
        "stand mixer bowl", "proofing basket", "bread flour", "dry yeast",
        "piping bag set", "cake stand", "bread knife", "cake tin",
    ),
    "coffee making": (
        "espresso machine", "pour-over dripper", "dark roast beans", "light roast beans",
        "milk jug", "descaling tablets", "paper filters", "gooseneck kettle",
    ),
    "cycling": (
        "road bike tyre", "mountain bike tyre", "clipless pedals", "flat pedals",
        "cycling shoes", "bar tape", "mudguard set", "knee pads",
    ),
    "camping": (
        "two-person tent", "camping hammock", "gas stove", "wood burner",
        "fuel canister", "tent footprint", "fire starter", "rain tarp",
    ),
    "knitting": (
        "merino wool yarn", "cotton yarn", "sock needles", "jumper needles",
        "sock blockers", "wool wash", "button set", "yarn bowl",
    ),
    "sewing": (
        "linen fabric", "denim fabric", "dress pattern", "bag pattern",
        "invisible zip", "seam binding", "magnetic clasp", "leather needles",
    ),
    "photography": (
        "portrait lens", "wide-angle lens", "studio light", "neutral density filter",
        "backdrop cloth", "photo album", "reflector", "rain cover",
    ),
    "home fitness": (
        "yoga mat", "adjustable dumbbells", "foam roller", "pull-up bar",
        "yoga blocks", "meditation cushion", "lifting gloves", "chalk block",
    ),
    "woodworking": (
        "oak board", "pine board", "dovetail saw", "pocket-hole jig",
        "linseed oil", "chisel set", "wood screws", "furniture wax",
    ),
    "model building": (
        "aeroplane model kit", "model railway track", "spray primer", "weathering powder",
        "decal sheet", "display stand", "miniature trees", "station building",
    ),
    "home brewing": (
        "fermentation bucket", "glass demijohn", "malt extract", "wine yeast",
        "hop pellets", "bottle caps", "cork stoppers", "hydrometer",
    ),
    "soap making": (
        "silicone soap mould", "wooden soap mould", "lavender oil", "olive oil base",
        "dried petals", "soap cutter", "gift boxes", "paper bands",
    ),
}  # fmt: skip

# Neighbouring domains share two products, which are steps of every project in both.
SHARED: tuple[tuple[str, str], ...] = (
    ("brush set", "mixing palette"),
    ("long tweezers", "watering can"),
    ("digital scale", "glass storage jar"),
    ("multi-tool", "head torch"),
    ("tape measure", "fabric scissors"),
    ("phone tripod", "equipment bag"),
    ("precision knife", "sanding block"),
    ("funnel set", "glass bottles"),
)

# The department of a domain's eight products and of the two shared ones: the same everywhere, so
# that the products of one project lie in several departments.
DEPARTMENTS = (
    "Basics", "Basics", "Supplies", "Supplies", "Finishing", "Display", "Finishing", "Display",
)  # fmt: skip
SHARED_DEPARTMENTS = ("Tools", "Accessories")

BRANDS = (
    "Oakfield", "Larkspur", "Northwind", "Hollis & Co", "Brightwater", "Tamarind", "Copperleaf",
    "Fernhill", "Quillon", "Marlowe", "Sandpiper", "Juniper Lane", "Ashdown", "Velloro",
    "Pinecrest", "Harbour", "Kestrel", "Mossgate", "Silverbirch", "Wrenfield", "Alder",
    "Bluefinch", "Caldera", "Dunmore",
)  # fmt: skip
FINISHES = (
    "", "natural", "classic", "slate grey", "sage green", "ivory", "walnut", "navy", "copper",
    "terracotta", "charcoal", "amber",
)  # fmt: skip
VARIANTS = ("", "small", "large", "pack of 3")
# Product lines double a domain's products in large shops: a project stays within one line.
LINES = (
    "", "beginner", "studio", "travel", "professional", "children's", "heritage", "compact",
    "outdoor", "deluxe", "eco", "heavy-duty", "workshop", "classroom", "weekend", "vintage",
    "premium", "budget", "folding", "lightweight", "winter", "summer", "festival", "city",
    "coastal", "alpine", "nordic", "artisan", "essential", "signature", "limited", "modular",
)  # fmt: skip
