"""The synthetic shop's words: projects people take on, and what each step of one needs."""

from __future__ import annotations

# Domain -> ten products: two openers, the first shared step, two middles, the second shared step,
# four endings. An opener and a middle together tell the project, and the project the ending.
DOMAINS: dict[str, tuple[str, ...]] = {
    "painting": (
        "watercolour paper pad", "stretched canvas", "brush set", "watercolour paints",
        "acrylic paints", "mixing palette", "masking fluid", "picture frame", "varnish spray",
        "table easel",
    ),
    "gardening": (
        "seed starter tray", "raised bed kit", "potting compost", "tomato seeds", "flower bulbs",
        "watering can", "bamboo stakes", "bird netting", "plant labels", "pruning shears",
    ),
    "baking": (
        "stand mixer bowl", "proofing basket", "bread flour", "vanilla extract", "dry yeast",
        "baking sheet", "piping bag set", "cake stand", "bread knife", "storage tin",
    ),
    "cycling": (
        "road bike tyre", "mountain bike tyre", "inner tube", "clipless pedals", "flat pedals",
        "chain lube", "cycling shoes", "bar tape", "mudguard set", "knee pads",
    ),
    "camping": (
        "two-person tent", "camping hammock", "sleeping bag", "gas stove", "wood burner",
        "headlamp", "fuel canister", "tent footprint", "fire starter", "rain tarp",
    ),
    "knitting": (
        "merino wool yarn", "cotton yarn", "circular needles", "sock pattern book",
        "jumper pattern book", "stitch markers", "sock blockers", "wool wash", "button set",
        "project bag",
    ),
    "photography": (
        "portrait lens", "wide-angle lens", "lens cleaning kit", "studio light", "travel tripod",
        "memory card", "backdrop cloth", "photo album", "filter set", "camera backpack",
    ),
    "woodworking": (
        "oak board", "pine board", "wood glue", "dovetail saw", "pocket-hole jig", "sanding block",
        "linseed oil", "chisel set", "wood screws", "furniture wax",
    ),
    "aquarium keeping": (
        "glass aquarium", "betta bowl", "water conditioner", "planted substrate", "coral gravel",
        "aquarium filter", "plant fertiliser", "driftwood piece", "salt mix", "moss ball",
    ),
    "coffee making": (
        "espresso machine", "pour-over dripper", "coffee grinder", "dark roast beans",
        "light roast beans", "digital scale", "milk jug", "descaling tablets", "paper filters",
        "gooseneck kettle",
    ),
    "home fitness": (
        "yoga mat", "adjustable dumbbells", "resistance bands", "foam roller", "pull-up bar",
        "water bottle", "yoga blocks", "meditation cushion", "lifting gloves", "chalk block",
    ),
    "sewing": (
        "linen fabric", "denim fabric", "sewing thread", "dress pattern", "bag pattern",
        "fabric scissors", "invisible zip", "seam binding", "magnetic clasp", "leather needles",
    ),
    "home brewing": (
        "fermentation bucket", "glass demijohn", "sanitiser powder", "malt extract", "wine yeast",
        "siphon tube", "hop pellets", "bottle caps", "cork stoppers", "hydrometer",
    ),
    "model building": (
        "aeroplane model kit", "model railway track", "plastic cement", "acrylic spray primer",
        "weathering powder", "hobby knife", "decal sheet", "display stand", "miniature trees",
        "station building",
    ),
    "calligraphy": (
        "layout paper", "parchment paper", "dip pen holder", "pointed nibs", "broad nibs",
        "black ink", "gold gouache", "wax seal kit", "ruling pen", "envelope set",
    ),
    "bathroom care": (
        "clay face mask", "shampoo bar", "cotton towels", "face serum", "hair oil",
        "storage basket", "night cream", "jade roller", "wooden comb", "satin pillowcase",
    ),
}  # fmt: skip

# The department of each of the ten products: the same in every domain, so that the products of
# one project lie in several departments.
DEPARTMENTS = (
    "Basics", "Basics", "Tools", "Supplies", "Supplies", "Accessories", "Finishing", "Display",
    "Finishing", "Display",
)  # fmt: skip

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
