"""The embeddings of the calibration identities in a run folder.

From them, thresholds are fitted that depend on how a run is used, such as on the size of a gallery,
when the data that it was trained on may be gone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nearfar.app.data.arrays import Unreadable, load
from nearfar.app.data.items import Items
from nearfar.app.errors import InputError
from nearfar.app.train.measure import MeasuredPairs

CALIBRATION = "calibration.npz"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Items that fitted the threshold of a run.

    Attributes:
        x: (n, d) float32 embeddings, rounded to float16.
        identity: (n,) int64, the identity of each.
        groups: (n,) int64, items of one group are never compared; None if all may be.
    """

    x: Tensor
    identity: Tensor
    groups: Tensor | None = None


def write_calibration(folder: Path, measured: MeasuredPairs, items: Items) -> None:
    """Write the items that were measured to fit the threshold."""
    identity = items.identity[measured.items].unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    arrays = {
        "x": measured.embeddings.to(torch.float16).numpy(),
        "identity": identity.to(torch.int32).numpy(),
    }
    if items.groups is not None:
        arrays["groups"] = items.groups[measured.items].numpy()
    np.savez_compressed(folder / CALIBRATION, **arrays)


def read_calibration(run: Path) -> Calibration:
    """The calibration items in a run folder.

    Raises:
        InputError: there are none, or the file is damaged.
    """
    path = run / CALIBRATION
    if not path.is_file():
        raise InputError(
            f"{run} has no {CALIBRATION}: it was trained by an older nearfar. Train again: "
            f"nearfar train --config {run}/config.toml --out NEW"
        )
    try:
        found = load(path)
        if not isinstance(found, dict):
            raise ValueError("no .npz")
        kinds = {"x": "f", "identity": "i", "groups": "i"}
        if any(held.dtype.kind != kinds[name] for name, held in found.items()):
            raise ValueError("another kind of numbers")
        x, identity = (torch.from_numpy(found[name]) for name in ("x", "identity"))
        groups = torch.from_numpy(found["groups"]) if "groups" in found else None
        per_item = [identity, *([] if groups is None else [groups])]
        if x.ndim != 2 or any(held.shape != x.shape[:1] for held in per_item):
            raise ValueError("arrays that do not fit")
        if not x.isfinite().all():
            raise ValueError("NaN or infinity")
    except (Unreadable, MemoryError, KeyError, ValueError):
        raise InputError(f"{path} is damaged. Train again.") from None
    return Calibration(x.float(), identity.long(), None if groups is None else groups.long())
