"""The network in inference: CUDA graph replay, and smaller batches after running out of memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ex2.machine.cuda_graphs import GraphReplay, free_memory


class InferenceModel:
    """The noise predictor `model` in inference. On a GPU it replays CUDA graphs, and splits batches that don't fit.

    amp: compute in bfloat16; for sampling only, losses stay in float32.
    """

    def __init__(self, model, amp: bool = False):
        self.model = model
        self.largest = None  # images per call; None while all have fitted
        self.predict = partial(predict, model, amp)
        self.replayed = GraphReplay(self.predict, what="the network call")

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Takes the model's arguments; each has one entry per image."""
        call = self.replayed if x.device.type == "cuda" else self.predict
        while True:
            size = self.largest or len(x)
            parts = zip(*(argument.split(size) for argument in (x, *conditions)))
            try:
                return torch.cat([call(*part)[0] for part in parts])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                self.largest = (min(size, len(x)) + 1) // 2
            free_memory()  # after the except block, which kept the failed call's tensors alive
            print(f"the GPU's memory is full: going on with {self.largest} images per network call")


@torch.no_grad()
def predict(model, amp: bool, x: Tensor, *conditions: Tensor) -> tuple[Tensor]:
    """A single call of the network, in bfloat16 where `amp` says so."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return (model(x, *conditions).float(),)
