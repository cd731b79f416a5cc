"""The first batch of a user's DataLoader, taken without moving anything that training will read.

A loader whose parts can be copied is drawn from a copy (`isolation` says which can). Any other (a stream, a file, a
queue, a shared generator) is not touched: the first batch that training itself reads from it is seen as it goes by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from attnmonitor.measurement.batches import copied
from attnmonitor.measurement.isolation import CannotCopyError, is_installed, isolated
from attnmonitor.parallel.process_state import restored_random_state

__all__ = ["CannotCopyError", "EmptyLoaderError", "PassingBatch", "draw_first_batch"]


class EmptyLoaderError(ValueError):
    """The loader has no batch."""


def draw_first_batch(loader: DataLoader[Any]) -> Any:
    """Return the loader's first batch, drawn from copies of its parts; where it shuffles, in stored order.

    Raises:
        CannotCopyError: A part cannot be copied, or its code reaches something that a copy would share.
        EmptyLoaderError: There is no batch.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise CannotCopyError(f"its dataset {type(loader.dataset).__name__} is a stream")
    if not is_installed(type(loader)):
        raise CannotCopyError(f"{type(loader).__name__} is a loader of your own")
    # From a shuffling loader, the first examples in stored order: a resumed run must draw the same probe again.
    is_shuffled = isinstance(loader.sampler, RandomSampler) and loader.batch_size is not None
    parts: dict[str, Any] = {"dataset": loader.dataset, "collate_fn": loader.collate_fn}
    if not is_shuffled:
        parts |= (
            {"sampler": loader.sampler} if loader.batch_sampler is None else {"batch_sampler": loader.batch_sampler}
        )
    with restored_random_state():
        copies = isolated(parts)
        size: dict[str, Any] = {} if "batch_sampler" in parts else {"batch_size": loader.batch_size}
        try:
            return next(iter(DataLoader(**copies, **size)))
        except StopIteration:
            raise EmptyLoaderError("probe: the DataLoader is empty; give one with at least one batch") from None
        except Exception as error:
            raise CannotCopyError(f"a copy of it fails: {type(error).__name__}: {error}") from error


class PassingBatch:
    """A copy of the first batch that anybody reads from a loader from now on.

    Args:
        loader: The loader; its batches stay as they are.

    Attributes:
        batch: The copy; None before a batch is read.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        # accelerate wraps the loader that is read; a persistent iterator is reset, not made again.
        self._loader: Any = getattr(loader, "base_dataloader", loader)
        self.batch: Any = None
        if getattr(self._loader, "_iterator", None) is not None:
            self._watch(self._loader._iterator)
        self._loader._get_iterator = self._make_iterator

    def close(self) -> None:
        """Leave the loader as it was."""
        self._loader.__dict__.pop("_get_iterator", None)

    def _make_iterator(self) -> Any:
        iterator = type(self._loader)._get_iterator(self._loader)
        self._watch(iterator)
        return iterator

    def _watch(self, iterator: Any) -> None:
        read: Callable[[], Any] = iterator._next_data

        def next_data() -> Any:
            batch = read()
            iterator.__dict__.pop("_next_data", None)
            if self.batch is None:
                self.batch = copied(batch)
                self.close()
            return batch

        iterator._next_data = next_data
