"""Decide whether two items are the same.

    python verify.py A B

Needs numpy and onnxruntime; for image files Pillow, for texts tokenizers. Each item is an image
file, a vector ("0.1 0.2") or a .npy file with one item; for a model of texts, a text. Exit status 0
if they are the same, 1 if not, 2 on an error.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]
FORMAT = 1
IMAGES = ("JPEG", "MPO", "PNG", "WEBP")  # MPO: a JPEG that holds several, as some phones write
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation: Pillow's transposition


class Verifier:
    """The exported model, and what it takes to decide.

    Args:
        folder: the exported folder.
    """

    def __init__(self, folder: Path) -> None:
        self.fitted = json.loads((folder / "threshold.json").read_text(encoding="utf-8"))
        if self.fitted["format"] != FORMAT:
            raise ValueError(f"threshold.json has format {self.fitted['format']}, not {FORMAT}")
        model = folder / "model.onnx"
        if hashlib.sha256(model.read_bytes()).hexdigest() != self.fitted["model_sha256"]:
            raise ValueError("threshold.json belongs to another model.onnx: export again")
        self.folder = folder
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def prepare(self, items: Sequence[str]) -> dict[str, Array]:
        """A batch of items as the model takes it."""
        if self.fitted["input"]["kind"] != "text":
            return {"x": np.stack([self.read(item) for item in items])}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        found = tokenizer.encode_batch([self.fitted["input"]["prompt"] + text for text in items])
        return {
            "input_ids": np.array([one.ids for one in found], np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], np.int64),
        }

    def read(self, item: str) -> Array:
        """One vector or image as the model takes it."""
        form = self.fitted["input"]
        if item.endswith(".npy"):
            x = np.load(item, allow_pickle=False)
        elif form["kind"] == "image":
            if not form["image_files"]:
                raise ValueError(f"{item}: this model was not trained on image files of 8 bits per "
                                 "channel, and takes .npy files")  # fmt: skip
            x = read_image(item, *form["shape"], **form["resize"])
        else:
            x = read_vector(item, *form["shape"])
        if list(x.shape) != form["shape"] or not np.can_cast(x.dtype, form["dtype"], "same_kind"):
            raise ValueError(f"{item} is {x.dtype} of shape {x.shape}, but the model takes "
                             f"{form['dtype']} of shape {form['shape']}")  # fmt: skip
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite
            x = x.astype(form["dtype"])
        if not np.isfinite(x).all():
            raise ValueError(f"{item} holds NaN, infinity or a number beyond float32")
        return np.asarray(x)

    def embed(self, batch: dict[str, Array]) -> Array:
        """A batch of n items, as `prepare` gives it, to (n, d) embeddings of length 1."""
        (found,) = self.session.run(["embeddings"], batch)
        return np.asarray(found)

    def distance(self, a: Array, b: Array) -> Array:
        """Between row i of a, (n, d) embeddings, and row i of b: (n,) float64."""
        a, b = a.astype(np.float64), b.astype(np.float64)
        if self.fitted["distance"] == "cosine":
            return np.asarray((1 - (a * b).sum(-1)).clip(0))  # rounding may leave less than 0
        squared = np.square(a - b).sum(-1)
        return np.asarray(np.sqrt(squared) if self.fitted["distance"] == "euclidean" else squared)

    def same(self, distance: Array) -> Array:
        """The decision."""
        return np.asarray(distance <= self.fitted["threshold"])

    def likelihood_ratio(self, distance: float) -> float | None:
        """How many times as likely such a distance is for same pairs as for different ones."""
        curve = self.fitted["log_likelihood_ratio"]
        if curve is None:  # the run is too old to have one
            return None
        line = curve["slope"] * distance + curve["intercept"]
        return exp(min(max(line, curve["low"]), curve["high"]))

    def shown(self, ratio: float) -> str:
        """A likelihood ratio as text: at a limit, it may be any that is further from 1."""
        curve = self.fitted["log_likelihood_ratio"]
        beyond = {exp(curve["low"]): "<= ", exp(curve["high"]): ">= "}.get(ratio, "")
        return beyond + (f"{ratio:,.0f}" if ratio >= 1000 else f"{ratio:.4g}")


def probability(likelihood_ratio: float, prior: float) -> float:
    """Of "same", if this share of the pairs that are compared is the same."""
    return 1 / (1 + exp(log(1 - prior) - log(prior) - log(likelihood_ratio)))


def read_image(
    path: str,
    channels: int,
    height: int,
    width: int,
    *,
    resample: str = "bilinear",
    resized: int | None = None,
    keeps_shape: bool = False,
) -> Array:
    """Decode and resize an image: (channels, height, width) uint8.

    If `resized` is given, the image has this size (with `keeps_shape`, its shorter side has) before
    the centre is cut out.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.format not in IMAGES or any(";16" in str(t) for t in image.tile):
            raise ValueError(f"{path}: only PNG, JPEG and WebP with 8 bits per channel are read")
        if resized is None:
            image.draft(None, (width, height))  # JPEG may be decoded at 1/2, 1/4 or 1/8 of its size
        image.load()
        turn = UPRIGHT.get(image.getexif().get(274, 1))
        plain: Image.Image = image
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            layer = image.convert("RGBA")
            plain = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        if image.mode not in ("1", "L", "LA", "La"):
            plain = plain.convert("RGB")
        plain = plain.convert("L" if channels == 1 else "RGB")
    if turn is not None:
        plain = plain.transpose(Image.Transpose(turn))
    how = Image.Resampling[resample.upper()]
    if resized is None:
        plain = plain.resize((width, height), how, reducing_gap=3.0)
    else:
        shorter = min(plain.size)
        w, h = (resized * side // shorter if keeps_shape else resized for side in plain.size)
        left, top = round((w - width) / 2), round((h - height) / 2)
        plain = plain.resize((w, h), how).crop((left, top, left + width, top + height))
    return np.asarray(plain).reshape(height, width, channels).transpose(2, 0, 1)


def read_vector(text: str, n: int) -> Array:
    """Numbers with spaces or commas between them; n are expected."""
    if "_" in text:  # 1_000 is a number in Python only
        raise ValueError(f"{text} holds an underscore, so it is not a vector")
    words = text.replace(",", " ").split()
    if "," in text and len(words) != n:  # "0,5" may have a decimal comma
        raise ValueError(f"{text} holds {len(words)} numbers, but the model takes {n}. Write "
                         "decimals with a point, and only spaces between numbers")  # fmt: skip
    return np.array(words, np.float64)


def items_after_options(words: Sequence[str]) -> list[str]:
    """Put the items after `--`: one that begins with a minus looks like an option."""
    if "--" in words:
        return list(words)
    options: list[str] = []
    items: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        of_option = word.startswith("--") or word == "-h" or before == "--prior"
        (options if of_option else items).append(word)
    return [*options, "--", *items]


def main() -> int:
    parser = argparse.ArgumentParser(description="Decide whether two items are the same.")
    parser.add_argument("a", metavar="A", help="an image file, a vector, a .npy file, or a text")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--prior", type=float, help="share of same pairs among all you compare")
    given = parser.parse_args(items_after_options(sys.argv[1:]))
    if given.prior is not None and not 1e-12 <= given.prior <= 1 - 1e-12:
        parser.error("--prior must be a share between 1e-12 and 1 - 1e-12")
    try:
        verifier = Verifier(Path(__file__).parent)
        a, b = verifier.embed(verifier.prepare([given.a, given.b]))
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    distance = verifier.distance(a, b)
    same, threshold = bool(verifier.same(distance)), verifier.fitted["threshold"]
    print(f"{'same' if same else 'different'}: {verifier.fitted['distance']} distance "
          f"{distance:.4f} {'<=' if same else '>'} threshold {threshold:.4f}")  # fmt: skip
    ratio = verifier.likelihood_ratio(float(distance))
    if ratio is not None:
        print(f"likelihood ratio: {verifier.shown(ratio)}")
        if given.prior is not None:
            print(f'probability of "same": {probability(ratio, given.prior):.4g}')
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
