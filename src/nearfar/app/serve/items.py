"""Items as they come in a request: always their content, never a path or an address to fetch."""

import binascii
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nearfar.app.data.content import Arrays, Content
from nearfar.app.data.images import read_images
from nearfar.app.data.reads import Reads
from nearfar.app.data.texts import Texts, checked_text
from nearfar.app.data.upload import Upload
from nearfar.app.errors import InputError
from nearfar.app.serve.refusal import unusable
from nearfar.app.tables import vector
from nearfar.app.train.run import Run
from nearfar.app.train.use import embed_read

FORMS = {
    "image": '{"image": "<the bytes of an image file, as base64>"}',
    "vector": '{"vector": [0.1, 0.2, ...]}',
    "text": '{"text": "..."}',
}


def kind_of(run: Run) -> str:
    """What a run compares, a key of `FORMS`.

    Raises:
        InputError: items that cannot come in a request.
    """
    if run.embedder.reads.texts:
        return "text"
    shape = run.embedder.reads.shape or ()
    if len(shape) == 1:
        return "vector"
    if len(shape) == 3 and shape[0] in (1, 3):
        return "image"
    raise InputError(
        f"{run.path} cannot be served: it compares items of shape {shape}. Served are images of 1 "
        "or 3 channels, vectors and texts; `nearfar verify` takes others as rows of an .npz."
    )


def item_from(payload: Any, run: Run, what: str) -> Tensor:
    """(1, d), the embedding of an item of a request.

    Args:
        payload: the item as JSON, in one of `FORMS`.
        run: the run that embeds it.
        what: names the item in messages.

    Raises:
        Refusal: it has another form.
        InputError: its content cannot be read, or its embedding is not finite.
    """
    kind = kind_of(run)
    if not isinstance(payload, dict) or list(payload) != [kind]:
        raise unusable(
            f"{what} must be the item itself, {FORMS[kind]}; got {described(payload)}. "
            "Paths and addresses are not read."
        )
    return embed_read(run, [_READERS[kind](payload[kind], run.embedder.reads, what)])


def described(value: Any) -> str:
    """What a value is, in the words of JSON, without what it holds."""
    if isinstance(value, dict):
        keys = ", ".join(repr(key[:40]) for key in list(value)[:5])
        return f"an object with {keys or 'no key'}" + ", ..." * (len(value) > 5)
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return "a number"


def _image(value: Any, reads: Reads, what: str) -> Content:
    form = f"{what}.image must be the bytes of an image file as base64"
    if not isinstance(value, str):
        raise unusable(f"{form}; got {described(value)}.")
    if value.startswith("data:"):
        raise unusable(f'{form}; got a data URL. Send only what follows "base64,".')
    try:
        # MIME, and the tool base64, break it into lines.
        content = b64decode(value.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise unusable(
            f"{form} (letters, digits, + and /, padded with =); got other text."
        ) from None
    return Arrays(read_images([Upload(f"image {what}", content)], reads.fit)[0])


def _vector(value: Any, reads: Reads, what: str) -> Content:
    shape = reads.shape or ()
    form = f"{what}.vector must be a list of {shape[0]} numbers, or these as text"
    if isinstance(value, list):
        wrong = [one for one in value if isinstance(one, bool) or not isinstance(one, int | float)]
        if wrong:
            raise unusable(f"{form}; got a list that holds {described(wrong[0])}.")
    elif not isinstance(value, str):
        raise unusable(f"{form}; got {described(value)}.")
    try:
        with np.errstate(over="ignore"):  # refused below
            numbers = vector(value, f"{what}.vector", shape[0]).astype(np.float32)
    except OverflowError:  # a whole number of hundreds of digits
        numbers = np.full(shape, np.inf, np.float32)
    if numbers.shape != shape:
        raise unusable(f"{form}; got {' x '.join(map(str, numbers.shape))} numbers.")
    if not np.isfinite(numbers).all():
        raise unusable(f"{what}.vector holds a number beyond float32. Repair it.")
    return Arrays(torch.from_numpy(numbers)[None])


def _text(value: Any, reads: Reads, what: str) -> Content:
    if not isinstance(value, str):
        raise unusable(f"{what}.text must be text; got {described(value)}.")
    return Texts([checked_text(value, f"{what}.text")])


_READERS: dict[str, Callable[[Any, Reads, str], Content]] = {
    "image": _image,
    "vector": _vector,
    "text": _text,
}
