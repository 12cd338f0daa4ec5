"""Names that the command line offers, apart from what they name, which takes seconds to load."""

GLYPHS = "glyphs"  # the data set that nearfar brings

LOSSES = (
    "contrastive",
    "cosine",
    "triplet",
    "quadruplet",
    "info_nce",
    "softmax",
    "sup_con",
    "nt_xent",
    "multi_similarity",
    "circle",
    "lifted_structure",
    "batch_contrastive",
    "batch_triplet",
    "batch_quadruplet",
    "batch_cosine",
    "clip",
    "siglip",
    "proxy_softmax",
    "proxy_nca",
    "proxy_anchor",
)
FOR_ITEMS, FOR_PAIRS = "sup_con", "contrastive"  # where no loss is named

KEEP, LEAVE_OUT, REFUSE = "keep", "leave-out", "refuse"  # what becomes of a single item
SINGLE = (KEEP, LEAVE_OUT, REFUSE)
