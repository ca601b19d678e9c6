"""Batches of triplets: each query image with another of its class and one of another class."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset


def epoch_seed(seed: int, epoch: int, stream: int) -> int:
    """What one use of chance in ``epoch`` starts from, whether the run was interrupted before it or not.

    ``stream``: the rank of a process, below 99; 99 draws triplets, 100 the order of the images.
    """
    return seed * 100_003 + epoch * 101 + stream


class TripletDataset(Dataset):
    """Triplets over a dataset with ``images`` and ``labels`` in memory, fetched a whole batch at a time.

    Every image is the query of one triplet an epoch; ``seed`` and the epoch decide the other two, so that a resumed run
    draws the same. Raises ValueError for a class with fewer than two images.
    """

    def __init__(self, dataset, class_names: Sequence[str], seed: int, current_epoch: Callable[[], int]):
        self.images, self.labels = dataset.images, dataset.labels
        self.seed, self.current_epoch = seed, current_epoch
        self.counts = torch.bincount(self.labels, minlength=len(class_names))
        for name, count in zip(class_names, self.counts.tolist(), strict=True):
            if count < 2:
                raise ValueError(
                    f"class {name!r} has {count} training images, a triplet needs two; add images, raise data.limit or "
                    "leave the class out"
                )
        self.drawn = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (3 B, C, H, W) and labels (3 B,) of B queries: first these, then positives, then negatives."""
        epoch = self.current_epoch()
        if self.drawn[0] != epoch:
            self.drawn = (epoch, self.draw(epoch))
        rows = self.drawn[1][:, indices].reshape(-1)
        return self.images[rows], self.labels[rows]

    def draw(self, epoch: int) -> torch.Tensor:
        """Rows int64 (3, N) of the triplets of ``epoch``: query, positive, negative; the queries are in order."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, 99))
        one, two = torch.rand(2, len(self), generator=generator, dtype=torch.float64)
        # The rows by class: those of one class are neighbours, from ``start`` on.
        order = torch.argsort(self.labels, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(self))
        count = self.counts[self.labels]
        start = (self.counts.cumsum(0) - self.counts)[self.labels]
        step = 1 + (one * (count - 1)).long()  # never 0: the positive is another image
        positive = order[start + (place - start + step) % count]
        other = (two * (len(self) - count)).long()
        negative = order[torch.where(other < start, other, other + count)]
        return torch.stack([torch.arange(len(self)), positive, negative])
