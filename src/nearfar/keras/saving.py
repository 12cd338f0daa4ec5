"""What Keras needs to load a saved model that holds a loss or layer of this package."""

from typing import TypeVar

import keras

Class = TypeVar("Class", bound=type)


def serializable(cls: Class) -> Class:
    """A class that Keras finds by its name, "nearfar>SupConLoss" for instance."""
    keras.saving.register_keras_serializable(package="nearfar")(cls)
    return cls
