"""The decoded images of one batch, in one array that is made once."""

from collections.abc import Iterator

import numpy as np

from src.preprocessing import Preprocessing


class PixelBatch:
    """Rows of uint8 (C, H, W), filled in order. A batch of more than ``rows`` moves to a larger array, which is given
    back with ``clear``."""

    def __init__(self, spec: Preprocessing, rows: int):
        self.home = np.empty((rows, *spec.shape), np.uint8)
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.pixels, self.used = self.home, 0

    def next_row(self) -> np.ndarray:
        """The first unused row, to be written and then counted with ``keep``."""
        if self.used == len(self.pixels):
            larger = np.empty((2 * len(self.pixels), *self.pixels.shape[1:]), np.uint8)
            larger[: self.used] = self.pixels
            self.pixels = larger
        return self.pixels[self.used]

    def keep(self) -> None:
        """Count the row that ``next_row`` gave as used."""
        self.used += 1

    def rewind(self, used: int) -> None:
        """Forget the rows from ``used`` on."""
        self.used = used

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """The used rows, at most ``size`` at a time: it bounds the network's memory."""
        for start in range(0, self.used, size):
            yield self.pixels[start : min(start + size, self.used)]
