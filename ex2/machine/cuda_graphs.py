"""On a GPU, many small operations as one launch: what repeats is captured once as a CUDA graph, and then replayed.

A training step of the U-Net has some 3,000 operations. To start them one by one, Python takes three times as long as
the GPU takes to compute them. A replay computes the same, and a CPU does without it.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

WARMUP_CALLS = 3  # eager calls with equal shapes before the capture: in them libraries choose their algorithms
MAX_GRAPHS = 8  # CUDA graphs of one function, each for other shapes; calls of yet other shapes are eager
TOLERANCE = 0.1  # of a change, between a replay and the eager call: far above rounding in bfloat16, far below a fault


@dataclass
class CapturedGraph:
    """The CUDA graph for inputs of certain shapes: `replay` reads `inputs` and writes `outputs`, in place."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]
    checked: bool = False


def capture(function: Callable[..., tuple], inputs: list[Tensor], stream, pool) -> CapturedGraph:
    """What `function(*inputs)` does, as a CUDA graph, without doing it yet.

    Numbers that the function takes from Python are fixed, so what changes from call to call has to be in a tensor.
    Random numbers follow torch's generator. Graphs of one `pool` share its memory: they are replayed one by one.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = function(*inputs)
    except RuntimeError:
        torch.cuda.set_stream(current)
        del graph
        end_capture(torch.cuda.default_generators[torch.cuda.current_device()])
        raise
    return CapturedGraph(inputs, graph.replay, outputs)


def end_capture(generator: torch.Generator) -> None:
    """After a failed capture torch's generator still believes it is captured, and refuses to draw. This ends it."""
    if hasattr(generator, "graphsafe_set_state"):
        generator.graphsafe_set_state(generator.clone_state())
        return
    graph = torch.cuda.CUDAGraph()  # before torch 2.5 a capture that works ends it
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        torch.zeros((), device=generator.device)
        graph.capture_end()


def free_memory() -> None:
    """Returns unused memory to the GPU. After a failed capture, torch before 2.13 can't; then nothing happens."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


class GraphReplay:
    """Calls `function` eagerly at first, then replays it; each first replay is checked against the eager call.

    Each shape that comes `WARMUP_CALLS` times is captured. Where memory is too small for that beside the eager call,
    nothing is.

    Args:
        function: (tensors) -> tuple of tensors.
        state: () -> what the function changes, name -> list of tensors.
        what: its name, for the line that says why it can't be replayed.
    """

    def __init__(self, function: Callable[..., tuple], state: Callable[[], dict[str, list[Tensor]]] = dict, what="it"):
        self.function, self.state, self.what = function, state, what
        self.calls, self.graphs = Counter(), {}  # by shapes
        self.stream = self.pool = None
        self.failed = False

    @property
    def checked(self) -> bool:
        """Whether there are CUDA graphs, and each computes what the eager call does."""
        return bool(self.graphs) and all(captured.checked for captured in self.graphs.values())

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        try:
            return self.call(inputs)
        except torch.cuda.OutOfMemoryError:
            if not self.graphs:  # it doesn't fit without a graph either
                raise
        self.give_up("too little memory for both")  # after the block, which kept the failed call's tensors alive
        free_memory()
        return self.function(*inputs)

    def call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        captured = self.graphs.get(shapes)
        if captured is None:
            if self.failed or len(self.graphs) == MAX_GRAPHS:
                return self.function(*inputs)
            outputs = self.warm_up(inputs)
            self.calls[shapes] += 1
            if self.calls[shapes] == WARMUP_CALLS:
                self.start(shapes, inputs, outputs[0].device)
            return outputs
        for static, x in zip(captured.inputs, inputs):
            static.copy_(x, non_blocking=True)
        if not captured.checked:
            return self.check(captured, inputs)
        captured.replay()
        return tuple(x.clone() for x in captured.outputs)

    def warm_up(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """An eager call on a stream of its own, as CUDA asks for before a capture."""
        if self.stream is None:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def start(self, shapes: tuple, inputs: tuple[Tensor, ...], device: torch.device) -> None:
        """Captures the function; from the next call with these shapes on it is replayed."""
        try:
            static = [x.to(device, copy=True) for x in inputs]
            self.graphs[shapes] = capture(self.function, static, self.stream, self.pool)
        except RuntimeError as error:  # an operation that can't be captured, or too little memory for it
            self.give_up(str(error).splitlines()[0])

    def check(self, captured: CapturedGraph, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first replay: outputs, and how the state changes, compared with the eager call from the same state."""
        state = self.state()
        before = copies(state)
        devices = [captured.inputs[0].device] if captured.inputs[0].device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                outputs = tuple(x.clone() for x in self.function(*inputs))
            wanted = copies(state)
            restore(state, before)
            captured.replay()
            changes = [([x], [y], [torch.zeros_like(y)]) for x, y in zip(captured.outputs, outputs)]
            changes += [(part, wanted[name], before[name]) for name, part in state.items()]
            off = any(distance(now, eager) > TOLERANCE * distance(eager, old) for now, eager, old in changes)
        except torch.cuda.OutOfMemoryError:
            restore(state, before)
            raise
        if off:
            restore(state, wanted)
            self.give_up("a replay computed something else")
            return outputs
        captured.checked = True
        free_memory()  # that of the eager call
        return tuple(x.clone() for x in captured.outputs)

    def give_up(self, reason: str) -> None:
        """From now on every call is eager."""
        self.failed, self.graphs = True, {}
        print(f"{self.what} can't be replayed on this GPU ({reason}): going on operation by operation, which is slower")


@torch.no_grad()
def distance(tensors: list[Tensor], others: list[Tensor]) -> float:
    """Euclidean distance of two lists of tensors; infinite instead of NaN."""
    squares = sum((x.double() - y.double()).square().sum() for x, y in zip(tensors, others))
    return float(torch.as_tensor(squares).nan_to_num(nan=float("inf"), posinf=float("inf")).sqrt())


def copies(state: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The tensors of a state, as they are now."""
    return {name: [x.clone() for x in part] for name, part in state.items()}


@torch.no_grad()
def restore(state: dict[str, list[Tensor]], saved: dict[str, list[Tensor]]) -> None:
    """Gives the tensors of a state their earlier values, in place."""
    for name, part in state.items():
        for x, value in zip(part, saved[name]):
            x.copy_(value)
