"""Several processes (torchrun) compute what one does, write the same files, and none hangs when another is gone."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from forked import Started, free_port, start_processes
from machine.metrics_of_processes import figures, new_state
from PIL import Image
from tiny import ROOT, without_evaluation

import ex2_main
from ex2 import errors
from ex2.data.loader import EpochPlan
from ex2.machine import job, processes
from ex2.machine.processes import all_gather, all_reduce_max, shard
from ex2.training import checkpoint as training_checkpoint
from ex2.training import run as training_run
from ex2.training.log import RunLog
from ex2_train import draw_timesteps_and_noise

TINY = "--dataset folder --image_size 8 --dim 8 --dim_mults 1 --timesteps 20 --schedule cosine --batch_size 5".split()
TINY += "--epochs 3 --eval_images 9 --eval_timesteps 3 --sample_steps 3 --log_interval 4 --no_cuda".split()
TINY += "--save_minutes 1e-9 --class_free_guidance --amp off".split()  # so that rounding is that of float32

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs a Unix")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """43 images of two classes: a data set that no process has to render."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(43):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def command(photographs):
    return ["ex2_main.py", *TINY, "--data_dir", str(photographs)]


@pytest.fixture(scope="module")
def by_two(command, tmp_path_factory):
    """(run folder, stdout) of a whole training by two processes that nothing interrupted."""
    results = tmp_path_factory.mktemp("by_two")
    run = [*command[1:], "--results_dir", str(results)]
    first, second = (process.finish() for process in start_processes(2, *run, prepare=forked.no_curves))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    return results / "DDPM", first[1] + second[1]


