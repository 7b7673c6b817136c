"""Nothing is lost on a shared machine: resuming anywhere, checkpoints, signals, locks, memory."""

import csv
import io
import os
import signal
import socket
import subprocess
import sys
import time

import forked
import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from forked import Started
from PIL import Image
from tiny import ROOT, TINY, random_set, tiny_config, train_epoch, without_evaluation

import ex2_main
from ex2.data import shapes
from ex2.data.loader import make_loader
from ex2.errors import InputError, Interrupted, RunError
from ex2.machine import job
from ex2.machine.inference import InferenceModel
from ex2.machine.job import batch_that_fits, check_space, hold_signals, lock_folder
from ex2.meter import LossMeter
from ex2.settings.build import build_diffusion
from ex2.training import checkpoint, run
from ex2_train import train_step

RUN = [*TINY, "--epochs", "2", "--class_free_guidance", "--log_interval", "2"]
STEPS = 6  # two epochs of 100, 100 and 70 images
ENDING = [number for number in job.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores some


@pytest.fixture(scope="module", autouse=True)
def training_only(small_shapes):
    """Few images, no pictures, no evaluation."""
    shapes.SHAPES_COUNT.update(train=300, test=60)  # the dict that `small_shapes` takes away again
    with pytest.MonkeyPatch.context() as patch:
        without_evaluation(patch)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory, training_only):
    """The folder of a run that nothing interrupted."""
    results = tmp_path_factory.mktemp("straight")
    assert ex2_main.main([*RUN, "--results_dir", str(results)]) == 0
    return results / "DDPM"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(60):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / "ab"[i % 2] / f"{i}.png")
    return root


def log_of(folder):
    """log.csv without what a clock measured."""
    with open(folder / "log.csv", newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_run(folder, other):
    """Both runs ended with the same weights, average, moments, learning rate, random state and log, bit by bit."""
    first, second = checkpoint.load_checkpoint(folder), checkpoint.load_checkpoint(other)
    for content in (first, second):
        del content["config"], content["seconds"]  # hold the folder, and what a clock measured
    assert checkpoint.digest_of(first) == checkpoint.digest_of(second)
    assert log_of(folder) == log_of(other)


def assert_free(folder):
    """No process holds the folder, and none says so."""
    assert not (folder / ".holder").exists()
    with FileLock(folder / ".lock", timeout=0):
        pass


def interrupted_after(steps, number=signal.SIGTERM):
    """A `train_step` that sends the process a signal while it is in optimiser step number `steps` of the program."""
    done = []

    def step(*args, **options):
        figures = train_step(*args, **options)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)
        return figures

    return step


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("cut", [1, 2, 3, 6])  # at first, at the end of a window, of an epoch, and of all
def test_cut_after_any_step_and_resumed_it_is_the_uninterrupted_run(straight, tmp_path, monkeypatch, cut, capsys):
    command = [*RUN, "--results_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_step", interrupted_after(cut))
        assert ex2_main.main(command) == 143
    assert "interrupted by SIGTERM" in capsys.readouterr().err
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["step"] == cut
    assert ex2_main.main(command) == 0
    assert f"{cut} of {STEPS} steps" in capsys.readouterr().out
    assert_same_run(straight, tmp_path / "DDPM")


