"""Recording and replaying, with a stand-in for CUDA graphs; and trainings that are replayed against eager ones."""

import os
import signal

import pytest
import torch
from tiny import fit, tiny_config, tiny_splits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ex2.errors import Interrupted
from ex2.machine import cuda_graphs
from ex2.machine.cuda_graphs import WARMUP_CALLS, GraphReplay
from ex2.optimisation import build_optimizer
from ex2.settings.build import build_diffusion
from ex2.training import checkpoint, run
from ex2.training.run import Training

CPU = torch.device("cpu")


class CapturedGraph(TorchDispatchMode):
    """What a CUDA graph is, for the CPU: every operation with its tensors and its numbers, to be run again on them.

    As with a graph, tensors keep their places in memory, whatever came from Python is fixed, and recording leaves
    everything as it was.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for x in tree_flatten((args, kwargs))[0]:
                if isinstance(x, torch.Tensor):
                    self.before.setdefault(id(x), (x, x.clone()))
        outputs = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, outputs))
        return outputs

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, outputs in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_flatten(outputs)[0], tree_flatten(again)[0]):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record_on_cpu(function, inputs):
    captured = CapturedGraph()
    with torch.random.fork_rng([]), captured:
        outputs = function(*inputs)
    with torch.no_grad():
        for x, value in captured.before.values():
            x.copy_(value)
    return cuda_graphs.CapturedGraph(inputs, captured.replay, outputs)


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    monkeypatch.setattr(GraphReplay, "warm_up", lambda self, inputs: self.function(*inputs))


@pytest.fixture
def graphs(monkeypatch):
    """The stand-in in place of CUDA graphs, for trainings on the CPU; how often it was used."""
    count = {"recorded": 0, "replayed": 0}

    def capture(function, inputs, stream, pool):
        captured = record_on_cpu(function, inputs)
        count["recorded"] += 1
        replay = captured.replay

        def counted():
            count["replayed"] += 1
            replay()

        captured.replay = counted
        return captured

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(run, "uses_cuda_graphs", lambda config, device: True)
    return count


# ------------------------------------------------------------------ Replayed


class Accumulator:
    """A function with a state: adds its input, times a random factor, to a total."""

    def __init__(self):
        self.total, self.scale, self.calls = torch.zeros(3), torch.ones(()), 0

    def __call__(self, x):
        self.calls += 1
        self.total += x * self.scale * torch.rand(())
        return (self.total.sum(),)

    def state(self):
        return {"total": [self.total]}


def test_a_replayed_function_computes_what_the_eager_one_does(graphs):
    eager, recorded = Accumulator(), Accumulator()
    replayed, results = GraphReplay(recorded, recorded.state), ([], [])
    for step in range(12):
        x = torch.full((3,), float(step))
        for function, found in zip((lambda x: eager(x), replayed), results):
            torch.manual_seed(step)
            (eager if function is not replayed else recorded).scale.fill_(step % 3)
            found.append(function(x)[0].item())
    assert results[0] == results[1]
    assert torch.equal(eager.total, recorded.total)
    assert graphs == {"recorded": 1, "replayed": 12 - WARMUP_CALLS}
    assert recorded.calls == WARMUP_CALLS + 2  # once recorded, once to check the first replay


def test_outputs_are_not_overwritten_by_the_next_replay(graphs):
    replayed = GraphReplay(lambda x: (x + 1,))
    outputs = [replayed(torch.full((2,), float(i)))[0] for i in range(8)]
    assert [x[0].item() for x in outputs] == [float(i + 1) for i in range(8)]


def test_each_shape_that_comes_often_is_recorded(graphs):
    """Whether in a row, or as the last batch of every epoch."""
    replayed = GraphReplay(lambda x: (x.sum(),))
    for size in [4] * 5 + [3] + [4] * 5 + [2] * 6 + [3, 4, 3, 4, 3]:
        assert replayed(torch.ones(size))[0] == size
    assert graphs == {"recorded": 3, "replayed": (5 - WARMUP_CALLS) + 5 + (6 - WARMUP_CALLS) + 2 + 1}
    assert replayed.checked and set(replayed.calls.values()) == {WARMUP_CALLS}


def test_a_replay_that_computes_something_else_is_not_used(graphs, capsys):
    """A number that Python hands over is fixed in the recording: the check sees it, and the result is the eager one."""
    wrong = Accumulator()
    steps = iter(range(1, 100))
    replayed = GraphReplay(lambda x: wrong(x * 2.0 ** next(steps)), wrong.state, "the accumulator")
    right, exponent = Accumulator(), 0
    for step in range(8):
        exponent += 2 if step == WARMUP_CALLS else 1  # recording took a number too
        torch.manual_seed(step)
        expected = right(torch.ones(3) * 2.0**exponent)
        torch.manual_seed(step)
        assert torch.equal(replayed(torch.ones(3))[0], expected[0])
    assert torch.equal(wrong.total, right.total)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "the accumulator can't be replayed on this GPU (a replay computed" in said


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nand more"), torch.cuda.OutOfMemoryError("no memory")])
def test_what_cannot_be_recorded_goes_on_eagerly(monkeypatch, capsys, error):
    def fail(function, inputs, stream, pool):
        raise error

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    replayed = GraphReplay(lambda x: (x * 2,))
    for i in range(6):
        assert replayed(torch.tensor(i))[0] == 2 * i
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(error).splitlines()[0] in said


def test_a_full_memory_in_an_eager_call_is_the_callers_business(graphs):
    def hungry(x):
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        GraphReplay(hungry)(torch.ones(2))


def test_where_memory_is_too_small_for_a_recording_there_is_none(graphs, capsys):
    """The eager call fits alone, but not beside a recording: in the check of the first replay, and in another shape."""
    for fails in (WARMUP_CALLS + 2, WARMUP_CALLS + 3):
        function, right = Accumulator(), Accumulator()

        def hungry(x, function=function, fails=fails):
            outputs = function(x)
            if function.calls == fails:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return outputs

        replayed = GraphReplay(hungry, function.state)
        for step, size in enumerate([3] * (WARMUP_CALLS + 5)):
            torch.manual_seed(step)
            expected = right(torch.ones(size) * step)
            torch.manual_seed(step)
            assert torch.equal(replayed(torch.ones(size) * step)[0], expected[0])
        assert torch.equal(function.total, right.total)
    assert capsys.readouterr().out.count("(too little memory for both)") == 1  # the second never came to it


def test_a_step_whose_check_runs_out_of_memory_is_taken_once(monkeypatch):
    """After the eager call and the replay, both of which changed the state."""

    def capture(function, inputs, stream, pool):
        captured = record_on_cpu(function, inputs)
        replay = captured.replay

        def full():
            replay()
            raise torch.cuda.OutOfMemoryError("out of memory")

        captured.replay = full
        return captured

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    total = torch.zeros(3)
    replayed = GraphReplay(lambda x: (total.add_(x).sum(),), lambda: {"total": [total]})
    assert [replayed(torch.ones(3))[0].item() for _ in range(7)] == [3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0]
    assert replayed.failed


def test_of_many_shapes_the_first_ones_are_recorded_and_stay_so(graphs):
    """As by an evaluation, whose batches have many sizes, before the samples that take the time."""
    replayed = GraphReplay(lambda x: (x.sum(),))
    sizes = list(range(1, cuda_graphs.MAX_GRAPHS + 3))
    for size in sizes * 5:
        assert replayed(torch.ones(size))[0] == size
    assert graphs == {"recorded": cuda_graphs.MAX_GRAPHS, "replayed": cuda_graphs.MAX_GRAPHS * (5 - WARMUP_CALLS)}


# ------------------------------------------------------------------ training

needs_fused = pytest.mark.skipif(
    not build_optimizer(torch.nn.Linear(1, 1), 0.1).defaults["fused"],
    reason="before torch 2.4 the CPU's AdamW takes the learning rate as a number, which can't be replayed",
)


def assert_same_end(first, second):
    a, b = checkpoint.load_checkpoint(first.run_dir), checkpoint.load_checkpoint(second.run_dir)
    for content in (a, b):
        del content["config"], content["seconds"]
    assert checkpoint.digest_of(a) == checkpoint.digest_of(b)


HARD = {
    "dim_mults": (1, 2),
    "dropout": 0.2,
    "p_uncond": 0.3,
    "epochs": 5,
    "batch_size": 9,
    "warmup_steps": 5,
    "ema_images": 50.0,
    "amp": "off",
}


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The end of a training without replays, partial batches, dropped labels, dropout, flips, warm-up and EMA: of 40
    images in batches of 9."""
    config = tiny_config(tmp_path_factory.mktemp("eager"), **HARD)
    fit(config, tiny_splits(), build_diffusion(config, CPU))
    return config


