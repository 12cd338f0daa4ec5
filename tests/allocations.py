"""What a piece of code allocates, tensor by tensor."""

from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Follows every storage that an operation returns, until it is freed.

    Attributes:
        peak: the most bytes that lived at once.
        largest: the largest single storage, in bytes.
        made: the bytes of each, in the order of their making.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self.made: list[int] = []
        self._known = {a.untyped_storage()._cdata for a in known}
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # what lives, and what was freed since it was last counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        if self._at_most > self.peak:  # to count after each operation would take most of the time
            self._living = {k: v for k, v in self._living.items() if not v[0].expired()}
            self._at_most = sum(size for _, size in self._living.values())
            self.peak = max(self.peak, self._at_most)
        return result

    def _meet(self, storage: UntypedStorage) -> None:
        """Its address is its own as long as there is a weak reference to it, freed or not."""
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        if address not in self._living:
            self.made.append(size)
            self._living[address] = StorageWeakRef(storage), 0
        weak, before = self._living[address]
        if size != before:  # new, or resized
            self._living[address] = weak, size
            self._at_most += size - before
            self.largest = max(self.largest, size)

    def living(self) -> list[tuple[StorageWeakRef, int]]:
        """What has not been freed yet, and its bytes."""
        return [(live, size) for live, size in self._living.values() if not live.expired()]
