"""Train one layer after a pretrained network that stays as it is.

What the network makes of the items is computed once: each step, and each measurement, starts there.
"""

from dataclasses import replace

from torch import Tensor, nn

from nearfar.app.data.content import Content, Features
from nearfar.app.data.items import Items, Pairs, items_of
from nearfar.app.data.reads import Reads
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.measure import features

# The features of the last run, which the next trial of a sweep needs again.
_last: dict[bytes, Tensor] = {}


def last_layer(embedder: Embedder, data: Items | Pairs) -> tuple[Embedder, Items | Pairs]:
    """The layer after the encoder as an embedder of its own, and the data as the encoder sees them.

    The layer is shared: to train it trains `embedder`.
    """
    items = items_of(data)
    x = _features(embedder, items.content)
    seen = replace(items, content=Features(items.content, x))
    layer = Embedder(
        nn.Identity(),
        Reads(tuple(x.shape[1:])),
        embedder.embedding_dim,
        head=embedder.head,
        pretrained=True,
    )
    return layer, replace(data, items=seen) if isinstance(data, Pairs) else seen


def _features(embedder: Embedder, content: Content) -> Tensor:
    """(n, features) of all items."""
    digest = content.hash()
    digest.update(repr(embedder.reads).encode())
    for name, value in embedder.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    if (key := digest.digest()) not in _last:
        _last.clear()
        _last[key] = features(embedder, content)
    return _last[key]
