"""How fast a network trains on images that are decoded meanwhile."""

from time import perf_counter

from nearfar.app.data.content import Content
from nearfar.app.data.image_files import ImageFiles, n_threads


class PaceOfTraining:
    """Measures the steps of training, without the time spent waiting for images.

    Args:
        content: what is trained on.
    """

    def __init__(self, content: Content) -> None:
        self._content, self._items, self._seconds, self._began = content, 0, 0.0, 0.0

    def start(self) -> None:
        """Begin a step, of which the batch is there."""
        self._began = perf_counter()

    def stop(self, items: int) -> None:
        """End a step, which trained on some items."""
        self._items += items
        self._seconds += perf_counter() - self._began

    def in_words(self) -> str:
        """For instance "decoding: 210 images/s by 2 threads; network: 35 images/s".

        Empty where nothing is decoded during training.
        """
        content = self._content
        if not isinstance(content, ImageFiles) or not content.pace.seconds or not self._seconds:
            return ""
        pace, n = content.pace, n_threads()
        by = f"{n} threads" if n > 1 else "1 thread"
        return (
            f"decoding: {n * pace.decoded / pace.seconds:,.0f} images/s by {by}; "
            f"network: {self._items / self._seconds:,.0f} images/s; "
            f"waited {pace.waited:,.1f} s for images"
        )