# ------------------------------------------------------------------ shares


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 64])
def test_shares_are_all_of_it_without_overlap_and_of_equal_size(count, parts):
    shares = [shard(count, (part, parts)) for part in range(parts)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_processes_share_every_batch_and_their_order_changes_with_the_epoch(parts):
    plans = [EpochPlan(22, 8, shuffle=True, flip=True, seed=3, part=(part, parts)) for part in range(parts)]
    whole = EpochPlan(22, 8, shuffle=True, flip=True, seed=3)
    orders = []
    for epoch in (0, 1):
        for plan in (*plans, whole):
            plan.set_epoch(epoch)
        for number, (batch, *own) in enumerate(zip(whole, *plans)):
            # The last batch has 6 images; of 8 processes two have one that doesn't count, so that all take the step.
            counted = [rows for part, rows in enumerate(own) if shard(whole.images_in(number), (part, parts))]
            assert [pair for rows in counted for pair in rows] == batch
            assert all(len(rows) > 0 for rows in own)
        orders.append([index for batch in whole for index, _ in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(22))
    assert orders[0] != orders[1]


def test_noise_of_a_step_is_shared_out_and_its_weights_make_the_mean_over_images(tmp_path, monkeypatch):
    state, diffusor, loader = new_state(tmp_path)
    state.step, images = 2, torch.zeros(5, 3, 8, 8)  # the smaller batch at the end: 5 images
    t, noise = draw_timesteps_and_noise(images, diffusor.timesteps, state.prepare_step())
    times, noises, dropped, weights = [], [], [], []
    for rank in range(3):
        monkeypatch.setattr(training_run, "world_size", lambda: 3)
        monkeypatch.setattr(training_run, "rank", lambda rank=rank: rank)
        loader.plan.part = (rank, 3)
        rows = state.prepare_step()
        for found, part in zip((times, noises), draw_timesteps_and_noise(images[rows.own], diffusor.timesteps, rows)):
            found.append(part)
        dropped.append(torch.rand(4))
        weights.append(rows.weight)
        assert rows.total == 5
    assert torch.equal(torch.cat(noises), noise) and torch.equal(torch.cat(times), t)
    mean = sum(weight * part.mean() for weight, part in zip(weights, noises)) / 3
    assert mean == pytest.approx(noise.mean().item(), abs=1e-6)
    assert len(torch.cat(dropped).unique()) == 12  # what the network draws itself differs by process
    state.step = 1
    assert not torch.equal(
        draw_timesteps_and_noise(images[rows.own], diffusor.timesteps, state.prepare_step())[0], times[-1]
    )


def test_one_process_agrees_with_itself():
    assert [all_reduce_max(0, 1.0), all_reduce_max(15, 2.5)] == [(0, 1.0), (15, 2.5)]
    assert all_gather("all", "nothing") == ["all"]


@pytest.mark.parametrize("rank, local, turn", [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_data_is_fetched_by_the_first_process_before_the_others(monkeypatch, rank, local, turn):
    """Then by the first one of every other machine, which may have a disk of its own, then by the rest."""
    met = []
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "local_rank", lambda: local)
    monkeypatch.setattr(processes, "barrier", met.append)
    assert processes.main_process_first(lambda: f"after {len(met)} turns", "the data") == f"after {turn} turns"
    assert met == ["the data"] * 3


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (("device_count", 2), ("is_available", True)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(job, "world_size", lambda: 3)
    monkeypatch.setattr(job, "local_rank", lambda: 1)
    assert job.pick_device(None) == torch.device("cuda", 1)
    monkeypatch.setattr(job, "local_rank", lambda: 2)
    with pytest.raises(errors.InputError, match=r"process 2 .* \(2 visible\).*--nproc_per_node=gpu"):
        job.pick_device(None)


@pytest.mark.parametrize("said, gone", [("[gloo] Connection closed by peer\nat 0x1", True), ("shapes differ", False)])
def test_of_torchs_errors_those_of_lost_processes_are_said_in_one_line(said, gone):
    with pytest.raises(RuntimeError) as raised, processes.name_lost_processes():
        raise RuntimeError(said)
    assert isinstance(raised.value, errors.ProcessesError) == gone
    assert str(raised.value) == ("another process is gone ([gloo] Connection closed by peer)" if gone else said)


# ------------------------------------------------------------------ two processes against one


def test_two_processes_compute_what_one_does(tmp_path):
    """Gradients, losses, bounds, samples, features: of batches that don't split evenly, too."""
    two = start_processes(2, str(tmp_path), script=ROOT / "tests/machine/metrics_of_processes.py")
    one = figures(tmp_path / "one")
    for process in two:
        code, _, err = process.finish()
        assert code == 0, err
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert by_rank[0].keys() == by_rank[1].keys() == one.keys()
    for name, wanted in one.items():
        # Pixels of samples are rounded, so a figure of few samples can jump by one of 768 grey levels.
        tolerance = 5e-3 if name.startswith(("kid", "nearest")) else 1e-6 if "gradient" in name else 1e-5
        torch.testing.assert_close(by_rank[0][name], wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(by_rank[0][name], by_rank[1][name]), name


def test_two_processes_write_the_files_of_one_and_talk_once(by_two, command, tmp_path, capsys):
    folder, out = by_two
    assert ex2_main.main([*command[1:], "--results_dir", str(tmp_path), "--num_threads", "1"]) == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "DDPM").iterdir()}
    assert out.count("done: see") == out.count("epoch 3/3") == 1
    logs = [RunLog.read(run / "log.csv") for run in (folder, tmp_path / "DDPM")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    first, second = training_checkpoint.load_checkpoint(folder), training_checkpoint.load_checkpoint(tmp_path / "DDPM")
    assert (first["step"], first["processes"], second["processes"]) == (second["step"], 2, 1)
    assert first["model"].keys() == second["model"].keys()  # no "module."


# ------------------------------------------------------------------ processes that end early


def test_a_signal_to_one_process_ends_all_after_the_same_step_and_one_goes_on(command, tmp_path, monkeypatch, capsys):
    """From two processes to one within an epoch: the weights are those of one process alone, to rounding."""
    plain = [*command, "--p_uncond", "0", "--epochs", "4"]
    pair = start_processes(2, *plain[1:], "--results_dir", str(tmp_path), prepare=forked.training_only)
    pair[0].wait_for(lambda: len(list((tmp_path / "DDPM").glob("ckpt.pt*"))) > 1)
    os.kill(pair[1].pid, signal.SIGTERM)
    for code, _, err in [process.finish() for process in pair]:
        assert code == 143 and "interrupted by SIGTERM; a training that was going on is saved" in err, err
    saved = training_checkpoint.load_checkpoint(tmp_path / "DDPM")
    assert 0 < saved["step"] < 32
    assert not (tmp_path / "DDPM" / ".holder").exists()

    without_evaluation(monkeypatch)
    end = [*plain[1:], "--results_dir", str(tmp_path), "--num_threads", "1", "--save_minutes", "10"]
    assert ex2_main.main(end) == 0
    said = capsys.readouterr().out
    assert f"{saved['step']} of 32 steps" in said
    assert "2 processes there, 1 now: a step still takes 5 images in all" in said
    alone = tmp_path / "alone"
    assert ex2_main.main([*end, "--results_dir", str(alone)]) == 0
    mixed, straight = (training_checkpoint.load_checkpoint(folder / "DDPM")["ema"] for folder in (tmp_path, alone))
    for name, weight in straight.items():
        torch.testing.assert_close(mixed[name], weight, rtol=0, atol=2e-3)


def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_happened(by_two, command, tmp_path):
    run = [*command[1:], "--no_resume", "--results_dir", str(tmp_path)]
    agent = Started(*run, prepare=forked.under_torchrun)
    agent.wait_for((tmp_path / "DDPM" / "ckpt.pt.previous").exists)  # so there is one whole checkpoint
    _, second = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    code, out, err = agent.finish()
    assert code == 0, err
    assert "of 24 steps" in out, "it started anew"
    endings = [training_checkpoint.load_checkpoint(folder) for folder in (by_two[0], tmp_path / "DDPM")]
    for ending in endings:
        del ending["config"], ending["seconds"]
    assert training_checkpoint.digest_of(endings[0]) == training_checkpoint.digest_of(endings[1])


def test_a_process_that_does_not_answer_is_named(tmp_path):
    script = tmp_path / "silent.py"
    script.write_text(
        "import datetime, time\n"
        "from ex2.errors import ProcessesError\n"
        "from ex2.machine import processes\n"
        "with processes.connect_processes(False, 1):\n"  # both are there, however slowly they start
        "    processes._timeout = datetime.timedelta(seconds=3)\n"
        "    if processes.rank() == 1: time.sleep(20)\n"
        "    try: processes.all_gather(0, 'features of images')\n"
        "    except ProcessesError as error: open(__file__ + '.said', 'w').write(str(error)); raise\n"
    )
    started = time.monotonic()
    first, _ = start_processes(2, script=script)
    assert first.finish(timeout=60)[0] != 0
    said = Path(f"{script}.said").read_text()
    assert "'features of images', up to 0.05 min" in said
    assert "anks 1 failed" in said, said
    assert time.monotonic() - started < 45


@pytest.mark.parametrize("taken", [True, False], ids=["port taken", "other process missing"])
def test_processes_that_cannot_meet_say_so(taken, command, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if taken:
            other.listen()
        port = str(other.getsockname()[1])
        if not taken:
            other.close()
        environment = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        quick = ["--results_dir", str(tmp_path), "--timeout_minutes", "0.05"]
        code, _, err = Started(*command[1:], *quick, **environment).finish(timeout=60)
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]], err
    assert f"don't find each other at 127.0.0.1:{port}" in err
    assert "Traceback" not in err


# ------------------------------------------------------------------ two machines


def test_two_machines_have_one_folder(command, tmp_path):
    """Of each machine one process; the second one's has no folder that it could write to."""
    program = [*command[1:], "--no_class_free_guidance", "--dry_run"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    meeting["prepare"] = forked.no_curves
    nodes = [Started(*program, "--results_dir", str(tmp_path / str(i)), RANK=str(i), **meeting) for i in range(2)]
    ends = [node.finish() for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    written = [node for node in range(2) if (tmp_path / str(node)).exists()]
    assert len(written) == 1
    assert (tmp_path / str(written[0]) / "DDPM-dry_run" / "test_metrics.json").is_file()
    assert sorted("done: see" in out for _, out, _ in ends) == [False, True]
