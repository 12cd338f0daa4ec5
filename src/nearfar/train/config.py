"""Everything needed to repeat a run, as one frozen dataclass that goes to TOML and back."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tomli_w

from nearfar.errors import InputError
from nearfar.train.names import SINGLE

FORMAT = 1  # of the run folder; raised when an older nearfar could no longer read it

Setting = float | int | bool | str


@dataclass(frozen=True)
class TrainConfig:
    """A run, up to its data: the same config and data give the same files.

    Attributes:
        data: "glyphs", a folder, an .npz or a table of pairs, as it was typed.
        loss: a name of `objectives.OBJECTIVES`.
        similar_label: which of 0 and 1 means similar, for pairs with numeric labels.
        image_size: side that the images of a folder or table are resized to; None: 32.
        identity_depth: of a folder, at which depth its identities are; see `folder.read_folder`.
        single: what becomes of identities with a single item, one of `SINGLE`; None: "refuse".
        hyperparameters: of that loss.
        encoder: "auto", or package.module:factory.
        embedding_dim: d of the embeddings.
        augment: shift, scale and rotate training images a little.
        steps: training steps, each on one batch.
        identities: P of a batch.
        items: K of a batch, the items of each identity.
        learning_rate: the highest of the one-cycle schedule.
        weight_decay: of AdamW.
        calibration_share: share of the identities that the threshold is fitted on.
        test_share: share of the identities that the figures are measured on.
        far: the false-accept rate that the threshold is fitted at.
        seed: of everything random.
        accelerator: "auto" (CUDA where there is one, else CPU), or a name Lightning knows.
    """

    data: str
    loss: str
    similar_label: int | None = None
    image_size: int | None = None
    identity_depth: int | None = None
    single: str | None = None
    hyperparameters: Mapping[str, Setting] = field(default_factory=dict)
    encoder: str = "auto"
    embedding_dim: int = 128
    augment: bool = True
    steps: int = 450
    identities: int = 64
    items: int = 4
    learning_rate: float = 0.003
    weight_decay: float = 0.0001
    calibration_share: float = 0.2
    test_share: float = 0.2
    far: float = 0.01
    seed: int = 0
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                got = f"{value:g}" if abs(value) < 1e300 else "a number far beyond"
                raise InputError(f"{name} must lie between {low:g} and {high:g}, got {got}.")
        if self.similar_label not in (0, 1, None):
            raise InputError(f"similar_label must be 0 or 1, got {self.similar_label!r}.")
        if self.single not in (*SINGLE, None):
            raise InputError(f"single must be one of {', '.join(SINGLE)}; got {self.single!r}.")
        if self.calibration_share + self.test_share >= 1:
            raise InputError("calibration_share and test_share must leave identities to train on.")


_RANGES = (
    ("image_size", 8, 1024),
    ("identity_depth", 1, 9),
    ("embedding_dim", 1, 65536),
    ("steps", 1, 10**9),
    ("identities", 2, 10**6),
    ("items", 2, 10**6),
    ("learning_rate", 1e-12, 1e3),
    ("weight_decay", 0, 1e3),
    ("calibration_share", 0.01, 0.9),
    ("test_share", 0.01, 0.9),
    ("far", 0, 0.5),
    ("seed", 0, 2**31 - 1),
)


def to_toml(config: TrainConfig) -> str:
    given = {name: value for name, value in asdict(config).items() if value is not None}
    return tomli_w.dumps({"format": FORMAT, **given})


def read_config(path: Path) -> TrainConfig:
    """The config in a TOML file.

    Raises:
        InputError: no such file, no TOML, another format version, an unknown key, a value of the
            wrong type or out of range.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"no such file: {path}") from None
    except RecursionError:
        raise InputError(f"{path} is not valid TOML: brackets in too many brackets.") from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise InputError(f"{path} is not valid TOML: {error}") from None
    check_format(path, found.pop("format", None))
    known = {f.name: f.type for f in fields(TrainConfig)}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise InputError(
            f"{path} has an unknown key {unknown[0]!r}; the known ones are: {', '.join(known)}."
        )
    for name, says in (("data", "what to train on"), ("loss", "which loss to train with")):
        if name not in found:
            raise InputError(f"{path} has no key {name!r}, which says {says}.")
    for name, value in found.items():
        if not _fits(value, known[name]):
            raise InputError(f"{path}: {name} must be {_KINDS[known[name]][0]}, got {value!r}.")
    try:
        return TrainConfig(**found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_format(path: Path, found: object) -> None:
    """Refuse what another version of the run format wrote."""
    if found != FORMAT:
        raise InputError(
            f"{path} has run format {found!r}, and this nearfar reads format {FORMAT}. "
            "Train again, or use the nearfar that wrote it."
        )


_KINDS: dict[object, tuple[str, tuple[type, ...]]] = {
    int: ("an integer", (int,)),
    int | None: ("an integer", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("text", (str,)),
    str | None: ("text", (str,)),
    Mapping[str, Setting]: ("a table", (dict,)),
}


def _fits(value: object, declared: object) -> bool:
    kinds = _KINDS[declared][1]
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
