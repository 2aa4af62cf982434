"""What a teacher says: computed without gradients, or read from what it said before.

A cache keeps the logits of every sample by its number, with a hash of the sample as the network saw
it: a sample that is not the same any more is an error, never a wrong answer. What is in it was said
by the same weights in the same precision, or it is another cache.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd.distill.batches import Batches, tensors, unpack
from cpd.distill.checkpoint import read, write
from cpd.distill.seeds import derive, isolated, seed_all
from cpd.errors import ArtefactError, InputError
from cpd.files import swept

__all__ = ["Sample", "Teacher", "digest", "samples"]

PROBES, EPOCHS = 8, 4
"""Samples read to see whether transforms are random, and in how many epochs: one that is random
with a probability of a half is missed once in 2 ** 24."""


@dataclass(frozen=True)
class Sample:
    """A sample's number in its dataset, and a hash of what the network gets of it."""

    number: int
    mark: bytes


class Teacher:
    """A frozen network in evaluation mode, asked for logits and for what losses look at inside."""

    def __init__(
        self,
        network: nn.Module,
        task: Any,
        *,
        device: torch.device,
        precision: str | None = None,
        cache: str | Path | None = None,
        rank: int = 0,
    ) -> None:
        """``precision``: "bf16" (autocast), "no", or None for that of the student.

        ``cache``: a folder; it may serve several teachers and runs. ``rank``: of this process.

        Raises:
            ArtefactError: a file of the cache is damaged or foreign.
        """
        self.network = network.to(device).eval().requires_grad_(False)
        self.task, self.device, self.precision = task, device, precision
        self.folder: Path | None = None
        self.said: dict[int, tuple[bytes, torch.Tensor]] = {}
        self.fresh: list[int] = []
        self.calls = 0
        self.rank = rank
        if cache is not None:
            self.folder = Path(cache) / self._fingerprint()
            if rank == 0:
                swept(self.folder, shared=True)
            self._load(self.folder)

    def _fingerprint(self) -> str:
        """The network, how it computes, and by what."""
        plain = {k: v for k, v in vars(self.task).items() if isinstance(v, str | int | float)}
        task = f"{type(self.task).__name__} {sorted(plain.items())}"
        how = (self.precision or "no", self.device.type, torch.__version__, task)
        text = "/".join((digest(self.network), *how))
        return f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def logits(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], asked: Sequence[Sample] = ()
    ) -> torch.Tensor:
        """The logits of a batch, one row a sample.

        ``asked``: which samples these are, where there is a cache. It answers for a batch that it
        knows all of; any other batch is computed as a whole, as it would be without a cache.

        Raises:
            InputError: a sample is not what it was when it was kept.
        """
        if self.folder is None:
            return self._computed(args, kwargs)
        known = [self.said.get(sample.number) for sample in asked]
        for sample, held in zip(asked, known, strict=True):
            if held is not None and held[0] != sample.mark:
                raise InputError(
                    f"sample {sample.number} is not what it was when the teacher's answer was kept "
                    f"in {self.folder}: it is changed at random, or the data is other data. Take "
                    "teacher_cache away, or give it another folder"
                )
        rows = [held[1] for held in known if held is not None]
        if rows and len(rows) == len(known):
            return torch.stack(rows).to(self.device)
        found = self._computed(args, kwargs)
        if found.shape[:1] != (len(asked),):
            raise InputError(
                f"the teacher's logits have shape {tuple(found.shape)} for {len(asked)} samples; "
                "a cache needs one row a sample. Take teacher_cache away"
            )
        for sample, row in zip(asked, found.to("cpu", copy=True), strict=True):
            if sample.number not in self.said:
                self.fresh.append(sample.number)
                self.said[sample.number] = (sample.mark, row)
        return found

    def _computed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        self.calls += 1
        # Not inference mode: the gradients of losses keep what the teacher said.
        with torch.no_grad(), self._autocast():
            found: torch.Tensor = self.task.logits(self.network(*args, **kwargs))
        return found.contiguous()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    # --- on the disk

    def check(self, batches: Batches, points: Sequence[str]) -> None:
        """Refuse what a cache cannot serve, before anything is trained.

        Raises:
            InputError: losses look inside the teacher, the data is a loader, which does not say
                which samples it gives, or samples are changed at random.
        """
        if self.folder is None:
            return
        if points:
            raise InputError(
                f"teacher_cache keeps logits; losses that look inside the teacher "
                f"({', '.join(points)}) need it to run. Take teacher_cache away"
            )
        if not batches.is_dataset:
            raise InputError(
                "teacher_cache needs a dataset whose samples have numbers, not a loader of batches"
            )
        for number in _changing(batches):
            raise InputError(
                f"teacher_cache needs samples that stay the same, and sample {number} of the "
                "training data is changed at random: turn its transforms off, or take "
                "teacher_cache away"
            )

    def save(self) -> None:
        """Keep what was said since the last call, in a file that appears whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        if self.folder is None or not self.fresh:
            return
        marks = [
            torch.frombuffer(bytearray(self.said[k][0]), dtype=torch.uint8) for k in self.fresh
        ]
        logits = torch.stack([self.said[k][1] for k in self.fresh])
        paths = (self.folder / f"{self.rank}-{k}.safetensors" for k in itertools.count())
        free = next(path for path in paths if not path.exists())
        value = {"number": torch.tensor(self.fresh), "mark": torch.stack(marks), "logits": logits}
        write(free, value)
        self.fresh = []

    def _load(self, folder: Path) -> None:
        for path in sorted(folder.glob("*.safetensors")):
            found = read(path)
            try:
                numbers, marks, logits = (found[key] for key in ("number", "mark", "logits"))
                rows = zip(numbers.tolist(), marks.tolist(), logits, strict=True)
                self.said |= {number: (bytes(mark), row) for number, mark, row in rows}
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise ArtefactError(
                    f"{path} holds no answers of a teacher ({error}): take the file away"
                ) from error


def samples(numbers: Sequence[int] | None, batch: Any) -> list[Sample]:
    """The samples of a batch, on the CPU as it comes from its loader."""
    if numbers is None:
        return []
    args, kwargs, _ = unpack(batch)
    held = list(tensors((args, kwargs)))
    return [
        Sample(number, _mark(tensor[row] for tensor in held)) for row, number in enumerate(numbers)
    ]


def _mark(held: Iterator[torch.Tensor]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for tensor in held:
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(raw.view(torch.uint8).numpy().data)
    return found.digest()


def _changing(batches: Batches) -> Iterator[int]:
    """Numbers of samples that are other ones in another epoch."""
    data = batches.source
    count = len(data)
    chosen = sorted({k * count // PROBES for k in range(PROBES)})
    with isolated(batches.seed):
        seen: dict[int, set[bytes]] = {number: set() for number in chosen}
        for epoch in range(EPOCHS):
            if hasattr(data, "set_epoch"):
                data.set_epoch(epoch)
            for number in chosen:
                seed_all(derive(batches.seed, "sample", epoch, number))
                args, kwargs, _ = unpack(data[number])
                seen[number].add(_mark(tensors((args, kwargs))))
    yield from (number for number, marks in seen.items() if len(marks) > 1)


def digest(model: nn.Module) -> str:
    """A hash of a network's class, and of the names, shapes and values of its tensors."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(raw.numpy().tobytes())
    return found.hexdigest()
