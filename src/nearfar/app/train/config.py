"""Everything needed to repeat a run. A setting is declared once, here, and its option with it.

The command line asks for the declarations and must answer at once: nothing heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypedDict, get_args, get_origin, get_type_hints

from nearfar.app.errors import InputError
from nearfar.app.train.names import FOR_ITEMS, FOR_PAIRS, LOSSES, SINGLE

Setting = float | int | bool | str
BY_LOSS = "Default: by loss; those of train are in the table of docs/data.md."


@dataclass(frozen=True)
class Option:
    """What the help says of a setting, and the values it may have: a range, or some choices."""

    panel: str
    help: str
    within: tuple[float, float] | None = None
    choices: tuple[int | str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        if self.choices and value not in self.choices:
            choices = ", ".join(map(str, self.choices))
            raise InputError(f"{name} must be one of {choices}; got {value!r}.")
        if self.within and not self.within[0] <= value <= self.within[1]:  # NaN lies in none
            low, high = self.within
            huge = isinstance(value, int) and abs(value) > 1e300  # no float, and so no :g
            got = "a number far beyond" if huge else f"{value:g}"
            raise InputError(f"{name} must lie between {low:,} and {high:,}, got {got}.")


Loss, Data, Training = (partial(Option, f"The {panel}") for panel in ("loss", "data", "training"))


@dataclass(frozen=True)
class TrainConfig:
    """A run, up to its data: the same config and data give the same files."""

    data: str  # as it was typed
    loss: Annotated[
        str, Loss(f"One of {', '.join(LOSSES)}. Default: {FOR_ITEMS}; for pairs {FOR_PAIRS}.")
    ]
    similar_label: Annotated[
        int | None, Data("Which number marks similar pairs, if labels are numbers.", choices=(0, 1))
    ] = None
    image_size: Annotated[int | None, Data("Side to resize image files to (32).", (8, 1024))] = None
    identity_depth: Annotated[
        int | None,
        Data("In a folder: 1 if its subfolders are identities, 2 if theirs are, up to 9.", (1, 9)),
    ] = None
    single: Annotated[
        str | None,
        Data(
            "Identities with one item: use as dissimilar examples, leave out, or refuse (refuse).",
            choices=SINGLE,
        ),
    ] = None
    hyperparameters: Mapping[str, Setting] = field(default_factory=dict)  # those of that loss
    encoder: Annotated[str, Training("auto, or your own as package.module:factory.")] = "auto"
    embedding_dim: Annotated[int, Training("Numbers in an embedding.", (1, 65536))] = 128
    augment: Annotated[bool, Data("Shift, scale and rotate training images a little.")] = True
    steps: Annotated[int, Training("Training steps.", (1, 10**9))] = 450
    identities: Annotated[int, Training("Identities in a batch.", (2, 10**6))] = 64
    items: Annotated[int, Training("Items of each identity in a batch.", (2, 10**6))] = 4
    learning_rate: Annotated[float, Training("Highest of the schedule.", (1e-12, 1000))] = 0.003
    weight_decay: Annotated[float, Training("Weight decay of AdamW.", (0, 1000))] = 0.0001
    calibration_share: Annotated[
        float, Data("Share of the identities that the threshold is fitted on.", (0.01, 0.9))
    ] = 0.2
    test_share: Annotated[
        float, Data("Share of the identities that the figures are measured on.", (0.01, 0.9))
    ] = 0.2
    far: Annotated[float, Training("False-accept rate to fit the threshold at.", (0, 0.5))] = 0.01
    seed: Annotated[int, Training("Random seed.", (0, 2**31 - 1))] = 0
    accelerator: Annotated[str, Training("auto, cpu, cuda, mps.")] = "auto"

    def __post_init__(self) -> None:
        for name, (_, option) in options_of(TrainConfig).items():
            if (value := getattr(self, name)) is not None:
                option.check(name, value)
        if self.calibration_share + self.test_share >= 1:
            raise InputError("calibration_share and test_share must leave identities to train on.")


class Hyperparameters(TypedDict, total=False):
    """Of the losses. Which loss has which, and its defaults, is in `objectives.OBJECTIVES`."""

    margin: Annotated[float, Loss(f"Of the losses that have one. {BY_LOSS}")]
    margin2: Annotated[float, Loss("Second margin (quadruplet).")]
    temperature: Annotated[float, Loss(f"Of the softmax losses. {BY_LOSS}")]
    distance: Annotated[str, Loss("euclidean, sqeuclidean or cosine.")]
    swap: Annotated[bool, Loss("Harder negative of the two (triplet).")]
    smooth: Annotated[bool, Loss("Softplus for hinge (triplet).")]
    label_smoothing: Annotated[float, Loss("From 0 to 1 (softmax).")]
    scale: Annotated[float, Loss(f"1 / temperature (circle, clip, siglip, proxies). {BY_LOSS}")]
    bias: Annotated[float, Loss("Of siglip.")]
    alpha: Annotated[float, Loss("Of multi_similarity, pulling.")]
    beta: Annotated[float, Loss("Of multi_similarity, pushing.")]
    base: Annotated[float, Loss("Of multi_similarity, a cosine.")]
    angle_margin: Annotated[float, Loss("ArcFace's (proxy_softmax), radians.")]
    cosine_margin: Annotated[float, Loss("CosFace's (proxy_softmax).")]


def options_of(declared: type) -> dict[str, tuple[Any, Option]]:
    """The options that a class declares: the type of each, and what is said of it."""
    hints = get_type_hints(declared, include_extras=True).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Annotated}
