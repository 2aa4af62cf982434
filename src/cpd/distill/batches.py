"""Batches in an order that depends on (seed, epoch) alone, from a dataset or any loader.

Each process gets its share of every global batch, so one process and several see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from cpd.distill.seeds import derive, seed_all
from cpd.errors import InputError

__all__ = ["Batches", "examples", "labels", "parts", "size", "tensors", "to_device", "unpack"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _mapped(batch: Any, change: Any) -> Any:
    """The same nest of mappings and sequences, with every tensor changed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(_mapped(value, change) for value in batch)
    return batch


def labels(targets: Any, task: Any) -> Any:
    """Targets as losses see them: -1, the label of no class, where the task ignores them."""
    ignored = getattr(task, "ignore_index", None)
    whole = isinstance(targets, torch.Tensor) and targets.dtype == torch.int64
    if not whole or not isinstance(ignored, int):
        return targets
    return targets.masked_fill(targets == ignored, -1)


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a nest that has axes."""
    found: list[torch.Tensor] = []
    _mapped(batch, lambda tensor: found.append(tensor) if tensor.ndim else None)
    return iter(found)


def size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor.

    Raises:
        InputError: a batch without a tensor.
    """
    for tensor in tensors(batch):
        return int(tensor.shape[0])
    raise InputError(f"a batch must hold a tensor, one row a sample; got {type(batch).__name__}")


