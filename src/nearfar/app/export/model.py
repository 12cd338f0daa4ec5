"""Write a module as ONNX, and compare the file with the module."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from nearfar.app.errors import InputError
from nearfar.extras import needs

OUTPUT = "embeddings"  # torch calls the rows of an nn.Embedding "embedding"


def check_installed() -> None:
    """Raise an InputError that names the extra if a library is missing."""
    try:
        with needs("onnx"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        raise InputError(str(missing)) from None


def write_onnx(
    model: nn.Module,
    example: tuple[Tensor, ...],
    names: Sequence[str],
    axes: Sequence[str],
    file: Path,
) -> None:
    """Write a module.

    Args:
        model: takes tensors whose first axes are `axes`.
        example: a batch of two.
        names: the names of its tensors.
        axes: the names of those axes whose size is not fixed.
        file: to write.

    Raises:
        InputError: the module cannot be exported.
    """
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    free = {i: torch.export.Dim(name) for i, name in enumerate(axes)}
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                example,
                input_names=names,
                output_names=[OUTPUT],
                dynamic_shapes=tuple(free for _ in example),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # what an encoder of the user may do is open
        cause = error.__cause__ or error
        said = str(cause).strip().partition("\n")[0]
        raise InputError(
            f"torch cannot export this encoder: {type(cause).__name__}: {said.rstrip('.')}. The "
            "forward of an encoder must not branch on the numbers in a batch."
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # which hold paths of this machine
    program.save(file)


def embed_by_file(
    file: Path, names: Sequence[str], batches: Sequence[tuple[Tensor, ...]]
) -> list[Tensor]:
    """The (n, d) embeddings of each batch by an exported model.

    Raises:
        InputError: it does not run.
    """
    import onnxruntime

    fed = [{k: v.numpy() for k, v in zip(names, batch, strict=True)} for batch in batches]
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run([OUTPUT], batch)[0]) for batch in fed]
    except Exception as error:  # of a library that has many
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"onnxruntime cannot run the exported model: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs, warns of and prints; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
