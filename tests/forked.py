"""The program in processes of its own that need not import torch again: forks of a server that has it."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time

import ex2_main

context = multiprocessing.get_context("forkserver")
PRELOADED = "ex2.evaluation.evaluate ex2.report.metrics ex2.report.pictures ex2.training.run ex2.training.start".split()
context.set_forkserver_preload(["forked", *PRELOADED, "torch._dynamo"])  # which every optimiser imports


class Started:
    """A fork that runs `ex2_main.main(argv)`, or a script with arguments; in a process group of its own."""

    def __init__(self, *argv, script=None, prepare=None, pipe=False, **environment):
        folder = tempfile.mkdtemp()
        self.out, self.err = (os.path.join(folder, name) for name in ("out", "err"))
        if pipe:  # which is to be read, and removed, before the end
            os.mkfifo(self.out)
        self.process = context.Process(target=run, args=(argv, script, prepare, environment, self.out, self.err))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait_for(self, condition, timeout=60):
        """Waits until `condition()` is true."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None and time.monotonic() < deadline, read(self.out) + read(self.err)
            time.sleep(0.01)

    def wait_for_line(self, text):
        """Waits until a line of its output has `text`."""
        self.wait_for(lambda: text in read(self.out))

    def finish(self, timeout=120):
        """(exit code, output, errors) of a process that must end in time."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s\n{read(self.out)}{read(self.err)}")
        return self.process.exitcode, read(self.out), read(self.err)


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def run(argv, script, prepare, environment, out, err):
    """In the fork: as if Python had been started with these arguments."""
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=encoding, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        if script is None:
            code = ex2_main.main(list(argv))
        else:
            sys.argv = [str(script), *argv]
            runpy.run_path(str(script), run_name="__main__")
            code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_processes(count, *argv, local=None, **options):
    """`count` processes that find each other as under torchrun; `local` gives each its number on its machine."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    return [
        Started(*argv, RANK=str(rank), LOCAL_RANK=str(rank if local is None else local[rank]), **meeting, **options)
        for rank in range(count)
    ]


class Patch:
    """What `monkeypatch` is, in a process that ends anyway."""

    setattr = staticmethod(setattr)


def no_curves():
    """Runs leave empty files in place of their curves."""
    import tiny

    tiny.without_curves(Patch)


def training_only():
    """`train` ends after the training; few images."""
    import tiny

    from ex2.data import shapes

    tiny.without_evaluation(Patch)
    shapes.SHAPES_COUNT.update(train=300, test=60)


def under_torchrun():
    """Two processes do the same, as torchrun starts them and starts them again, but forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    training_only()
    meeting = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1}
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=3, start_method="fork", **meeting)
    launch = elastic_launch(config, ex2_main.main)
    ex2_main.main = lambda argv: max(launch(argv).values())


def training_on_files():
    """The same, with images that are read while it trains."""
    from ex2.data import load

    training_only()
    load.RESIDENT_LIMIT = 0
