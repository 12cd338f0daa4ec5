"""Over which processes a loss is computed, and how they work together."""

from nearfar.engine.meeting import Handshake, Over, Replicas, TorchGroup, check_group
from nearfar.inputs import one_of, switch


def over(
    group: TorchGroup = "world",
    *,
    ring: bool = False,
    replicas: Replicas = "averaged",
    handshake: Handshake = "each",
) -> Over:
    """What a loss takes as `group=`, where a process group alone does not say enough.

    Args:
        group: "world", a process group, or one dimension of a DeviceMesh.
        ring: send the rows from process to process instead of gathering all of them on each. Then a
            process holds its own rows, those it compares and those that come next: memory linear in
            the rows of a process. Losses of log-sum-exps and sums over pairs do so; others gather.
        replicas: what the trainer does with the gradients of the processes: "averaged", as
            DistributedDataParallel, FSDP and HSDP do, or "summed".
        handshake: "each" step the processes tell each other what they have; "first", only in the
            first, for steps of fixed shape, which a CUDA graph can capture. In later steps an error
            of one process is not told to the others: they wait until that process ends.

    Returns:
        What to pass as `group=`; with `handshake="first"`, the same object in every step, and one
        for each of several losses.

    Raises:
        TypeError: `group` is no group.
        ValueError: an unknown choice, a group of other processes, or a DeviceMesh of several
            dimensions.

    >>> over("world", replicas="summed")
    Over(group='world', ring=False, replicas='summed', handshake='each')
    """
    check_group(group)
    switch("ring", ring)
    one_of("replicas", replicas, Replicas)
    one_of("handshake", handshake, Handshake)
    return Over(group, ring, replicas, handshake)
