"""Layers: the distance that a Siamese network ends in, and a loss inside a model."""

import inspect
from collections.abc import Callable
from math import log
from typing import Any, get_args

import keras
from keras import ops

from nearfar.keras.batch import batch_triplet_loss, nt_xent_loss, sup_con_loss
from nearfar.keras.checks import between, one_of
from nearfar.keras.rows import Distance as DistanceName
from nearfar.keras.rows import distances, matrix
from nearfar.keras.saving import serializable
from nearfar.keras.towers import clip_loss, info_nce_loss, siglip_loss

_LOSSES: dict[str, Callable[..., Any]] = {
    "sup_con": sup_con_loss,
    "nt_xent": nt_xent_loss,
    "batch_triplet": batch_triplet_loss,
    "info_nce": info_nce_loss,
    "clip": clip_loss,
    "siglip": siglip_loss,
}
_LEARNED = ("temperature", "scale", "bias")
_LARGEST = 100  # where the paper of CLIP stops its scale


@serializable
class Distance(keras.layers.Layer):
    """The distance between row i of one tensor and row i of another, (n,), in float32 or wider.

    At distance 0, where no direction is defined, the gradient is 0 instead of NaN.

    Args:
        distance: "euclidean", "sqeuclidean", "cosine" or "manhattan".
        **settings: those of a Keras layer, such as `name`.

    Raises:
        ValueError: no such distance, or inputs of another shape than (n, d).

    >>> import numpy as np
    >>> print(np.asarray(Distance()([np.array([[3.0, 0]]), np.array([[0.0, 4]])])))
    [5.]
    """

    def __init__(self, distance: DistanceName = "euclidean", **settings: Any) -> None:
        one_of("distance", distance, get_args(DistanceName))
        super().__init__(**{"dtype": "float32", "autocast": False, **settings})
        self.distance = distance

    def call(self, inputs: Any) -> Any:
        x1, x2 = (matrix(name, x) for name, x in zip(("x1", "x2"), inputs, strict=True))
        return distances(x1, x2, self.distance)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "distance": self.distance}


@serializable
class LossLayer(keras.layers.Layer):
    """A loss inside the model, added by `add_loss`: of two towers, or of embeddings and labels.

    It takes two tensors and returns them unchanged, so that it can be the end of a model for
    training, which `compile(optimizer)` needs no other loss for. Temperature, scale and bias may be
    weights that are learned with the rest.

    Args:
        loss: "info_nce", "clip" or "siglip" of two towers, (n, d) each; or "sup_con", "nt_xent" or
            "batch_triplet" of (n, d) embeddings and their labels, whose input is
            `keras.Input((), dtype="int64")`.
        learned: which settings are learned, of "temperature", "scale" and "bias"; each begins at
            its value in `settings`. Of temperature and scale the logarithm is learned, and they
            begin and stay between 1/100 and 100; the paper of CLIP stops its scale at 100.
        name: the name of the layer.
        trainable: whether what is `learned` is learned.
        **settings: those of the loss function, such as `temperature` or `scale`.

    Raises:
        TypeError: a setting that the loss does not take, or one that it lacks.
        ValueError: no such loss; a setting that is learned but has no value, or one out of range.

    >>> layer = LossLayer("clip", scale=2.0, learned=("scale",))
    >>> x, y = layer([ops.eye(3), ops.eye(3)])
    >>> print(f"{float(ops.stop_gradient(layer.losses[0])):.4f}")
    0.2395
    """

    def __init__(
        self,
        loss: str,
        *,
        learned: tuple[str, ...] = (),
        name: str | None = None,
        trainable: bool = True,
        **settings: Any,
    ) -> None:
        # Without autocast, since half precision would merge labels and round embeddings.
        super().__init__(name=name, trainable=trainable, dtype="float32", autocast=False)
        one_of("loss", loss, tuple(_LOSSES))
        if isinstance(learned, str):
            raise TypeError(
                f"learned must be a tuple of names, such as ({learned!r},); got {learned!r}."
            )
        for setting in learned:
            one_of("learned", setting, _LEARNED)
            if setting not in settings:
                raise ValueError(f"{setting} is learned: pass {setting}=, where it begins.")
            if setting != "bias":
                between(f"a learned {setting}", settings[setting], 1 / _LARGEST, _LARGEST)
        try:
            inspect.signature(_LOSSES[loss]).bind(None, None, **settings)
        except TypeError as error:
            raise TypeError(f"{loss}: {error}.") from None
        self.loss, self.learned, self.settings = loss, tuple(learned), settings

    def build(self, input_shape: Any) -> None:
        self.weights_of = {setting: self._weight(setting) for setting in self.learned}

    def _weight(self, setting: str) -> Any:
        value = self.settings[setting]
        if setting == "bias":
            return self.add_weight(name="bias", initializer=_constant(value))
        return self.add_weight(
            name=f"log_{setting}",
            initializer=_constant(log(value)),
            constraint=lambda w: ops.clip(w, -log(_LARGEST), log(_LARGEST)),
        )

    def call(self, inputs: Any) -> Any:
        first, second = inputs
        values = {
            setting: weight if setting == "bias" else ops.exp(weight)
            for setting, weight in self.weights_of.items()
        }
        self.add_loss(_LOSSES[self.loss](first, second, **{**self.settings, **values}))
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "loss": self.loss,
            "learned": self.learned,
            **self.settings,
        }


def _constant(value: float) -> Any:
    return keras.initializers.Constant(value)
