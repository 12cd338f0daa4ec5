"""Write the run folder, completely or not at all, and read it with every value checked."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file

from nearfar.app.data.fit import Fit
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import GLYPHS, saves_itself
from nearfar.app.output import FolderKind, files_in, whole_folder
from nearfar.app.train.calibration import CALIBRATION
from nearfar.app.train.compare import Thresholds
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import FORMAT, check_format, read_config, to_toml
from nearfar.app.train.encoders import Embedder, build, load_folder, save_folder
from nearfar.app.train.measure import RAW_DISTANCES
from nearfar.app.train.objectives import verifier_distance
from nearfar.app.train.record import RECORD
from nearfar.app.train.summary import ENCODER_FILES as ENCODER_FILES_FORM
from nearfar.app.train.summary import FITTED, misfit
from nearfar.app.train.summary import METRICS as METRICS_FORM
from nearfar.app.train.summary import SUMMARY as SUMMARY_FORM
from nearfar.distance import Distance
from nearfar.evaluate import PlattProbability

CONFIG, MODEL, THRESHOLD = "config.toml", "model.safetensors", "threshold.json"
METRICS, SUMMARY = "metrics.jsonl", "summary.json"
FILES = (CONFIG, MODEL, THRESHOLD, METRICS, SUMMARY)
# In place of MODEL, for a network that saves itself: its folder, and a hash of each file in it.
ENCODER, ENCODER_FILES = "encoder", "encoder.json"
REPORT = "report.html"
OPTIONAL = (RECORD, CALIBRATION, REPORT)  # files that a run folder may also hold


def _of_encoder(run: Path) -> list[str]:
    """The files of a run's encoder, as it lists them; none if there is no such list."""
    try:
        return [f"{ENCODER}/{name}" for name in _read_json(run / ENCODER_FILES)["files"]]
    except (InputError, KeyError, TypeError):
        return []


RUN = FolderKind(
    "a run", "--out", (CONFIG, SUMMARY), (*FILES, *OPTIONAL, ENCODER_FILES), _of_encoder
)

WhenFinished = Callable[[Path], None] | None


@dataclass(frozen=True, eq=False)
class Run:
    """A trained verifier.

    Attributes:
        path: the run folder.
        config: the config of the run.
        embedder: the network, in evaluation mode, on the CPU.
        distance: the distance by which embeddings are compared.
        thresholds: the largest distances at which two items count as the same.
        probability: of "same", over the distance; None if the run is older than that.
        summary: the summary that training wrote.
    """

    path: Path
    config: TrainConfig
    embedder: Embedder
    distance: Distance
    thresholds: Thresholds
    probability: PlattProbability | None
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The contents of a run folder without its network; see `Run`."""

    path: Path
    config: TrainConfig
    distance: Distance
    thresholds: Thresholds
    probability: PlattProbability | None
    summary: Mapping[str, Any]


def model_file(config: TrainConfig) -> str:
    """The file that holds the network's weights, or their hashes."""
    return ENCODER_FILES if saves_itself(config.encoder) else MODEL


def files_of(config: TrainConfig) -> tuple[str, ...]:
    """The files that a run of this config has."""
    model = model_file(config)
    return tuple(model if name == MODEL else name for name in FILES)


def refuse_inside(out: Path, data: str) -> None:
    """Refuse to write over the data or into its folder."""
    source = Path(data)
    if data != GLYPHS and source.exists() and out.resolve().is_relative_to(source.resolve()):
        lies = "is" if source.is_file() else "lies inside"
        raise InputError(f"--out {out} {lies} the data, {data}. Choose another --out.")


def refuse_inside_run(out: Path, option: str = "--out") -> None:
    """Refuse to write into a run folder: with foreign files in it, it could not be replaced."""
    for folder in out.resolve().parents:
        if RUN.found_at(folder):
            raise InputError(f"{option} {out} lies inside the run {folder}. Choose one outside.")


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over anything but an empty folder, or a run if `overwrite` is set."""
    RUN.refuse_existing(out, overwrite=overwrite)


def writing(
    out: Path, *, overwrite: bool = False, finish: WhenFinished = None
) -> AbstractContextManager[Path]:
    """A temporary folder that becomes the run `out`; see `whole_folder`."""
    return whole_folder(out, RUN, overwrite=overwrite, finish=finish)


def write_run(
    folder: Path,
    config: TrainConfig,
    embedder: Embedder,
    thresholds: Thresholds,
    probability: PlattProbability,
    summary: Mapping[str, Any],
) -> None:
    """Write all files of a run except the metrics, which training writes as it goes."""
    (folder / CONFIG).write_text(to_toml(config), encoding="utf-8")
    _write_model(folder, config, embedder.cpu())
    _write_json(
        folder / THRESHOLD,
        {
            "format": FORMAT,
            "distance": verifier_distance(config.loss, config.hyperparameters),
            "threshold": thresholds.learned,
            "far": thresholds.far,
            "raw_threshold": thresholds.raw,
            "raw_distance": thresholds.raw_distance,
            "probability": probability.as_dict(),
        },
    )
    _write_json(folder / SUMMARY, {"format": FORMAT, **summary})


def _write_model(folder: Path, config: TrainConfig, embedder: Embedder) -> None:
    if saves_itself(config.encoder):
        save_folder(embedder, config, folder / ENCODER)
        files = _hashes(folder / ENCODER)
        for name in files:
            (folder / ENCODER / name).chmod(0o644)
        _write_json(folder / ENCODER_FILES, {"format": FORMAT, "files": files})
        return
    state = {name: value.contiguous() for name, value in embedder.state_dict().items()}
    # A single key: safetensors writes several in an order that varies from process to process.
    described = {"format": FORMAT, "input_shape": list(embedder.reads.shape or ())}
    if embedder.reads.own_fit is not None:
        described["fit"] = asdict(embedder.reads.own_fit)
    try:
        save_file(state, folder / MODEL, metadata={"nearfar": json.dumps(described)})
    except SafetensorError as error:  # on a full disk, for example
        raise InputError(f"{folder / MODEL} cannot be written: {error}") from None
    (folder / MODEL).chmod(0o644)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder or a file is missing, damaged or of another format version.
    """
    found = read_results(path)
    read = _read_folder if saves_itself(found.config.encoder) else _read_model
    return Run(embedder=read(path, found.config), **vars(found))


