"""On a GPU, many small operations as one launch: what repeats is recorded once as a CUDA graph, and then replayed.

A training step of the U-Net has some 3,000 operations. To start them one by one, Python takes three times as long as
the GPU takes to compute them. A replay computes the same, and a CPU does without it.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

WARM_UP = 3  # eager calls with equal shapes before the recording: in them libraries choose their algorithms
MOST = 4  # recordings: where shapes take turns, one of them stays recorded, and the others are called eagerly
TOLERANCE = 0.1  # of a change, between a replay and the eager call: far above rounding in bfloat16, far below a fault


def record(function: Callable[..., tuple], inputs: list[Tensor]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """(replay, outputs): what `function(*inputs)` does, as a CUDA graph, without doing it yet.

    Every replay reads `inputs` and writes `outputs` in place. Numbers that the function takes from Python are fixed, so
    what changes from call to call has to be in a tensor. Random numbers follow torch's generator.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            outputs = function(*inputs)
    except RuntimeError:
        torch.cuda.set_stream(stream)
        del graph
        end_recording(torch.cuda.default_generators[torch.cuda.current_device()])
        raise
    return graph.replay, outputs


def end_recording(generator: torch.Generator) -> None:
    """After a recording that failed, torch's generator still takes itself for recorded, and would not draw any more."""
    if hasattr(generator, "graphsafe_set_state"):
        generator.graphsafe_set_state(generator.clone_state())
    else:  # before torch 2.5 a recording that works ends it
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros((), device=generator.device)


class Replayed:
    """Calls `function` eagerly at first, then replays it; the first replay is checked against the eager call.

    A call whose shapes are not the recorded ones is eager, and recorded anew once it repeats. Where memory is too small
    for a recording beside the eager call, there is none.

    Args:
        function: (tensors) -> tuple of tensors.
        state: () -> what the function changes, name -> list of tensors.
        what: its name, for the line that says why it can't be replayed.
    """

    def __init__(self, function: Callable[..., tuple], state: Callable[[], dict[str, list[Tensor]]] = dict, what="it"):
        self.function, self.state, self.what = function, state, what
        self.shapes, self.calls = None, 0  # of the latest calls, and how many in a row had them
        self.recorded = None  # the shapes of what is recorded
        self.recordings, self.stream = 0, None
        self.checked = self.failed = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        try:
            return self.call(inputs)
        except torch.cuda.OutOfMemoryError:
            if self.recorded is None:  # it doesn't fit without a recording either
                raise
        self.give_up("too little memory for both")  # after the block, which kept the failed call's tensors alive
        torch.cuda.empty_cache()
        return self.function(*inputs)

    def call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes = [(x.shape, x.dtype) for x in inputs]
        self.calls = self.calls + 1 if shapes == self.shapes else 1
        self.shapes = shapes
        if shapes != self.recorded:
            if self.failed or self.recordings == MOST:
                return self.function(*inputs)
            outputs = self.warm_up(inputs)
            if self.calls == WARM_UP:
                self.start(inputs, outputs[0].device)
            return outputs
        for static, x in zip(self.inputs, inputs):
            static.copy_(x, non_blocking=True)
        if not self.checked:
            return self.check(inputs)
        self.replay()
        return tuple(x.clone() for x in self.outputs)

    def warm_up(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """An eager call on a stream of its own, as CUDA asks for before a recording."""
        if not torch.cuda.is_available():  # what stands in for a GPU in tests
            return self.function(*inputs)
        self.stream = self.stream or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def start(self, inputs: tuple[Tensor, ...], device: torch.device) -> None:
        """Records the function; from the next call with these shapes on it is replayed."""
        self.recorded = self.replay = self.outputs = None  # frees the memory of an earlier recording
        try:
            self.recordings += 1
            self.inputs = [x.to(device, copy=True) for x in inputs]
            self.replay, self.outputs = record(self.function, self.inputs)
            self.recorded, self.checked = self.shapes, False
        except RuntimeError as error:  # an operation that can't be recorded, or too little memory for it
            self.give_up(str(error).splitlines()[0])

    def check(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first replay: outputs, and how the state changes, compared with the eager call from the same state."""
        state = self.state()
        before = {name: [x.clone() for x in part] for name, part in state.items()}
        devices = [self.inputs[0].device] if self.inputs[0].device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                outputs = tuple(x.clone() for x in self.function(*inputs))
        except torch.cuda.OutOfMemoryError:
            restore(state, before)
            raise
        wanted = {name: [x.clone() for x in part] for name, part in state.items()}
        restore(state, before)
        self.replay()
        off = [distance([x], [y]) > TOLERANCE * distance([y]) for x, y in zip(self.outputs, outputs)]
        for name, part in state.items():
            off.append(distance(part, wanted[name]) > TOLERANCE * distance(wanted[name], before[name]))
        if any(off):
            restore(state, wanted)
            self.give_up("a replay computed something else")
            return outputs
        self.checked = True
        return tuple(x.clone() for x in self.outputs)

    def give_up(self, reason: str) -> None:
        """From now on every call is eager."""
        self.failed, self.recorded, self.replay, self.outputs, self.inputs = True, None, None, None, None
        print(f"{self.what} can't be replayed on this GPU ({reason}): going on operation by operation, which is slower")


@torch.no_grad()
def distance(tensors: list[Tensor], others: list[Tensor] | None = None) -> float:
    """Euclidean distance of two lists of tensors, of a list to zero where there is one; infinite where it is NaN."""
    others = [torch.zeros_like(x) for x in tensors] if others is None else others
    squares = sum((x.double() - y.double()).square().sum() for x, y in zip(tensors, others))
    return float(torch.as_tensor(squares).nan_to_num(nan=float("inf"), posinf=float("inf")).sqrt())


@torch.no_grad()
def restore(state: dict[str, list[Tensor]], saved: dict[str, list[Tensor]]) -> None:
    """Gives the tensors of a state their earlier values, in place."""
    for name, part in state.items():
        for x, value in zip(part, saved[name]):
            x.copy_(value)
