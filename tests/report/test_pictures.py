"""What the pictures of a run hold (2.2 f to 2.4), and the images that `sample` saves."""

import dataclasses

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import ex2_main
from ex2.data import images as data_images
from ex2.data import load, shapes
from ex2.noise import ImageNoise
from ex2.report import pictures
from ex2.settings.build import build_diffusion, restore_model
from ex2.settings.config import config_of
from ex2.training import checkpoint

pytestmark = pytest.mark.usefixtures("small_shapes")


def test_sample_and_save_images_with_the_skeletons_arguments(run, tmp_path):
    saved = checkpoint.load_checkpoint(run)
    config = config_of(saved, {})
    model, diffusor = restore_model(saved, config, "cpu").train(), build_diffusion(config, "cpu")
    images = ex2_main.sample_and_save_images(2, diffusor, model, "cpu", tmp_path / "out")
    assert images.shape == (2, 3, 8, 8) and model.training
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["0000.png", "0001.png", "grid.png"]
    png = torch.from_numpy(imageio.imread(tmp_path / "out" / "images" / "0000.png")).permute(2, 0, 1)
    assert torch.equal(png, data_images.reverse_transform(images[0]))


def test_grids_show_the_first_images_of_many(run, tmp_path, monkeypatch):
    """All of 10,000 would take 9 GB."""
    monkeypatch.setattr(pictures, "GRID_IMAGES", 2)
    command = ["sample", "--checkpoint", str(run), "--guidance_scale", "0", "1", "--sample_steps", "1", "--no_cuda"]
    for count in ("2", "5"):
        assert ex2_main.main([*command, "--n_images", count, "--out", str(tmp_path / count)]) == 0
    assert len(list((tmp_path / "5" / "w=0" / "images").glob("0*.png"))) == 5
    for name in ("w=0/grid.png", "guidance_grid.png"):
        two, five = (imageio.imread(tmp_path / count / name) for count in ("2", "5"))
        np.testing.assert_array_equal(two, five)


def test_class_names_become_file_names(run, tmp_path):
    saved = checkpoint.load_checkpoint(run)
    config = config_of(saved, {})
    model, diffusor = restore_model(saved, config, "cpu"), build_diffusion(config, "cpu")
    names = ["../a b/c", *saved["class_names"][1:]]
    ex2_main.sample_and_save_images(1, diffusor, model, "cpu", tmp_path, classes=[0], class_names=names, steps=2)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["0000_.._a_b_c.png", "grid.png"]


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to ex2_viz, by file name."""
    calls = {}
    monkeypatch.setattr(
        pictures.viz, "save_grid", lambda images, path, *rest, **o: calls.update({path.name: (images, *rest)})
    )
    monkeypatch.setattr(pictures.viz, "save_strip", lambda steps, path, title: calls.update({path.name: steps}))
    monkeypatch.setattr(pictures.viz, "save_process_gif", lambda steps, path: calls.update({path.name: steps}))
    monkeypatch.setattr(pictures.viz, "plot_schedules", lambda betas, path: calls.update({path.name: betas}))
    return calls


@pytest.fixture
def restored(run):
    saved = checkpoint.load_checkpoint(run)
    config = config_of(saved, {"sample_steps": 23})
    return config, restore_model(saved, config, "cpu"), build_diffusion(config, "cpu")


def test_class_grids_show_all_classes_with_their_names(restored, drawn):
    config, model, diffusor = restored
    pictures.draw_samples(model, shapes.SHAPES, diffusor, dataclasses.replace(config, sample_steps=1))
    images, columns, names = drawn["class_grid.png"]
    assert (len(images), columns, names) == (80, 8, shapes.SHAPES)
    images, columns, names, scales = drawn["guidance_grid.png"]
    assert (len(images), columns, names) == (40, 4, shapes.SHAPES)
    assert scales == ["w = -1", "w = 0", "w = 1", "w = 3"]


def test_a_model_that_never_saw_the_null_class_is_not_guided(restored, drawn):
    config, model, diffusor = restored
    config = dataclasses.replace(config, p_uncond=0.0)
    assert config.sampling["guidance_scale"] == 0
    pictures.draw_samples(model, shapes.SHAPES, diffusor, config)
    assert set(drawn) == {"class_grid.png"}


def test_animations_are_one_trajectory_in_time_order_with_both_ends(restored, drawn):
    """Of 41 frames, however few steps a sample takes (here T = 30)."""
    config, model, diffusor = restored
    splits = load.load_splits("shapes", None, 8, 0)
    pictures.draw_process(model, splits, diffusor, config)
    for name, first, last in (("forward", -1, 29), ("reverse", 29, -1)):
        times = [t for t, _ in drawn[f"{name}.gif"]]
        assert times == sorted(set(times), reverse=name == "reverse") and (times[0], times[-1]) == (first, last)
        strip = [t for t, _ in drawn[f"{name}_strip.png"]]
        assert (strip[0], strip[-1], len(strip)) == (first, last, 9) and set(strip) <= set(times)
        assert len(times) == 31
    settings = {**config.sampling, "steps": 30}  # of an animation: 40, or all there are
    whole = list(diffusor.sample_trajectory(model, 8, 4, classes=range(4), generator=ImageNoise(0, 0, 4), **settings))
    for t, x in drawn["reverse.gif"]:
        match = [other for time, other, _ in whole if time == t]
        torch.testing.assert_close(x, match[0])
    assert {len(betas) for betas in drawn["schedules.png"].values()} == {30}
    assert torch.equal(drawn["schedules.png"]["cosine"].float(), diffusor.betas)


def test_single_images_lie_where_torch_fidelity_finds_them_and_nothing_else(run, tmp_path):
    utils = pytest.importorskip("torch_fidelity.utils", reason="an extra")
    command = ["sample", "--no_cuda", "--checkpoint", str(run), "--n_images", "3", "--out", str(tmp_path)]
    assert ex2_main.main(command) == 0
    found = utils.glob_samples_paths(str(tmp_path / "images"), False, "png,jpg,jpeg", "jpg,jpeg", False)
    assert sorted(found) == sorted(str(path) for path in (tmp_path / "images").iterdir()) and len(found) == 3
