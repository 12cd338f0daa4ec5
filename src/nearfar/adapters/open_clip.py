"""The losses of open_clip without the matrix of logits: the same names, arguments and numbers.

A training program changes one line: `from nearfar.adapters.open_clip import ClipLoss`.
"""

from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfar.distributed import over
from nearfar.engine.meeting import Group, Over, over_processes
from nearfar.extras import needs
from nearfar.inputs import ArrayLike, above_zero, finite, one_of
from nearfar.losses import clip_loss, siglip_loss
from nearfar.losses.batch import as_towers

with needs("openclip"):
    import open_clip

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss", "create_loss"]

Exchange = Literal["bidir", "shift", "reduce", "gather"]


class ClipLoss(nn.Module):
    r"""open_clip's `ClipLoss`: softmax over the texts of each image and the images of each text.

    The value and the gradients are those of open_clip, in memory linear in the batch. Features are
    compared as they come, as there: a model of open_clip gives them at length 1.

    With `world_size` above 1, the loss is that of the rows of all processes, on each of them, and
    its gradients are right under DistributedDataParallel, which averages them. open_clip's are so
    with `gather_with_grad=True`; without it, the gradient of the features is 1 / `world_size` of
    the right one, or, with `local_loss=True`, that of rows as anchors only.

    Args:
        local_loss: changes nothing: each process always compares its own rows with those of all.
        gather_with_grad: changes nothing: gradients always reach the rows of other processes.
        cache_labels: changes nothing: there are no labels to keep.
        rank: of this process in torch.distributed.
        world_size: the number of processes; 1: this one has the whole batch.
        use_horovod: must be False.

    Raises:
        ValueError: `use_horovod`, which knows processes that torch.distributed does not.

    >>> loss = ClipLoss()
    >>> loss(torch.eye(3), torch.eye(3), logit_scale=torch.tensor(2.0))
    tensor(0.2395)
    >>> loss(torch.eye(3), torch.eye(3), logit_scale=torch.tensor(2.0), output_dict=True)
    {'contrastive_loss': tensor(0.2395)}
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _refuse_horovod(use_horovod)
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels = cache_labels
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch; see :func:`nearfar.clip_loss`.

        Args:
            image_features: (n, d) of the images, any floating dtype.
            text_features: (n, d) of the texts; row i belongs to row i of the images.
            logit_scale: what similarities are multiplied by, one number above 0. A tensor, which is
                learned, is not refused: where it is 0 or less, the loss is NaN.
            logit_bias: what is added to them, one number; a softmax is the same for any.
            output_dict: return `{"contrastive_loss": loss}`.

        Returns:
            A scalar, or a dict of it; float32 or wider.

        Raises:
            TypeError: an argument is not an array of numbers.
            ValueError: a shape or device that does not match, a scale that is a number of 0 or
                less; `rank` or `world_size` is not that of torch.distributed.
        """
        group = _group(self.rank, self.world_size)
        loss = _clip(image_features, text_features, logit_scale, group=group)
        if isinstance(logit_bias, Tensor):
            # Its gradient is 0, and DistributedDataParallel waits for one.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    r"""open_clip's `SigLipLoss`: each image and text is classified by itself as a match or not.

    The value and the gradients are those of open_clip, in memory linear in the batch: the sum over
    all pairs, divided by the number of images. Features are compared as they come, as there: a
    model of open_clip gives them at length 1.

    With `world_size` above 1, the value is that of the rows of all processes, on each of them;
    open_clip's is that of the images of one, and these have it as their mean. The gradients under
    DistributedDataParallel are the same.

    Args:
        cache_labels: changes nothing: there are no labels to keep.
        rank: of this process in torch.distributed.
        world_size: the number of processes; 1: this one has the whole batch.
        dist_impl: how rows reach other processes: "bidir" or "shift" from one to the next, in
            memory linear in the rows of a process; "reduce" or "gather" all at once. None: "bidir".

    Raises:
        ValueError: an unknown `dist_impl`.

    >>> loss = SigLipLoss()
    >>> loss(torch.eye(3), torch.eye(3), logit_scale=10.0, logit_bias=-5.0)
    tensor(0.0201)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: Exchange | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank, self.world_size = rank, world_size
        self.dist_impl = dist_impl or "bidir"
        one_of("dist_impl", self.dist_impl, Exchange)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch; see :func:`nearfar.siglip_loss`.

        Args:
            image_features: (n, d) of the images, any floating dtype.
            text_features: (n, d) of the texts; row i belongs to row i of the images.
            logit_scale: what similarities are multiplied by, one number above 0. A tensor, which is
                learned, is not refused: where it is 0 or less, the loss is NaN.
            logit_bias: what is added to them, one number; None: 0.
            output_dict: return `{"contrastive_loss": loss}`.

        Returns:
            A scalar, or a dict of it; float32 or wider.

        Raises:
            TypeError: an argument is not an array of numbers.
            ValueError: a shape or device that does not match, a scale that is a number of 0 or
                less, a bias that is not finite; `rank` or `world_size` is not that of
                torch.distributed.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        group = _group(self.rank, self.world_size, ring=self.dist_impl in ("bidir", "shift"))
        loss = _siglip(image_features, text_features, logit_scale, bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(nn.Module):
    r"""open_clip's `CoCaLoss`: a weighted `ClipLoss`, and a weighted cross-entropy of captions.

    The contrastive part is that of `ClipLoss` here; the captions' logits exist anyway, and their
    cross-entropy is torch's.

    Args:
        caption_loss_weight: of the captions.
        clip_loss_weight: of the contrastive part; 0 leaves it out.
        pad_id: the token that counts in no caption.
        local_loss: as in `ClipLoss`, and so are all below.
        gather_with_grad: changes nothing.
        cache_labels: changes nothing.
        rank: of this process in torch.distributed.
        world_size: the number of processes.
        use_horovod: must be False.

    Raises:
        ValueError: `use_horovod`.

    >>> loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    >>> logits, labels = torch.zeros(3, 4, 8), torch.ones(3, 4, dtype=torch.long)
    >>> loss(torch.eye(3), torch.eye(3), logits, labels, logit_scale=torch.tensor(2.0))
    (tensor(0.2395), tensor(4.1589))
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self.pad_id = pad_id
        self.contrastive = ClipLoss(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The two losses of a batch.

        Args:
            image_features: (n, d) of the images, any floating dtype.
            text_features: (n, d) of the texts; row i belongs to row i of the images.
            logits: (n, t, v) of the tokens of each caption, over a vocabulary.
            labels: (n, t) the tokens, `pad_id` where there is none.
            logit_scale: what similarities are multiplied by, one number above 0. A tensor, which is
                learned, is not refused: where it is 0 or less, the loss is NaN.
            output_dict: return `{"contrastive_loss": ..., "caption_loss": ...}`.

        Returns:
            Two scalars, or a dict of them.

        Raises:
            TypeError: an argument is not an array of numbers.
            ValueError: as in `ClipLoss`.
        """
        contrastive = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            found = self.contrastive(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * found
        captions = nn.functional.cross_entropy(
            logits.permute(0, 2, 1), labels, ignore_index=self.pad_id
        )
        captions = captions * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": captions}
        return contrastive, captions


def create_loss(args: Any) -> ClipLoss | SigLipLoss | CoCaLoss:
    """The loss that a training program of open_clip asks for, as `open_clip.create_loss` does.

    Args:
        args: the options of `open_clip_train.main`: `distill`, `model`, `siglip`, `horovod`,
            `rank`, `world_size`, and what the loss takes.

    Returns:
        A `CoCaLoss` where "coca" is in the name of the model, else a `SigLipLoss` with
        `args.siglip`, else a `ClipLoss`.

    Raises:
        ValueError: `args.distill`, whose loss nearfar does not have, or `args.horovod`.

    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(
    ...     model="ViT-B-32", distill=False, siglip=True, horovod=False, loss_dist_impl=None,
    ...     rank=0, world_size=1,
    ... )
    >>> create_loss(args)
    SigLipLoss()
    """
    if args.distill:
        raise ValueError(
            "distill must be False: nearfar has no DistillClipLoss. Keep open_clip.create_loss for "
            "distillation, or train without a teacher, by ClipLoss."
        )
    _refuse_horovod(args.horovod)
    place = {"rank": args.rank, "world_size": args.world_size}
    if "coca" in args.model.lower():
        return CoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight, **place)
    if args.siglip:
        return SigLipLoss(dist_impl=args.loss_dist_impl, **place)
    return ClipLoss(**place)


@over_processes
def _clip(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: Tensor | float,
    *,
    group: Group | None,
) -> Tensor:
    """`clip_loss`, with errors that call the arguments as open_clip does."""
    x, y = as_towers(image_features=image_features, text_features=text_features)
    scale = above_zero("logit_scale", logit_scale)
    return clip_loss(x, y, scale=scale, normalize=False, group=group)


@over_processes
def _siglip(
    image_features: ArrayLike,
    text_features: ArrayLike,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Group | None,
) -> Tensor:
    """`siglip_loss`, with errors that call the arguments as open_clip does."""
    x, y = as_towers(image_features=image_features, text_features=text_features)
    scale, bias = above_zero("logit_scale", logit_scale), finite("logit_bias", logit_bias)
    return siglip_loss(x, y, scale=scale, bias=bias, normalize=False, group=group)


def _group(rank: int, world_size: int, *, ring: bool = False) -> Over | None:
    """The processes that share a batch; None: this one has all of it."""
    if world_size == 1:
        return None
    started = dist.is_available() and dist.is_initialized()
    found = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    if (rank, world_size) != found:
        raise ValueError(
            "rank and world_size must be those of torch.distributed, "
            f"{found[0]} and {found[1]}{'' if started else ', which is not in use'}; got {rank} "
            f"and {world_size}. Start the processes with torchrun, and call "
            "torch.distributed.init_process_group() before the first loss."
        )
    return over("world", ring=ring)


def _refuse_horovod(use_horovod: bool) -> None:
    if use_horovod:
        raise ValueError(
            "use_horovod must be False: rows reach other processes by torch.distributed. Start the "
            "processes with torchrun."
        )


def __getattr__(name: str) -> NoReturn:
    if name in vars(open_clip.loss):
        # An AttributeError would lose its words in `from nearfar.adapters.open_clip import ...`.
        raise ImportError(
            f"nearfar has ClipLoss, SigLipLoss and CoCaLoss, and no {name}: keep "
            f"`from open_clip.loss import {name}`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