def to_device(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """The batch on a device; images (N, C, H, W) and volumes in memory channels last, if asked."""
    layouts = _CHANNELS_LAST if channels_last else {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        layout = layouts.get(tensor.ndim, torch.preserve_format)
        return tensor.to(device, non_blocking=True, memory_format=layout)

    return _mapped(batch, moved)


def parts(batch: Any, count: int) -> list[Any]:
    """The batch in ``count`` consecutive parts of nearly equal size; none is empty."""
    total = size(batch)
    if count == 1:
        return [batch]
    edges = [total * part // count for part in range(count + 1)]
    spans = [(a, b) for a, b in pairwise(edges) if b > a]

    def cut(first: int, last: int) -> Any:
        return _mapped(batch, lambda tensor: tensor[first:last] if tensor.ndim else tensor)

    return [cut(first, last) for first, last in spans]


def unpack(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and targets of a batch.

    A batch is a pair (inputs, targets) or a mapping with the key "labels" or "targets"; inputs are
    a tensor, a sequence of arguments or a mapping of keyword arguments.

    Raises:
        InputError: a batch of another form.
    """
    if isinstance(batch, Mapping):
        for key in ("labels", "targets"):
            if key in batch:
                return (), {k: v for k, v in batch.items() if k != key}, batch[key]
        raise InputError(f"a batch as mapping needs 'labels' or 'targets', got {list(batch)}")
    if not isinstance(batch, Sequence) or len(batch) != 2:
        found = type(batch).__name__
        raise InputError(f"a batch must be (inputs, targets) or a mapping, got {found}")
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs), targets
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}, targets


def examples(source: Any, rows: int = 2) -> Any:
    """The inputs of the first samples of a source, as a network is called."""
    batch = next(iter(Batches(source, rows, seed=0, train=False).epoch(0)))
    args, kwargs, _ = unpack(
        _mapped(batch, lambda tensor: tensor[:rows] if tensor.ndim else tensor)
    )
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 else args


class _Seeded(Dataset[Any]):
    """A dataset whose random transforms depend on (seed, epoch, index) alone.

    It is asked for (epoch, index), so that workers that outlive an epoch know which one it is.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch: int | None = None

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        if epoch != self.epoch and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.epoch = epoch
        seed_all(derive(self.seed, "sample", epoch, index))
        return self.dataset[index]


class _Order:
    """The batches of the current epoch, as a loader that lives on asks for them."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Batches:
    """A source of batches.

    Attributes:
        source: a dataset (``__len__`` and ``__getitem__``), or an iterable of batches such as a
            DataLoader; a loader's own batch size, order and workers are kept.
        batch_size: samples of a global batch, for datasets.
        seed: of the order and of random transforms.
        train: shuffle, and drop the last batch where it is smaller than the others.
        workers: processes that load, for datasets.
        rank: number of this process. world: how many there are.
    """

    source: Any
    batch_size: int
    seed: int
    train: bool = True
    workers: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Refuse a source that gives no batches, or batches that cannot be shared out."""
        if not self.is_dataset and not isinstance(self.source, Iterable):
            kind = type(self.source).__name__
            raise InputError(f"data must be a dataset or an iterable of batches, got {kind}")
        if isinstance(self.source, IterableDataset):
            raise InputError("an IterableDataset gives samples; wrap it in a DataLoader")
        if self.is_dataset and len(self.source) == 0:
            raise InputError("the dataset is empty")
        if self.is_dataset and self.batch_size % self.world:
            text = f"batch_size={self.batch_size} cannot be shared by {self.world} processes"
            raise InputError(f"{text}; make it a multiple of {self.world}")

    @property
    def is_dataset(self) -> bool:
        """Whether single samples can be asked for by number."""
        if isinstance(self.source, DataLoader | list | tuple):
            return False
        return hasattr(self.source, "__getitem__") and hasattr(self.source, "__len__")

    @property
    def length(self) -> int | None:
        """Batches of one epoch, or None where the source does not know."""
        if self.is_dataset:
            return len(self._indices(0))
        return len(self.source) if hasattr(self.source, "__len__") else None

    def __len__(self) -> int:
        """Batches of one epoch.

        Raises:
            InputError: the source does not know its length.
        """
        length = self.length
        if length is not None:
            return length
        raise InputError("this loader has no length; say how long to train with steps=…")

    def _indices(self, epoch: int) -> list[list[int]]:
        """The samples of each of this process's batches."""
        count = len(self.source)
        # Samples that differ in size cannot be stacked: each process gets one at a time.
        width = self.world if getattr(self.source, "ragged", False) else self.batch_size
        order = list(range(count))
        if self.train:
            width = max(self.world, min(width, count - count % self.world))
            generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
            order = torch.randperm(count, generator=generator).tolist()
            order = order[: count - count % width]
        batches = [order[first : first + width] for first in range(0, len(order), width)]
        mine = [batch[self.rank :: self.world] for batch in batches]
        return [batch for batch in mine if batch]

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch, without the first ``skip``."""
        for _, batch in self.numbered(number, skip):
            yield batch

    def numbered(self, number: int, skip: int = 0) -> Iterator[tuple[list[int] | None, Any]]:
        """The same, each with the numbers of its samples; None where a loader does not say."""
        seed_all(derive(self.seed, "epoch", number))
        if not self.is_dataset:
            for batch in self._loaded(number, skip):
                yield None, batch
            return
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(number)
        order, loader = self._loader
        chosen = self._indices(number)[skip:]
        order.batches = [[(number, k) for k in batch] for batch in chosen]
        yield from zip(chosen, loader, strict=True)

    @cached_property
    def _loader(self) -> tuple[_Order, DataLoader[Any]]:
        """One loader for all epochs: its workers are started once and stay."""
        order = _Order()
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.source, self.seed),
            batch_sampler=order,
            num_workers=self.workers,
            pin_memory=torch.accelerator.is_available(),
            persistent_workers=self.workers > 0,
        )
        return order, loader

    def _loaded(self, number: int, skip: int) -> Iterator[Any]:
        """This process's share of each batch of a foreign loader."""
        sampler: Any = getattr(self.source, "sampler", None)
        for holder in (self.source, sampler, getattr(self.source, "batch_sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(derive(self.seed, "epoch", number))
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        shared = self.world == 1 or isinstance(sampler, DistributedSampler)
        batches, most = iter(self.source), 0
        for index in range(2**62):
            seed_all(derive(self.seed, "batch", number, index))
            try:
                batch = next(batches)
            except StopIteration:
                return
            if shared:
                if index >= skip:
                    yield batch
                continue
            rows = size(batch)
            most = max(most, rows)
            if index >= skip:
                yield self._share(batch, rows, most)

    def _share(self, batch: Any, rows: int, most: int) -> Any:
        """Equal parts of a batch for training; of one smaller than those before, what divides, or
        one sample for each process.
        """
        over = rows % self.world if self.train else 0
        if over and rows == most:
            text = f"a batch of {rows} samples cannot be shared by {self.world} processes"
            raise InputError(text)
        pick = slice(self.rank, rows - over, self.world)
        if over == rows:  # fewer than there are processes: some have the same one
            pick = slice(self.rank % rows, self.rank % rows + 1)
        return _mapped(batch, lambda tensor: tensor[pick] if tensor.ndim else tensor)