def test_interrupted_in_validation_it_validates_again(straight, tmp_path, monkeypatch):
    command = [*RUN, "--results_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "test", lambda *args: os.kill(os.getpid(), signal.SIGUSR1))
        assert ex2_main.main(command) == 128 + signal.SIGUSR1
    saved = checkpoint.load_checkpoint(tmp_path / "DDPM")
    assert (saved["epoch"], saved["step"]) == (0, 3)
    assert ex2_main.main(command) == 0
    assert_same_run(straight, tmp_path / "DDPM")


def test_checkpoints_within_an_epoch_are_resumed_too(straight, tmp_path, monkeypatch):
    """A kill that no handler sees: what was written last is gone on with."""
    command = [*RUN, "--results_dir", str(tmp_path), "--save_minutes", "1e-9"]
    real_save, saves = run.Training.save, []

    def save(self):
        real_save(self)
        saves.append(self.step)
        if self.step == 5:
            raise KeyError("as good as a kill: nothing handles it")

    with monkeypatch.context() as patch:
        patch.setattr(run.Training, "save", save)
        with pytest.raises(KeyError):
            ex2_main.main(command)
    assert saves == [0, 1, 2, 3, 3, 4, 5]  # at the start, after each step, at the end of the epoch
    assert ex2_main.main(command) == 0
    assert_same_run(straight, tmp_path / "DDPM")


def test_resume_insists_and_no_resume_starts_anew(tmp_path, capsys):
    command = [*RUN, "--results_dir", str(tmp_path), "--epochs", "1"]
    assert ex2_main.main([*command, "--resume"]) == 2
    assert "--resume: no checkpoint in" in capsys.readouterr().err
    assert ex2_main.main(command) == 0
    assert ex2_main.main([*command, "--resume"]) == 0
    assert "3 of 3 steps (1 of 1 epochs) are done" in capsys.readouterr().out
    assert ex2_main.main([*command, "--no_resume"]) == 0
    assert "are done" not in capsys.readouterr().out


def test_other_settings_are_refused_and_can_be_insisted_on(tmp_path, capsys):
    command = [*RUN, "--results_dir", str(tmp_path), "--epochs", "1"]
    assert ex2_main.main(command) == 0
    longer = [*RUN, "--results_dir", str(tmp_path), "--epochs", "3", "--lr", "0.0005", "--adam_beta1", "0.5"]
    assert ex2_main.main(longer) == 2
    error = capsys.readouterr().err
    assert "--epochs 1 there, 3 now" in error and "--lr 0.001 there, 0.0005 now" in error and "--allow_changes" in error
    assert ex2_main.main([*longer, "--allow_changes"]) == 0
    steps = [int(row["step"]) for row in log_of(tmp_path / "DDPM")]
    assert steps == sorted(steps) and steps[-1] == 9
    rates = [float(row["lr"]) for row in log_of(tmp_path / "DDPM") if row["lr"]]
    assert max(rates[2:]) <= 0.0005 and rates[-1] < 1e-4  # the decay is that of the new plan
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.999)
    assert ex2_main.main([*longer, "--dim", "16", "--allow_changes"]) == 2
    assert "don't fit the model's settings" in capsys.readouterr().err


def test_a_finished_run_keeps_one_checkpoint(straight):
    assert [path.name for path in straight.glob("ckpt.pt*")] == ["ckpt.pt"]
    assert_free(straight)


def test_too_little_room_is_said_before_training(tmp_path, monkeypatch, capsys):
    usage = job.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert ex2_main.main([*RUN, "--results_dir", str(tmp_path)]) == 2
    assert "the disk has 1 MB left" in capsys.readouterr().err
    assert ex2_main.main([*RUN, "--results_dir", str(tmp_path), "--no_save_model"]) == 0
    with pytest.raises(InputError, match="needs about 5000 MB"):
        check_space(tmp_path, 5 * 10**9)


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", ENDING)
def test_signals_end_evaluation_and_sampling_with_their_exit_code(monkeypatch, capsys, number):
    monkeypatch.setitem(ex2_main.COMMANDS, "sample", lambda args: os.kill(os.getpid(), number))
    before = [signal.getsignal(n) for n in job.SIGNALS]
    assert ex2_main.main(["sample", "--checkpoint", "x"]) == 128 + number
    assert f"interrupted by {signal.Signals(number).name}" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in job.SIGNALS] == before


@pytest.mark.skipif(signal.SIGINT not in ENDING, reason="in the background of a shell")
def test_a_signal_waits_for_the_step_and_a_second_one_does_not():
    with hold_signals() as waiting:
        os.kill(os.getpid(), signal.SIGTERM)
        assert waiting == [signal.SIGTERM]
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_terminated_process_says_how_to_go_on(tmp_path):
    long = [*RUN, "--results_dir", str(tmp_path), "--epochs", "500", "--log_interval", "1"]
    process = Started(*long, prepare=forked.training_only)
    process.wait_for_line("step 3/")
    os.kill(process.pid, signal.SIGTERM)
    code, _, error = process.finish()
    assert code == 143
    assert error.splitlines()[-1].startswith("interrupted by SIGTERM; a training that was going on is saved")
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["step"] >= 3
    assert_free(tmp_path / "DDPM")


# ------------------------------------------------------------------ locks


