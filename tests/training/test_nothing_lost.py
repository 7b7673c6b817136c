"""What a run leaves and finds: files that are cut off, damaged, of other programs, or of two commands at once."""

import copy
import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny import TINY, fit, random_set, rejected, tiny_config, tiny_splits, without_evaluation

import ex2_main
from ex2.data import loader, shapes
from ex2.data.images import DataSplits
from ex2.errors import InputError, Interrupted, ReadingError
from ex2.machine import files, job
from ex2.machine.job import lock_folder
from ex2.settings.build import build_diffusion
from ex2.settings.cli import choose_classes
from ex2.settings.config import Config
from ex2.training import checkpoint, log, run
from ex2.training.log import RunLog
from ex2.training.run import open_run
from ex2_viz import save_images


@pytest.fixture(autouse=True)
def training_only(small_shapes, monkeypatch):
    shapes.SHAPES_COUNT.update(train=300, test=60)  # the dict that `small_shapes` takes away again
    without_evaluation(monkeypatch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_shapes):
    """(config, content) of the checkpoint of a finished run."""
    config = tiny_config(tmp_path_factory.mktemp("saved"), epochs=1)
    fit(config, tiny_splits(), build_diffusion(config, "cpu"))
    return config, checkpoint.load_checkpoint(config.run_dir)


# ------------------------------------------------------------------ checkpoints


def test_a_first_checkpoint_whose_writing_was_cut_off_is_as_if_it_never_was(tmp_path):
    folder = tmp_path / "DDPM"
    folder.mkdir()
    for left in ("ckpt.pt.new.tmp", "ckpt.pt.new.4711.tmp", "ckpt.pt.4711.tmp"):
        (folder / left).write_bytes(b"half")
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path)]) == 0


def test_temporary_files_of_killed_processes_are_removed_and_those_of_others_are_not(tmp_path):
    old, new = tmp_path / "ckpt.pt.new.1.tmp", tmp_path / "test_metrics.json.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    with lock_folder(tmp_path):
        assert not old.exists() and new.exists()


def other_values(value):
    """Values that are not what the program writes in place of `value`."""
    yield from (None, "text", [], -1, float("nan"), torch.zeros(2))
    if isinstance(value, dict):
        yield {**value, next(iter(value), "key"): "text"}
        yield {name: item for name, item in value.items() if name != next(iter(value), None)}


def test_a_checkpoint_of_another_shape_is_one_line_and_never_trained_on(saved, tmp_path, monkeypatch):
    """Every key of it, and of what it holds, with text, nothing, other numbers, missing or additional entries."""
    _, content = saved
    config = tiny_config(tmp_path, epochs=1)
    run = open_run(config, tiny_splits(), build_diffusion(config, "cpu"))
    tried = 0
    places = [(name,) for name in content if name != "config"]  # `config_of` refuses what is wrong there
    places += [
        (name, key)
        for name in ("model", "optimizer", "meter")
        for key in list(content[name])[: 1 if name == "model" else 4]
    ]
    for place in places:
        for value in other_values(content[place[0]] if len(place) == 1 else content[place[0]][place[1]]):
            damaged = {**content, place[0]: copy.copy(content[place[0]])}
            if len(place) == 1:
                damaged[place[0]] = value
            else:
                damaged[place[0]][place[1]] = value
            if checkpoint.digest_of(damaged) == checkpoint.digest_of(content) or damaged["data"] == {}:
                continue
            monkeypatch.setattr(run, "find_checkpoint", lambda found=damaged: checkpoint.check_content(found, tmp_path))
            with pytest.raises(InputError) as refused:
                run.resume()
                raise AssertionError(f"{place} may be {value}")
            assert "\n" not in str(refused.value), (place, value)
            tried += 1
    assert tried > 70


