"""Checkpoint files and the log: whole or named as damaged."""

import dataclasses
import os
import pickle
from contextlib import suppress

import pytest
import torch
from tiny import tiny_config

from ex2.errors import InputError
from ex2.settings.config import config_of
from ex2.training import checkpoint
from ex2.training.log import RunLog


@pytest.fixture(autouse=True)
def any_content():
    """These tests are about files; what is in those of runs: test_nothing_lost.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "check_content", lambda content, path: content)
        yield


def test_a_half_written_row_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    RunLog(path).write(step=3, epoch=0, epoch_loss=0.5)
    with path.open("a") as file:
        file.write("4,0")
    assert [row["step"] for row in RunLog(path, 1, 3).read(path)] == ["3"]


def test_rows_of_what_has_to_be_done_again_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    log = RunLog(path)
    for step in (2, 4, 5):
        log.write(step=step, epoch=0, train_loss=0.1)
    log.write(step=5, epoch=0, epoch_loss=0.1, val_loss=0.1)
    log.write(step=7, epoch=1, train_loss=0.1)
    # The first epoch is trained but not validated; then validated; then one step of the second is done.
    for epochs_done, step, wanted in ((0, 4, [2, 4]), (0, 5, [2, 4, 5]), (1, 5, [2, 4, 5, 5]), (1, 7, [2, 4, 5, 5, 7])):
        copy = tmp_path / "copy.csv"
        copy.write_bytes(path.read_bytes())
        assert [int(row["step"]) for row in RunLog(copy, epochs_done, step).read(copy)] == wanted


def test_checkpoints_of_another_version_are_refused():
    for content in ({}, {"config": {"no_such_field": 1}}):
        with pytest.raises(InputError, match="not this version's"):
            config_of(content, {})


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated", "other"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    if content == "truncated":
        checkpoint.save_checkpoint(path, model={"w": torch.zeros(1000)})
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "other":
        torch.save({"w": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"ckpt\.pt is (damaged|no checkpoint)"):
        checkpoint.load_checkpoint(path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(path, epoch=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save_checkpoint(path, epoch=2)
    assert checkpoint.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"], "nothing is left behind on the full disk"


def test_configs_of_a_checkpoint_can_be_changed_for_sampling(tmp_path):
    config = tiny_config(tmp_path)
    changed = config_of({"config": dataclasses.asdict(config)}, {"sampler": "ddim", "sample_steps": 5})
    wanted = {"guidance_scale": 1.0, "sampler": "ddim", "steps": 5, "eta": 0.0, "guidance_interval": (0.0, 1.0)}
    assert changed.sampling == wanted
    assert changed.dim_mults == (1,)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    for step in (1, 2):
        checkpoint.save_checkpoint(path, step=step)
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 1
    assert f"{path} is damaged" in capsys.readouterr().err
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load_checkpoint(path)  # a file that is named is that file


@pytest.mark.parametrize("kill_at", range(6))
def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(tmp_path, monkeypatch, kill_at):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(path, step=1)
    checkpoint.save_checkpoint(path, step=2)
    calls = []

    def until_killed(function):
        def wrapper(*args):
            calls.append(1)
            if len(calls) > kill_at:
                raise SystemExit  # what the program does after it will not happen
            return function(*args)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", until_killed(os.replace))
        patch.setattr(checkpoint.os, "fsync", until_killed(os.fsync))
        patch.setattr(checkpoint.Path, "unlink", lambda *args, **options: None)  # a kill cleans nothing up
        with suppress(SystemExit):
            checkpoint.save_checkpoint(path, step=3)
    assert checkpoint.load_checkpoint(tmp_path)["step"] == (2 if kill_at < 2 else 3)
    checkpoint.save_checkpoint(path, step=4)
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 4


def test_a_write_that_reads_back_wrong_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(path, step=1)
    monkeypatch.setattr(checkpoint.Path, "read_bytes", lambda self: b"rot")
    with pytest.raises(OSError, match="reads back"):
        checkpoint.save_checkpoint(path, step=2)
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(path)["step"] == 1


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    content = {"w": torch.arange(50.0), "b": torch.tensor([True, False]), "n": [1, 2.5, None, "x"], "d": {"k": (1, 2)}}
    checkpoint.save_checkpoint(tmp_path / "good.pt", **content)
    data = (tmp_path / "good.pt").read_bytes()
    path, refused = tmp_path / "ckpt.pt", 0
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        try:
            loaded = checkpoint.load_checkpoint(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert checkpoint.digest_of(loaded) == checkpoint.digest_of(content)
    assert refused > 50


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.999])
def test_truncated_checkpoints_are_refused(tmp_path, share):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(path, w=torch.arange(5000.0))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"ckpt\.pt is damaged or no checkpoint"):
        checkpoint.load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": checkpoint.CHECKPOINT_FORMAT, "config": Malicious()}, tmp_path / "ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("ckpt.pt", "plain.pt"):
        with pytest.raises(InputError, match="is damaged or no checkpoint"):
            checkpoint.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_digests_see_types_shapes_and_order():
    variants = [
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": [1]},
        {"a": torch.tensor(1)},
        {"a": torch.tensor([1])},
        {"a": torch.tensor(1.0)},
        {"a": torch.tensor([[1]])},
        {"b": 1},
        {"a": 1, "b": 2},
        {"a": [1, 2]},
        {"a": [2, 1]},
        {"a": None},
    ]
    assert len({checkpoint.digest_of(variant) for variant in variants}) == len(variants)