def test_a_second_run_in_the_folder_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "WORKER_EXIT_SECONDS", 0)
    folder = tmp_path / "DDPM"
    folder.mkdir()
    with lock_folder(folder):
        assert ex2_main.main([*RUN, "--results_dir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"process {os.getpid()} on {socket.gethostname()} works in {folder}" in error
    assert not folder.exists()  # nothing came of it


HOLD = """
import sys, time, pathlib
from ex2.machine.job import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_process_that_is_gone_is_free(tmp_path, monkeypatch):
    """Killed, so that it could not remove anything; what it left beside the lock does not matter either."""
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    holder = Started(str(tmp_path), script=script)
    holder.wait_for_line("locked")
    monkeypatch.setattr(job, "WORKER_EXIT_SECONDS", 0)
    with pytest.raises(InputError, match=f"process {holder.pid} on .* works in"), lock_folder(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.process.join()
    with lock_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".holder").read_text()
    assert_free(tmp_path)


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available"), "waits"])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys, error):
    """Older versions of filelock wait for such a lock as if another process had it, but then nobody says so."""

    def acquire(self, timeout):
        raise Timeout(self.lock_file) if error == "waits" else error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with lock_folder(tmp_path):
        pass
    assert "can't be locked: nothing keeps a second run out" in capsys.readouterr().out


# ------------------------------------------------------------------ numbers


def test_a_checkpoint_is_not_written_over_with_a_loss_that_is_not_finite():
    meter = LossMeter(0)
    meter.add(torch.tensor(1.0), torch.tensor(1.0), 4)
    meter.state_dict(0.1)
    meter.add(torch.tensor(float("nan")), torch.tensor(1.0), 4)
    with pytest.raises(RunError, match="step 2 of epoch 1"):
        meter.state_dict(0.1)


def test_sampling_that_diverges_is_an_error(cosine):
    def model(x, t):
        return torch.full_like(x, float("nan")) if int(t[0]) == 500 else x

    with pytest.raises(FloatingPointError, match="not finite"):
        cosine.sample(model, 4, 2, steps=1000)


# ------------------------------------------------------------------ devices and memory


class Hungry:
    """A model for whose memory more than `fits` images are too many."""

    null_class = 7

    def __init__(self, fits):
        self.fits, self.sizes = fits, []

    def __call__(self, x, t, *labels):
        self.sizes.append(len(x))
        if len(x) > self.fits:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return x * t.reshape(-1, 1, 1, 1) + sum(label.reshape(-1, 1, 1, 1) for label in labels)


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("labels", [True, False])
def test_batches_that_do_not_fit_are_split_and_give_the_same(no_cache, capsys, labels):
    x, t = torch.randn(50, 3, 2, 2), torch.arange(50)
    arguments = (x, t, torch.arange(50) % 3) if labels else (x, t)
    model = InferenceModel(Hungry(7))
    assert torch.equal(model(*arguments), Hungry(100)(*arguments))
    assert model.model.sizes[:4] == [50, 25, 13, 7]
    assert "going on with 7 images per network call" in capsys.readouterr().out
    model.model.sizes.clear()
    model(*arguments)
    assert set(model.model.sizes) == {7, 1}  # what did not fit once is not tried again
    assert model.null_class == 7


def test_a_single_image_that_does_not_fit_is_an_error(no_cache):
    with pytest.raises(torch.cuda.OutOfMemoryError):
        InferenceModel(Hungry(0))(torch.randn(4, 1, 1, 1), torch.zeros(4))


@pytest.mark.parametrize("fits, found", [(64, 32), (20, 16), (1, 1), (0, 0)])
def test_the_batch_that_fits_is_found_by_halving(no_cache, fits, found):
    model = Hungry(fits)
    assert batch_that_fits(lambda n: model(torch.randn(n, 1, 1, 1), torch.zeros(n)), 64) == found


def test_a_training_batch_that_does_not_fit_is_named_with_one_that_does(no_cache, monkeypatch, tmp_path, model):
    def hungry_step(model, optimizer, diffusor, images, labels, **options):
        if len(images) > 30:
            raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(run, "train_step", hungry_step)
    config = tiny_config(tmp_path, batch_size=100)
    loader = make_loader(random_set(200), 100, "cpu")
    training = run.Training(model, config, build_diffusion(config, "cpu"), loader, "abc")
    with pytest.raises(RunError, match="--batch_size 100 doesn't fit .*--batch_size 25 fits"):
        train_epoch(training)


def test_the_freest_visible_gpu_is_taken(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([2, 9, 5][index] * 10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    assert job.pick_device(None) == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]
    assert "cuda:1 of 3" in capsys.readouterr().out
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert job.pick_device(False) == torch.device("cpu")


def test_number_of_threads():
    before = torch.get_num_threads()
    try:
        job.pick_device(False, 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "amp, capability, expected",
    [("auto", (8, 0), True), ("auto", (7, 5), False), ("off", (9, 0), False), ("on", (9, 0), True)],
)
def test_bfloat16_is_used_on_gpus_that_have_it(monkeypatch, amp, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert job.computes_in_bfloat16(amp, torch.device("cuda")) is expected


def test_bfloat16_is_refused_where_it_is_asked_of_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match="--amp on"):
        job.computes_in_bfloat16("on", torch.device("cuda"))


@pytest.mark.parametrize(
    "features, auto",
    [({"avx512_bf16": True, "amx_bf16": False}, False), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_bfloat16_is_used_on_cpus_that_have_it(monkeypatch, features, auto):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    used = {amp: job.computes_in_bfloat16(amp, torch.device("cpu")) for amp in ("auto", "on", "off")}
    assert used == {"auto": auto, "on": True, "off": False}


def test_bfloat16_is_left_alone_where_torch_is_too_old_to_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not job.computes_in_bfloat16("auto", torch.device("cpu"))


def test_a_second_signal_waits_too_under_torchrun(monkeypatch):
    """There it comes from the sender and from torchrun, within milliseconds."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with hold_signals() as waiting:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert waiting == [signal.SIGTERM] * 2


def test_a_network_that_cannot_be_compiled_is_one_line(tmp_path, monkeypatch, capsys):
    def fails(*inputs):
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    assert ex2_main.main([*RUN, "--results_dir", str(tmp_path), "--compile", "on"]) == 1
    assert capsys.readouterr().err == (
        "error: --compile on: torch can't compile the network here (no working C++ compiler); give --compile auto or "
        "off\n"
    )


# ------------------------------------------------------------------ streams


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "utf-16", "utf-8"])
def test_any_encoding_takes_any_words(monkeypatch, tmp_path, encoding):
    """What a stream can't show becomes another letter, and never an error."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert ex2_main.main(["report", "--results_dir", str(tmp_path / "\U0001f98b")]) == 2
    assert "error: " in sys.stderr.buffer.getvalue().decode(encoding)  # each line at once


@pytest.mark.parametrize("stream", [lambda: None, io.StringIO])
def test_without_streams_or_with_those_of_a_notebook_nothing_fails(monkeypatch, tmp_path, stream):
    """A notebook's have no `reconfigure`."""
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    assert ex2_main.main(["report", "--results_dir", str(tmp_path)]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that break")
def test_a_broken_pipe_ends_in_order_and_saved(tmp_path):
    long = [*RUN, "--results_dir", str(tmp_path), "--epochs", "500", "--log_interval", "1"]
    process = Started(*long, prepare=forked.training_only, pipe=True)
    with open(process.out) as lines:
        assert any("step 3/" in line for line in lines)
    os.remove(process.out)
    code, _, error = process.finish()
    said = "error: nobody reads the output any more; a training that was going on is saved\n"
    assert code == 141 and error.endswith(said) and "Traceback" not in error
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["step"] >= 3
    assert_free(tmp_path / "DDPM")

    # Python flushes its streams when a process ends, which a fork of the test does not.
    reader, writer = os.pipe()
    os.close(reader)
    report = [sys.executable, str(ROOT / "ex2_main.py"), "report", "--results_dir", str(tmp_path)]
    done = subprocess.run(report, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, said)


# ------------------------------------------------------------------ every signal, to every process


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
@pytest.mark.parametrize("name", [n.name for n in ENDING if n.name in ("SIGTERM", "SIGHUP")])
def test_a_signal_to_the_whole_group_ends_a_training_in_order(photographs, tmp_path, name):
    """The processes that read files while it trains have it, too."""
    data = ["--dataset", "folder", "--data_dir", str(photographs), "--num_workers", "1", "--batch_size", "5"]
    long = [*RUN, *data, "--results_dir", str(tmp_path), "--epochs", "500", "--log_interval", "1"]
    process = Started(*long, prepare=forked.training_on_files)
    process.wait_for_line("step 3/")
    os.killpg(process.pid, getattr(signal, name))
    code, _, error = process.finish()
    assert code == 128 + getattr(signal, name), error
    assert error.splitlines()[-1].startswith(f"interrupted by {name}; a training") and "Traceback" not in error
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["step"] >= 3


@pytest.mark.parametrize("number", ENDING)
def test_every_signal_waits_for_the_end_of_the_step(number):
    with hold_signals() as waiting:
        os.kill(os.getpid(), number)
        assert waiting == [number]


def test_all_that_would_end_a_program_and_denotes_no_fault_is_heeded():
    faults = "SEGV BUS FPE ILL ABRT IOT TRAP SYS EMT STKFLT KILL STOP PIPE CHLD CLD CONT TSTP TTIN TTOU URG WINCH INFO"
    others = "PROF IO POLL XFSZ RTMIN RTMAX LOST"  # of profilers; ignored or an error of writing in Python
    known = {getattr(signal, f"SIG{name}") for name in f"{faults} {others}".split() if hasattr(signal, f"SIG{name}")}
    named = {number for number in signal.valid_signals() if isinstance(number, signal.Signals)}
    assert named - known == set(job.SIGNALS)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Unix")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with hold_signals() as waiting:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert waiting == []
    finally:
        signal.signal(signal.SIGHUP, before)