@needs_fused
def test_replayed_steps_are_eager_ones_bit_for_bit(eager, tmp_path, graphs):
    replayed = tiny_config(tmp_path, **HARD)
    fit(replayed, tiny_splits(), build_diffusion(replayed, CPU))
    assert graphs == {"recorded": 2, "replayed": 5 * 5 - 2 * WARMUP_CALLS}  # the smaller last batch, too
    assert_same_end(replayed, eager)


@needs_fused
def test_a_replayed_training_that_is_cut_off_ends_as_if_it_had_not_been(eager, tmp_path, graphs, monkeypatch):
    cut, real = tiny_config(tmp_path, **HARD), Training.take_step
    parts = (cut, tiny_splits(), build_diffusion(cut, CPU))

    def interrupted(self, *batch):
        result = real(self, *batch)
        if self.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Training, "take_step", interrupted)
        with pytest.raises(Interrupted):
            fit(*parts)
    assert checkpoint.load_checkpoint(cut.run_dir)["step"] == 12
    assert graphs["recorded"] == 1 and graphs["replayed"] > 0
    fit(*parts)
    assert_same_end(eager, cut)


def test_learning_rates_are_numbers_in_checkpoints(tmp_path, diffusor, graphs):
    config = tiny_config(tmp_path)
    fit(config, tiny_splits(), diffusor)
    group = checkpoint.load_checkpoint(config.run_dir)["optimizer"]["param_groups"][0]
    assert isinstance(group["lr"], float)