def test_moments_of_other_shapes_are_refused(saved, tmp_path, diffusor):
    _, content = saved
    damaged = copy.deepcopy(content)
    damaged["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    config = tiny_config(tmp_path, epochs=1)
    checkpoint.save_checkpoint(config.run_dir / "ckpt.pt", **damaged)
    with pytest.raises(InputError, match="moments .* don't fit its weights"):
        fit(config, tiny_splits(), diffusor)


def test_data_that_changed_between_two_calls_is_named(tmp_path, diffusor):
    config, splits = tiny_config(tmp_path, epochs=1), tiny_splits()
    fit(config, splits, diffusor)
    other = DataSplits(random_set(40, seed=5), splits.val, splits.test, splits.class_names)
    with pytest.raises(InputError, match=r"other data \(train 40 images \w{12} there, 40 images \w{12} now\)"):
        fit(config, other, diffusor)
    fit(tiny_config(tmp_path, epochs=1, allow_changes=True), other, diffusor)


def test_an_old_checkpoint_never_stands_beside_a_new_log(tmp_path, capsys):
    command = [*TINY, "--results_dir", str(tmp_path)]
    assert ex2_main.main(command) == 0
    before = (tmp_path / "DDPM" / "log.csv").read_bytes()
    capsys.readouterr()
    line = rejected([*command, "--epochs", "2", "--allow_changes", "--no_save_model"], capsys)
    assert "would no longer fit the log beside it: choose another --run_name" in line
    assert (tmp_path / "DDPM" / "log.csv").read_bytes() == before


def test_losses_of_a_window_do_not_keep_the_batch_in_memory(model, diffusor):
    from ex2_train import train_step

    images = torch.rand(16, 3, 8, 8) * 2 - 1
    loss, norm = train_step(model, torch.optim.AdamW(model.parameters()), diffusor, images, torch.zeros(16).long())
    assert loss.untyped_storage().nbytes() == 4 and norm.untyped_storage().nbytes() == 4


def test_a_signal_that_ends_a_worker_too_is_an_interruption(tmp_path):
    """Before it ignores signals: exit code 1, "lower --num_workers" (1 of 100 kills)."""
    config = tiny_config(tmp_path)
    training = open_run(config, tiny_splits(), build_diffusion(config, "cpu"))
    with pytest.raises(Interrupted, match="SIGTERM"), training.epoch():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ReadingError("a worker is gone")
    with pytest.raises(ReadingError), training.epoch():
        raise ReadingError("a worker is gone")


# ------------------------------------------------------------------ log.csv


def test_the_last_row_of_an_epoch_stands_in_the_log_once(tmp_path, monkeypatch):
    """It comes after the checkpoint of its step: killed between the two, a run wrote it again (2 of 100 kills)."""
    config, parts = (
        tiny_config(tmp_path, save_minutes=1e-6),
        (tiny_splits(), build_diffusion(tiny_config(tmp_path), "cpu")),
    )

    def end_here(*args):
        raise KeyError("as if killed before the validation")

    with monkeypatch.context() as patch:
        patch.setattr(run, "test", end_here)
        with pytest.raises(KeyError):
            fit(config, *parts)
    fit(config, *parts)
    rows = RunLog.read(config.run_dir / "log.csv")
    assert [row["step"] for row in rows if row["train_loss"]] == ["3", "6"]


def spreadsheet(text, kind):
    """log.csv as programs save it, or damaged."""
    return {
        "semicolons": text.replace(",", ";").encode(),
        "decimal commas": text.replace(",", ";").replace(".", ",").encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "utf-16": text.encode("utf-16"),
        "line ends": text.replace("\r\n", "\n").encode(),
        "a damaged row": text.replace("\r\n1,", "\r\none,", 1).encode(),
        "zeros in the middle": text.encode()[:150] + b"\0" * 50 + text.encode()[200:],
        "no head": text.split("\r\n", 1)[1].encode(),
        "an empty file": b"",
        "a column more": text.replace("\r\n", ",note\r\n").encode(),
    }[kind]


KINDS = "semicolons,decimal commas,byte order mark,utf-16,line ends,a damaged row,zeros in the middle,no head".split(
    ","
)


@pytest.mark.parametrize("kind", [*KINDS, "an empty file", "a column more"])
def test_a_log_that_is_not_understood_is_kept_beside(tmp_path, capsys, kind):
    path, row = tmp_path / "log.csv", {"epoch": 0, "lr": 0.001, "grad_norm": 1.5, "train_loss": 0.25}
    first = RunLog(path)
    for step in range(1, 6):
        first.write(step=step, **row)
    content = spreadsheet(path.read_bytes().decode(), kind)
    path.write_bytes(content)
    again = RunLog(path, 1, 5)
    assert (tmp_path / "log.csv.1").read_bytes() == content
    assert f"{path} is not as this program wrote it: kept as {path}.1" in capsys.readouterr().out
    again.write(step=6, **row)
    assert again.read(path)[-1]["step"] == "6" and log.is_understood(path.read_bytes(), again.read(path))


def test_a_last_row_that_was_cut_off_is_dropped_without_a_word(tmp_path, capsys):
    path = tmp_path / "log.csv"
    first = RunLog(path)
    for step in (1, 2, 3):
        first.write(step=step, epoch=0, lr=0.1, train_loss=1.0)
    whole = path.read_bytes()
    start = whole.rindex(b"\r\n", 0, -2) + 2
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [row["step"] for row in RunLog(path, 1, 3).read(path)] == ["1", "2"]
    assert not (tmp_path / "log.csv.1").exists() and capsys.readouterr().out == ""


# ------------------------------------------------------------------ two commands at once


def test_a_held_lock_is_held_whatever_lies_beside_it(tmp_path, capsys, monkeypatch):
    """Without `.holder`, as somebody deleted it, two runs trained in one folder."""
    monkeypatch.setattr(job, "WORKER_EXIT_SECONDS", 0)
    folder = tmp_path / "DDPM"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        line = rejected([*TINY, "--results_dir", str(tmp_path)], capsys)
        assert "another process works in" in line and "delete" not in line
    assert ex2_main.main([*TINY, "--results_dir", str(tmp_path)]) == 0


def test_two_writers_of_one_file_leave_one_of_their_contents(tmp_path, monkeypatch):
    """By threads with the names of two processes: each has its own temporary file."""
    numbers = iter(range(10**6))
    monkeypatch.setattr(files.os, "getpid", lambda: next(numbers))
    contents = [bytes([i]) * 200_000 for i in range(4)]
    faults = []

    def write(content):
        try:
            for _ in range(20):
                files.write_atomically(tmp_path / "f", content)
        except OSError as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and (tmp_path / "f").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# ------------------------------------------------------------------ names and numbers


def test_every_label_becomes_a_file_name_that_file_systems_take():
    rng = random.Random(0)
    letters = 'abc 蝴蝶éé\udce9/\\:*?"<>|\0\n.-_\U0001f98b'
    labels = ["".join(rng.choice(letters) for _ in range(rng.choice([1, 5, 245, 400]))) for _ in range(500)]
    for label in labels:
        name = files.file_name_of(label)
        assert len(name.encode()) <= files.LONGEST_NAME and not set(name) & set('/\\:*?"<>|\0\n ')


def test_two_unicode_forms_of_one_label_are_one_file_name():
    assert files.file_name_of("Caf\u00e9") == files.file_name_of("Cafe\u0301")


def test_two_numbers_have_two_names_and_plain_ones_are_short():
    rng = np.random.default_rng(0)
    values = [-1.0, 0.0, 1.0, 1.5, 3.0, 1.0000001, 1.0000002, 1 / 3, *rng.normal(size=500), *np.nextafter(1.0, [0, 2])]
    names = [files.number_name(float(value)) for value in values]
    assert len(set(names)) == len(set(values)) and names[:5] == ["-1", "0", "1", "1.5", "3"]
    assert all(float(name) == value for name, value in zip(names, values))


VALUES = ["9999999999", "99999999999999999999", "1e39", "1e-46", "1e300", "-1e300", "inf", "nan", "-0", "1e9", "0"]


@pytest.mark.parametrize("flag", "num_threads lr eval_images timeout_minutes save_minutes ema_images grad_clip".split())
def test_no_number_that_a_machine_cannot_hold_is_accepted(flag, capsys, monkeypatch):
    """Each is refused in one line, or is one that float32, torch's threads and timedelta take."""
    import datetime

    def accepted(args):
        value = args.given[flag]
        assert math.isfinite(float(torch.tensor(value, dtype=torch.float32))) and float(torch.tensor(float(value))) != 0
        assert flag != "num_threads" or value <= 1024
        assert flag != "timeout_minutes" or datetime.timedelta(minutes=value)

    monkeypatch.setitem(ex2_main.COMMANDS, "train", accepted)
    for value in VALUES:
        code = ex2_main.main([f"--{flag}={value}"])
        said = capsys.readouterr().err
        assert code == 0 or (code == 2 and said.count("\n") == 1), (value, said)


def test_more_samples_than_a_machine_can_hold_are_refused_before_any_work(saved, capsys):
    test = ["test", "--checkpoint", str(saved[0].run_dir), "--eval_samples", "99999999999999999999"]
    assert "--eval_samples must be at least 0 and at most" in rejected(test, capsys)


@pytest.mark.parametrize(
    "name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE", "LOCAL_RANK"]
)
@pytest.mark.parametrize("value", ["", " ", "none", "1.5", "0x1"])
def test_job_variables_that_are_no_number_are_none_or_one_line(tmp_path, capsys, monkeypatch, name, value):
    if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        for other in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(other, "1" if other == "WORLD_SIZE" else "0")
    monkeypatch.setenv(name, value)
    code = ex2_main.main([*TINY, "--results_dir", str(tmp_path), "--dry_run"])
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and f"environment variable {name} is" in said and said.count("\n") == 1)
    assert code == 0 or value.strip()


