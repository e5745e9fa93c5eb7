"""The frozen encoder one step ahead: the next batch is encoded on a stream of its own while a step trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """A batch with its latents."""

    batch: Any
    latents: Tensor
    ready: torch.cuda.Event | None
    """On a GPU: after it the latents are there."""


class EncodeAhead:
    """An iterator of batches -> an iterator of `Encoded`, each encoded when its predecessor is handed out.

    On a CPU, which has no streams, the order of the work is the same and nothing is gained. The latents are those that
    `encode` gives, whenever it is called: the encoder is frozen.

    Args:
        loader: yields batches with `clip_e`; its `name` and `close` are passed on.
        encode: clips uint8 (B, T, 64, 64) -> latents (B, 4, T, 8, 8).
        device: of the batches.
    """

    def __init__(self, loader: Any, encode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._loader, self._batches, self._encode = loader, iter(loader), encode
        self.name = f"{loader.name}, encoded ahead"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Encoded | None = None
        self._failure: Exception | None = None
        """Of the loader (StopIteration is one): raised when the step is due that it belongs to."""

    def __iter__(self) -> Iterator[Encoded]:
        return self

    def __next__(self) -> Encoded:
        if self._failure is not None:
            raise self._failure
        due = self._next or self._start(next(self._batches))
        if due.ready is not None:
            torch.cuda.current_stream().wait_event(due.ready)
            due.latents.record_stream(torch.cuda.current_stream())
        try:
            self._next = self._start(next(self._batches))
        except Exception as error:  # of the step after this one, which must not suffer from it
            self._next, self._failure = None, error
        return due

    def _start(self, batch: Any) -> Encoded:
        if self._stream is None:
            return Encoded(batch, self._encode(batch.clip_e), None)
        self._stream.wait_stream(torch.cuda.current_stream())  # the loader's copies are waited for there
        with torch.cuda.stream(self._stream):
            latents = self._encode(batch.clip_e)
            batch.clip_e.record_stream(self._stream)
            ready = torch.cuda.Event()
            ready.record()
        return Encoded(batch, latents, ready)

    def close(self) -> None:
        self._loader.close()
