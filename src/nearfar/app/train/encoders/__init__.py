"""Networks from items to embeddings of length 1, by the name that --encoder gives."""

from nearfar.app.errors import InputError
from nearfar.app.train.encoders.builtin import ConvNet, mlp
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.app.train.encoders.own import checked, find
from nearfar.app.train.names import AUTO

__all__ = ["Embedder", "build"]
SMALLEST_SIDE = 4


def build(name: str, input_shape: tuple[int, ...], embedding_dim: int) -> Embedder:
    """The encoder of this name: "auto" for one that suits the input, or package.module:factory.

    Raises:
        InputError: the factory does not exist or fails, or its network does not map
            (n, *input_shape) to (n, embedding_dim).
    """
    if name != AUTO:
        factory = find(name)
    elif len(input_shape) == 1:
        factory = mlp
    elif min(input_shape[1:]) < SMALLEST_SIDE:
        raise InputError(
            f"images of {input_shape[1]} x {input_shape[2]} are too small for the built-in "
            f"network, which needs {SMALLEST_SIDE} x {SMALLEST_SIDE}. Pass them as vectors."
        )
    else:
        factory = ConvNet
    if name == AUTO:
        return Embedder(factory(input_shape, embedding_dim), input_shape)
    return checked(name, factory, input_shape, embedding_dim)