def test_a_flat_folder_has_no_classes_to_condition_on(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(20):
        save_images(torch.rand(1, 3, 8, 8), [tmp_path / "data" / f"{i}.png"])
    flags = f"--dataset folder --data_dir {tmp_path}/data --image_size 8 --results_dir {tmp_path}/results".split()
    assert "have no classes: give each a folder" in rejected([*flags, "--class_free_guidance"], capsys)


def test_a_class_name_comes_before_a_number_and_a_number_is_said(capsys):
    config = Config(class_free_guidance=True)
    names = ["1", "10", "2", "3", "Cafe\u0301"]
    assert choose_classes(["1", "10", "Caf\u00e9"], names, config) == [0, 1, 4]
    assert capsys.readouterr().out == ""
    assert choose_classes(["0", "4"], names, config) == [0, 4]
    said = capsys.readouterr().out
    assert "no class has that name, so it is number 0: 1" in said and said.count("\n") == 2


def test_a_training_without_images_to_read_is_saved(tmp_path, capsys, monkeypatch):
    """As when the memory of a DataLoader worker is taken away."""
    monkeypatch.setattr(loader.Loader, "__iter__", lambda self, real=loader.Loader.__iter__: cut_after(2, real(self)))
    command = [*TINY, "--results_dir", str(tmp_path)]
    assert "a worker was killed" in rejected(command, capsys, code=1)
    monkeypatch.undo()
    without_evaluation(monkeypatch)
    assert checkpoint.load_checkpoint(tmp_path / "DDPM")["step"] == 2
    assert ex2_main.main(command) == 0


def cut_after(count, batches):
    for i, batch in enumerate(batches):
        if i == count:
            raise ReadingError("reading images failed (a worker was killed): lower --num_workers")
        yield batch


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    folder = [
        "--dataset",
        "folder",
        "--data_dir",
        str(tmp_path / "nowhere"),
        "--results_dir",
        str(tmp_path / "results"),
    ]
    rejected(folder, capsys)
    assert not (tmp_path / "results" / "DDPM").exists()


def test_a_checkpoint_named_without_its_folder_is_found_in_a_word(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "quick").mkdir(parents=True)
    assert "no checkpoint at quick: did you mean results" in rejected(["sample", "--checkpoint", "quick"], capsys)
