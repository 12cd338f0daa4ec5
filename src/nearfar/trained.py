"""Load what the tool has trained."""

from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.extras import needs

if TYPE_CHECKING:
    from nearfar.app.verifier import Verifier


def load(run: str | Path) -> "Verifier":
    """Load a run of `nearfar train` as a module, with its transform and its threshold.

    Needs the extra `app`.

    Args:
        run: the run folder.

    Returns:
        The encoder, a `torch.nn.Module` from items to embeddings; see
        :class:`nearfar.app.verifier.Verifier`.

    Raises:
        ValueError: the folder or a file of it is missing, damaged or of another format version.

    >>> model = nf.load("runs/demo")  # doctest: +SKIP
    >>> x = model(model.transform("glyphs:0", "glyphs:1"))  # doctest: +SKIP
    >>> model.same(x[:1], x[1:])  # doctest: +SKIP
    tensor([True])
    >>> model.probability(model.distance(x[:1], x[1:]))  # doctest: +SKIP
    tensor([0.9956], dtype=torch.float64)
    """
    with needs("app"):
        from nearfar.app.train.run import read_run
        from nearfar.app.verifier import Verifier
    return Verifier(read_run(Path(run)))
