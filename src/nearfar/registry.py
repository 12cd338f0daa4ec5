"""The list of all losses, from which every other list is made.

To add a loss, write its function and add a row here. `python tools/write_losses.py` then writes its
module, its public names and its entries in the tables of the docs. What other code has to know
about a loss follows from this row or from the arguments of its function. Nothing heavy is imported
here, so that `import nearfar` stays fast.
"""

from typing import Literal, NamedTuple

Data = Literal["rows", "batch", "towers", "proxies"]
PairMargin = Literal["distance", "cosine"]


class Loss(NamedTuple):
    """A loss: the names of its function and its module, and the data it takes.

    Attributes:
        function: the function, defined in a file of `nearfar/losses`.
        module: the class that holds its hyperparameters.
        data: "rows", where row i of all arguments belongs together; a "batch" with labels; two
            "towers", where row i of one matches row i of the other and no other row; or a batch and
            the "proxies" of its classes.
        also: a second kind of data that it takes, if any.
        pair_margin: what it compares with its margin for each dissimilar pair, which has a loss of
            0 beyond it: the "distance" or the "cosine". None: no pair has a margin of its own.
        sub_centers: whether a class may have several proxies.
        anchors: which rows have a loss each: those of the batch, or the "proxies".
    """

    function: str
    module: str
    data: Data
    also: Data | None = None
    pair_margin: PairMargin | None = None
    sub_centers: bool = False
    anchors: Literal["rows", "proxies"] = "rows"

    @property
    def name(self) -> str:
        """The name of the loss on the command line."""
        return self.function.removesuffix("_loss")

    def takes(self, data: Data) -> bool:
        return data in (self.data, self.also)


LOSSES = (
    Loss("contrastive_loss", "ContrastiveLoss", "rows", pair_margin="distance"),
    Loss(
        "contrastive_loss_from_distance",
        "ContrastiveLossFromDistance",
        "rows",
        pair_margin="distance",
    ),
    Loss("cosine_loss", "CosineLoss", "rows", pair_margin="cosine"),
    Loss("triplet_loss", "TripletLoss", "rows"),
    Loss("quadruplet_loss", "QuadrupletLoss", "rows"),
    Loss("info_nce_loss", "InfoNCELoss", "towers", also="rows"),
    Loss("softmax_loss", "SoftmaxLoss", "rows"),
    Loss("clip_loss", "CLIPLoss", "towers"),
    Loss("siglip_loss", "SigLIPLoss", "towers"),
    Loss("batch_contrastive_loss", "BatchContrastiveLoss", "batch", pair_margin="distance"),
    Loss("batch_cosine_loss", "BatchCosineLoss", "batch", pair_margin="cosine"),
    Loss("batch_triplet_loss", "BatchTripletLoss", "batch"),
    Loss("batch_quadruplet_loss", "BatchQuadrupletLoss", "batch"),
    Loss("sup_con_loss", "SupConLoss", "batch"),
    Loss("nt_xent_loss", "NTXentLoss", "batch"),
    Loss("nca_loss", "NCALoss", "batch"),
    Loss("multi_similarity_loss", "MultiSimilarityLoss", "batch"),
    Loss("circle_loss", "CircleLoss", "batch"),
    Loss("lifted_structure_loss", "LiftedStructureLoss", "batch"),
    Loss("lifted_pair_loss", "LiftedPairLoss", "batch"),
    Loss("n_pair_loss", "NPairLoss", "batch"),
    Loss("proxy_softmax_loss", "ProxySoftmaxLoss", "proxies", sub_centers=True),
    Loss("proxy_nca_loss", "ProxyNCALoss", "proxies", sub_centers=True),
    Loss("proxy_anchor_loss", "ProxyAnchorLoss", "proxies", anchors="proxies"),
)


def find(name: str) -> Loss | None:
    """A loss by the name of its function or by the tool's name; None: it is not listed."""
    return next((loss for loss in LOSSES if name in (loss.function, loss.name)), None)
