"""Training on several processes: losses of all their rows, and which items each of them gets.

A loss with `group="world"` is that of the rows of all processes, with the gradients of one process
that holds them all; `over` says the rest. `samplers` deals batches of P classes x K items to the
processes, from a data set or a stream.
"""

from nearfar.distributed.group import over

__all__ = ["over"]