def read_results(path: Path) -> Results:
    """Read a run folder without its network, whose code may be missing.

    Raises:
        InputError: as `read_run`.
    """
    if not path.is_dir():
        raise InputError(f"no such run folder: {path}")
    config = read_config(path / CONFIG) if (path / CONFIG).is_file() else None
    names = files_of(config) if config else FILES
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not config:
        raise InputError(
            f"{path} is not a complete run: it has no {', '.join(missing)}. "
            "Name the folder given to `nearfar train --out`."
        )
    threshold, summary = _read_json(path / THRESHOLD), _read_json(path / SUMMARY)
    for name, content, form in ((SUMMARY, summary, SUMMARY_FORM), (THRESHOLD, threshold, FITTED)):
        if wrong := misfit(content, form):
            raise InputError(f"{path / name} is damaged: {wrong}. Train again.")
    thresholds = Thresholds(
        float(threshold["threshold"]),
        float(threshold["raw_threshold"]),
        float(threshold["far"]),
        threshold.get("raw_distance") or "euclidean",  # for runs before 0.1.1
    )
    distance = threshold["distance"]
    right = verifier_distance(config.loss, config.hyperparameters)
    if distance != right:
        raise InputError(
            f"{path / THRESHOLD} is damaged: its distance is {distance!r}, but the run uses "
            f"{right!r}. Train again."
        )
    if thresholds.raw_distance not in RAW_DISTANCES:
        raise InputError(
            f"{path / THRESHOLD} is damaged: its raw_distance is {thresholds.raw_distance!r}. "
            "Train again."
        )
    probability = _probability(path / THRESHOLD, threshold.get("probability"))
    return Results(path, config, distance, thresholds, probability, summary)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the metrics of each step of a run.

    Raises:
        InputError: the file is damaged.
    """
    try:
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path / METRICS} is damaged: it is not JSON. Train again.") from None
    if not found:
        raise InputError(f"{path / METRICS} is damaged: it is empty. Train again.")
    for number, line in enumerate(found, 1):
        if wrong := misfit(line, METRICS_FORM):
            raise InputError(f"{path / METRICS} is damaged: line {number}: {wrong}. Train again.")
    return found


def _probability(path: Path, held: Mapping[str, float] | None) -> PlattProbability | None:
    if held is None:  # for runs before 0.3
        return None
    names = ("slope", "intercept", "share", "prior", "low", "high")
    found = {name: held[name] for name in names}
    ends = (1e-12, found["low"], found["share"], found["high"], 1 - 1e-12)
    if list(ends) != sorted(set(ends)) or not 1e-12 <= found["prior"] <= 1 - 1e-12:
        raise InputError(f"{path} is damaged: its probability is out of range. Train again.")
    return PlattProbability(**found)


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    return {name: _sha256(folder / name) for name in files_in(folder)}


def _sha256(path: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read, as a link to nothing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _read_folder(run: Path, config: TrainConfig) -> Embedder:
    content, found = _read_json(run / ENCODER_FILES), _hashes(run / ENCODER)
    if wrong := misfit(content, ENCODER_FILES_FORM):
        raise InputError(f"{run / ENCODER_FILES} is damaged: {wrong}. Train again.")
    listed = content["files"]
    for name in sorted(found.keys() | listed.keys()):
        path = run / ENCODER / name
        if name not in found:
            raise InputError(f"{path} is missing. Train again.")
        if name not in listed:
            raise InputError(f"{path} is not part of the run. Move it elsewhere.")
        if found[name] != listed[name]:
            raise InputError(f"{path} is damaged: it is not as training wrote it. Train again.")
    return load_folder(config, run / ENCODER).eval()


def _read_model(run: Path, config: TrainConfig) -> Embedder:
    path = run / MODEL
    try:
        content = path.read_bytes()  # safetensors cannot open a path that is not UTF-8
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        described = json.loads(header["__metadata__"]["nearfar"])
        shape = tuple(int(size) for size in described["input_shape"])
        own_fit = Fit.read(described["fit"]) if "fit" in described else None
        state = load(content)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{path} is damaged or not a model of nearfar. Train again.") from None
    check_format(path, described.get("format"))
    embedder = build(config, Reads(shape, own_fit=own_fit), weights=False)
    try:
        embedder.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"{path} does not fit the encoder {config.encoder!r} of {CONFIG}. Train again."
        ) from None
    return embedder.eval()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} is damaged: it is not JSON. Train again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object. Train again.")
    check_format(path, content.get("format"))
    return content
