"""Everything needed to repeat a run; each setting is declared once, together with its option.

The command line reads these declarations before anything else, so no heavy module is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypedDict, get_args, get_origin, get_type_hints

from nearfar.app.errors import InputError
from nearfar.app.names import (
    AUTO,
    DEFAULTS,
    FOR_ITEMS,
    FOR_PAIRS,
    FROM_LIBRARY,
    SINGLE,
    TRAINED,
    is_pretrained,
    saves_itself,
    takes_weights,
)

Setting = float | int | bool | str
BY_ENCODER: Any = None  # until `TrainConfig` is made
BY_LOSS = "The default depends on the loss; docs/data.md lists those of train."


@dataclass(frozen=True)
class Option:
    """The help text of a setting, and the values it may take: a range or a list of choices."""

    panel: str
    help: str
    within: tuple[float, float] | None = None
    choices: tuple[int | str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        if self.choices and value not in self.choices:
            choices = ", ".join(map(str, self.choices))
            raise InputError(f"{name} must be one of {choices}; got {value!r}.")
        if self.within and not self.within[0] <= value <= self.within[1]:  # also refuses NaN
            low, high = self.within
            huge = isinstance(value, int) and abs(value) > 1e300  # more than :g can format
            got = "a number far beyond" if huge else f"{value:g}"
            raise InputError(f"{name} must lie between {low:,} and {high:,}, got {got}.")


Loss, Data, Training = (partial(Option, panel) for panel in ("Loss", "Data", "Training"))


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run: the same config and the same data give the same files."""

    data: str  # as typed
    loss: Annotated[
        str, Loss(f"One of {', '.join(TRAINED)}. Default: {FOR_ITEMS}, or {FOR_PAIRS} for pairs.")
    ]
    similar_label: Annotated[
        int | None, Data("Which number marks similar pairs, if labels are numbers.", choices=(0, 1))
    ] = None
    image_size: Annotated[
        int | None,
        Data("Side of resized image files (32; of a pretrained network, its own).", (8, 1024)),
    ] = None
    identity_depth: Annotated[
        int | None,
        Data("For folders: 1 if the subfolders are identities, 2 if theirs are; up to 9.", (1, 9)),
    ] = None
    single: Annotated[
        str | None,
        Data(
            "Identities with one item: keep (as dissimilar), leave out or refuse (refuse).",
            choices=SINGLE,
        ),
    ] = None
    drop: Annotated[
        str | None,
        Data("A table of items to leave out, by name; what `nearfar audit` writes is one."),
    ] = None
    hyperparameters: Mapping[str, Setting] = field(default_factory=dict)  # of the loss
    encoder: Annotated[
        str,
        Training(
            "auto; a pretrained network, as sentence-transformers:NAME, timm:NAME or "
            "torchvision:NAME; or your own, as package.module:factory."
        ),
    ] = AUTO
    weights: Annotated[
        str | None,
        Training(
            "Of a timm or torchvision network: pretrained (default; from its library), random, or "
            "a .safetensors or .pth file."
        ),
    ] = None
    layer_decay: Annotated[
        float | None,
        Training("Of a pretrained network: the rate of a layer is this times the next.", (0.01, 1)),
    ] = None
    freeze: Annotated[
        bool | None, Training("Leave the pretrained network as it is; train one layer after it.")
    ] = None
    embedding_dim: Annotated[
        int | None,
        Training("Dimensions of an embedding (128; of a pretrained network, its own).", (1, 65536)),
    ] = None
    augment: Annotated[bool, Data("Shift, scale and rotate training images slightly.")] = True
    chunk_tokens: Annotated[
        int | None,
        Training("For texts: tokens encoded at a time; fewer take less memory (1024).", (1, 10**9)),
    ] = None
    steps: Annotated[int, Training("Training steps (450; for texts, 100).", (1, 10**9))] = (
        BY_ENCODER
    )
    identities: Annotated[int, Training("Identities per batch.", (2, 10**6))] = 64
    items: Annotated[int, Training("Items per identity in a batch.", (2, 10**6))] = 4
    learning_rate: Annotated[
        float | None,
        Training(
            "Peak learning rate (0.003; of a pretrained network, 0.0001 for texts, else 0.00005).",
            (1e-12, 1000),
        ),
    ] = None
    weight_decay: Annotated[float, Training("Weight decay of AdamW.", (0, 1000))] = 0.0001
    calibration_share: Annotated[
        float, Data("Share of identities to calibrate on.", (0.01, 0.9))
    ] = 0.2
    test_share: Annotated[float, Data("Share of identities to test on.", (0.01, 0.9))] = 0.2
    far: Annotated[float, Training("False-accept rate to fit the threshold at.", (0, 0.5))] = 0.01
    seed: Annotated[int, Training("Random seed.", (0, 2**31 - 1))] = 0
    accelerator: Annotated[str, Training("auto, cpu, cuda, mps.")] = "auto"

    def __post_init__(self) -> None:
        for name, value in self._by_encoder().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.freeze or saves_itself(self.encoder):
            object.__setattr__(self, "augment", False)  # features and texts are never distorted
        for name, (_, option) in options_of(TrainConfig).items():
            if (value := getattr(self, name)) is not None:
                option.check(name, value)
        if self.calibration_share + self.test_share >= 1:
            raise InputError("calibration_share and test_share must leave identities to train on.")
        if self.freeze and not is_pretrained(self.encoder):
            raise InputError(
                f"--freeze leaves a pretrained network as it is, and --encoder is {self.encoder}."
            )
        if self.chunk_tokens is not None and (self.freeze or not saves_itself(self.encoder)):
            raise InputError(
                "--chunk-tokens is for training an encoder of texts, and --encoder is "
                f"{self.encoder}{', with --freeze' * bool(self.freeze)}. Leave it out."
            )
        if self.layer_decay is not None and (self.freeze or not is_pretrained(self.encoder)):
            trained = "frozen" if self.freeze else self.encoder
            raise InputError(
                "--layer-decay is for the layers of a pretrained network that is trained, and "
                f"--encoder is {trained}."
            )
        if self.weights is not None and not takes_weights(self.encoder):
            raise InputError(
                f"--weights is for timm and torchvision networks, and --encoder is {self.encoder}."
            )

    def _by_encoder(self) -> dict[str, Any]:
        """The settings whose default depends on the encoder."""
        if not is_pretrained(self.encoder):
            return {"embedding_dim": 128, "learning_rate": 0.003, "steps": 450}
        weights = {"weights": FROM_LIBRARY} if takes_weights(self.encoder) else {}
        if self.freeze:
            return {"learning_rate": 0.003, "steps": 450, **weights}
        if saves_itself(self.encoder):
            return {"learning_rate": 0.0001, "steps": 100, "chunk_tokens": 1024}
        return {"learning_rate": 0.00005, "steps": 450, **weights}


