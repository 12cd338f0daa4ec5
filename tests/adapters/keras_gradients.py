"""A value and its gradients, by the backend that Keras runs on, and by torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

keras = pytest.importorskip("keras")

BACKEND = keras.backend.backend()
Array = np.ndarray[Any, Any]
Derived = tuple[Array, list[Array]]


def derived(f: Callable[..., Any], *given: Array, compiled: bool = False) -> Derived:
    """The value of `f`, and the gradients of all arguments; the sum's, where it is not scalar."""
    return {"jax": by_jax, "torch": by_torch, "tensorflow": by_tensorflow}[BACKEND](
        f, *given, compiled=compiled
    )


def by_torch(f: Callable[..., Any], *given: Array, compiled: bool = False) -> Derived:
    del compiled  # Keras does not compile torch unless asked
    leaves = [torch.tensor(value, requires_grad=True) for value in given]
    value = f(*leaves)
    value.sum().backward()
    return value.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]


def by_jax(f: Callable[..., Any], *given: Array, compiled: bool = False) -> Derived:
    import jax

    def summed(*leaves: Any) -> Any:
        value = f(*leaves)
        return value.sum(), value

    places = tuple(range(len(given)))
    run = jax.value_and_grad(summed, argnums=places, has_aux=True)
    (_, value), gradients = (jax.jit(run) if compiled else run)(*map(jax.numpy.asarray, given))
    return np.asarray(value), [np.asarray(each) for each in gradients]


def by_tensorflow(f: Callable[..., Any], *given: Array, compiled: bool = False) -> Derived:
    import tensorflow as tf

    def run(*leaves: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            value = f(*leaves)
            total = tf.reduce_sum(value)
        return value, [tf.convert_to_tensor(each) for each in tape.gradient(total, leaves)]

    if compiled:  # for any number of rows, as `fit` does
        shapes = [(None, *value.shape[1:]) if value.ndim else () for value in given]
        signature = [
            tf.TensorSpec(shape, value.dtype) for shape, value in zip(shapes, given, strict=True)
        ]
        run = tf.function(run, jit_compile=True, autograph=False, input_signature=signature)
    value, gradients = run(*map(tf.constant, given))
    return value.numpy(), [each.numpy() for each in gradients]