def _of_some(name: str, what: str, more: str = "") -> Option:
    """A hyperparameter of some losses; the help says of which."""
    losses = [loss for loss, settings in DEFAULTS.items() if name in settings]
    return Loss(f"{what} ({', '.join(losses)}). {more}".rstrip())


class Hyperparameters(TypedDict, total=False):
    """Hyperparameters of the losses; `names.DEFAULTS` says which loss has which."""

    margin: Annotated[float, Loss(f"Margin of the loss. {BY_LOSS}")]
    margin2: Annotated[float, _of_some("margin2", "Second margin")]
    temperature: Annotated[float, _of_some("temperature", "Temperature", BY_LOSS)]
    distance: Annotated[str, Loss("euclidean, sqeuclidean or cosine.")]
    swap: Annotated[bool, _of_some("swap", "Use the smaller of d(a, n) and d(p, n)")]
    smooth: Annotated[bool, _of_some("smooth", "Softplus instead of the hinge")]
    label_smoothing: Annotated[float, _of_some("label_smoothing", "Label smoothing, from 0 to 1")]
    scale: Annotated[float, _of_some("scale", "1 / temperature", BY_LOSS)]
    bias: Annotated[float, _of_some("bias", "Bias of the logits")]
    alpha: Annotated[float, _of_some("alpha", "Scale of the positives")]
    beta: Annotated[float, _of_some("beta", "Scale of the negatives")]
    base: Annotated[float, _of_some("base", "Offset of the cosine")]
    angle_margin: Annotated[float, _of_some("angle_margin", "Margin of ArcFace, in radians")]
    cosine_margin: Annotated[float, _of_some("cosine_margin", "Margin of CosFace")]


def options_of(declared: type) -> dict[str, tuple[Any, Option]]:
    """The options that a class declares, by name: the type and the `Option` of each."""
    hints = get_type_hints(declared, include_extras=True).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Annotated}
