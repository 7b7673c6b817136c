"""Pictures: brightness, order, labels, shapes; no display needed."""

import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import ex2_viz as viz
from ex2.report import metrics
from ex2.report.metrics import plot_bits_per_dim, plot_comparison, plot_guidance, plot_loss_over_t
from ex2_diffusion import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]


def frames_of(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield np.asarray(gif.convert("RGB")), gif.info["duration"]


def test_saved_images_are_scaled_back_and_not_dark(tmp_path):
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    viz.save_images(images, paths)
    assert [np.asarray(Image.open(path)).mean() for path in paths] == [0, 128, 255]


def test_grid_shows_every_image_in_its_place(tmp_path):
    colours = torch.eye(3).repeat(2, 1)[:, :, None, None].expand(6, 3, 16, 16) * 2 - 1
    viz.save_grid(colours, tmp_path / "g.png", columns=3, row_labels=["a", "b"], column_labels=["x", "y", "z"])
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
    for channel in range(3):
        other = [c for c in range(3) if c != channel]
        pure = (picture[..., channel] == 255) & (picture[..., other] == 0).all(-1)
        assert pure.sum() == pytest.approx(2 * 64 * 64, rel=0.05)
        columns = np.flatnonzero(pure.any(0))
        assert abs(columns.mean() - (picture.shape[1] - 3 * 66) - 66 * channel - 33) < 15


def test_labels_are_text_and_no_mathematics(tmp_path):
    viz.save_grid(torch.zeros(1, 3, 8, 8), tmp_path / "g.png", row_labels=["$a_$"], labels=["$\\b$"])
    assert (tmp_path / "g.png").exists()


@pytest.mark.parametrize("size, width", [(8, 64), (16, 64), (32, 64), (64, 64), (128, 128)])
def test_small_images_are_enlarged(size, width):
    assert viz.enlarge(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[-1] == width


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3), (1, 8, 8)])
@pytest.mark.parametrize("fps, shown", [(4, 250), (10, 100), (30, 30), (60, 20), (1000, 20)])
def test_gif_keeps_order_shape_and_a_pace_that_browsers_keep(tmp_path, shape, fps, shown):
    """Browsers play 10 ms as 100, and GIF has no times between those of whole 10 ms."""
    frames = [torch.full(shape, value) for value in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    viz.save_gif(frames, tmp_path / "x.gif", fps=fps)
    pictures, durations = zip(*frames_of(tmp_path / "x.gif"))
    assert [picture.shape for picture in pictures] == [(8, 8, 3)] * 5
    levels = [picture.mean() for picture in pictures]
    assert levels == pytest.approx([0, 64, 128, 191, 255], abs=3)
    assert durations == (shown,) * 4 + (2000,)


@pytest.mark.parametrize("ending, most", [("gif", 48), ("apng", 0), ("webp", 0)])
def test_animations_are_exact_or_near_it_on_noise(tmp_path, ending, most):
    """Pillow's default palette of a GIF costs up to 102 levels on frames of a denoising."""
    g = torch.Generator().manual_seed(0)
    flat = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 3, 16, 16)
    steps = [viz.caption(a * flat + (1 - a) * torch.randn(4, 3, 16, 16, generator=g), "t = 1") for a in (0.0, 0.5, 0.9)]
    viz.save_gif(steps, tmp_path / f"x.{ending}")
    shown = [picture.astype(int) for picture, _ in frames_of(tmp_path / f"x.{ending}")]
    assert len(shown) == 3
    assert max(np.abs(frame - wanted).max() for frame, wanted in zip(shown, steps)) <= most


def test_grey_images_are_drawn_and_four_channels_are_refused(tmp_path):
    viz.save_grid(torch.zeros(2, 1, 8, 8), tmp_path / "grey.png")
    viz.save_images(torch.zeros(1, 1, 8, 8), [tmp_path / "one.png"])
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == (8, 8, 3)
    for draw in (lambda x: viz.save_grid(x, tmp_path / "x.png"), lambda x: viz.caption(x, "t = 1")):
        with pytest.raises(ValueError, match=r"1 or 3 channels, got \(2, 4, 8, 8\)"):
            draw(torch.zeros(2, 4, 8, 8))


def test_a_gif_of_one_frame_and_frames_that_are_none(tmp_path):
    viz.save_gif([torch.zeros(3, 8, 8)], tmp_path / "x.gif")
    assert len(list(frames_of(tmp_path / "x.gif"))) == 1
    with pytest.raises(ValueError, match=r"got \(8, 8\)"):
        viz.save_gif([torch.zeros(8, 8)], tmp_path / "y.gif")


def test_frames_of_the_process_carry_their_time(tmp_path):
    steps = [(t, torch.zeros(4, 3, 8, 8)) for t in (9, 4, -1)]
    viz.save_process_gif(steps, tmp_path / "x.gif")
    pictures = [picture for picture, _ in frames_of(tmp_path / "x.gif")]
    captions = [picture[:20] for picture in pictures]
    assert len(pictures) == 3
    for t, shown in zip((9, 4, -1), captions):
        expected = viz.caption(torch.zeros(4, 3, 8, 8), f"t = {t + 1}")[:20]
        assert np.abs(shown.astype(int) - expected).max() < 40
    assert not np.array_equal(captions[0], captions[1])


def test_schedule_plot_draws_the_betas_it_is_given(tmp_path, monkeypatch):
    drawn, save = [], viz.Figure.savefig
    monkeypatch.setattr(viz.Figure, "savefig", lambda figure, *a, **k: drawn.append(figure) or save(figure, *a, **k))
    schedules = {name: schedule(100) for name, schedule in SCHEDULES.items()}
    viz.plot_schedules(schedules, tmp_path / "s.png")
    axes = drawn[0].axes
    assert [line.get_label() for line in axes[0].lines] == list(SCHEDULES)
    for k, betas in enumerate(schedules.values()):
        abar = torch.cumprod(1 - betas, 0)
        for ax, values in zip(axes, (betas, abar, torch.log(abar / (1 - abar)))):
            assert ax.lines[k].get_xdata().tolist() == list(range(1, 101))
            np.testing.assert_allclose(ax.lines[k].get_ydata(), values.numpy())


def test_every_curve_is_drawn_however_many_there_are(tmp_path, monkeypatch):
    """The eighth one vanished, as there were seven styles."""
    drawn = []
    real = metrics.curve_axes
    monkeypatch.setattr(metrics, "curve_axes", lambda *args: keep_axes(real(*args), drawn))
    curve = {"t": [0, 9], "l1": [0.5, 0.1], "l2": [0.4, 0.1], "x_zero_l2": [0.1, 0.5]}
    plot_loss_over_t({f"run {i}": curve for i in range(12)}, tmp_path / "b.png")
    assert [len(ax.lines) for ax in drawn] == [12] * 3


@contextmanager
def keep_axes(made, drawn):
    with made as axes:
        drawn += list(axes)
        yield axes


def test_curves_are_drawn(tmp_path):
    row = dict.fromkeys(("step", "epoch", "seconds", "lr", "grad_norm", "train_loss", "epoch_loss", "val_loss"), "")
    rows = [{**row, "step": str(i), "lr": "0.1", "grad_norm": "1", "train_loss": "0.5"} for i in range(3)]
    rows.append({**row, "step": "3", "epoch_loss": "0.5", "val_loss": "0.4"})
    viz.plot_training(rows, tmp_path / "a.png")
    curve = {"t": [0, 5, 9], "log_snr": [5, 0, -5], "l1": [0.5, 0.2, 0.1], "l2": [0.4, 0.2, 0.1]}
    curve["x_zero_l2"] = [0.1, 0.2, 0.5]
    plot_loss_over_t({"val": curve, "test": curve}, tmp_path / "b.png")
    plot_comparison({"x": rows, "y": rows}, {"x": curve, "y": curve}, {"x": "a", "y": "a"}, tmp_path / "c.png")
    terms = {"decoder": 1.5, "terms": [0.5, 0.1]}
    plot_bits_per_dim({"t": [1, 3], "beta": terms, "beta_tilde": terms}, 10, tmp_path / "d.png")
    quality = {"class_accuracy": 0.5, "precision": 0.6, "recall": 0.7, "frechet_distance": 2.0}
    scales = [{"guidance_scale": w, **quality} for w in (0, 1)]
    plot_guidance({"by_scale": scales, "test_images": quality}, tmp_path / "e.png")
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5


# ------------------------------------------------------------------ settings of the user


def every_picture(folder):
    """One picture of each kind that has text, as bytes."""
    images = torch.zeros(4, 3, 8, 8)
    viz.save_grid(images, folder / "grid.png", 2, ["a", "b"], ["c", "d"], title="title")
    viz.save_grid(images, folder / "labels.png", labels=list("abcd"))
    viz.plot_schedules({"cosine": SCHEDULES["cosine"](20)}, folder / "curves.png")
    viz.plot_time_embedding(torch.eye(5), folder / "embedding.png")
    return [(folder / f"{name}.png").read_bytes() for name in ("grid", "labels", "curves", "embedding")]


def test_no_setting_of_the_users_matplotlib_reaches_a_picture(tmp_path):
    """One of each kind: a program that may be missing, a font, a size, an effect."""
    expected = every_picture(tmp_path)
    odd = {"text.usetex": True, "font.family": "No such font", "savefig.dpi": 7, "path.sketch": (1, 100, 2)}
    with matplotlib.rc_context(odd):
        assert every_picture(tmp_path) == expected


def test_no_display_is_needed_and_no_backend_is_chosen(tmp_path):
    """Nor one asked for, as by a notebook, that is not there."""
    code = "import sys, pathlib, test_viz; test_viz.every_picture(pathlib.Path(sys.argv[1]));"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    environment = {"PATH": "", "MPLBACKEND": "module://no.such.module", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=ROOT / "tests", check=True)
    here = tmp_path / "here"
    here.mkdir()
    assert every_picture(here) == [(tmp_path / path.name).read_bytes() for path in sorted(here.iterdir(), key=age)]


def age(path):
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["蝴蝶", "a$b_{", "half \udce9 letter", "_hidden", "\U0001f98b", "", "a\nb", "\x00"])
def test_any_class_name_is_drawn(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        viz.save_grid(torch.zeros(4, 3, 8, 8), tmp_path / "g.png", 2, [name] * 2, [name] * 2, [name] * 4)
    assert imageio.imread(tmp_path / "g.png").shape[2] in (3, 4)


def test_a_grid_of_a_thousand_classes_is_cut_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(viz, "TALLEST", 1500)
    viz.save_grid(torch.zeros(2000, 3, 32, 32), tmp_path / "g.png", 2, [str(i) for i in range(1000)])
    assert imageio.imread(tmp_path / "g.png").shape[0] < 2000
    assert re.search(r"shows the first \d+ of 1000 rows", capsys.readouterr().out)


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    kinds = {"g.png": viz.save_grid, "g.gif": viz.save_gif}
    for name, save in kinds.items():
        save(torch.zeros(4, 3, 8, 8), tmp_path / name)
    before = [(tmp_path / name).read_bytes() for name in kinds]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ex2.machine.files.os.fsync", full)
    for name, save in kinds.items():
        with pytest.raises(OSError):
            save(torch.ones(4, 3, 8, 8), tmp_path / name)
    assert [(tmp_path / name).read_bytes() for name in kinds] == before
    with pytest.raises(ValueError, match="an animation ends in .gif, .apng, .webp"):
        viz.save_gif(torch.ones(2, 3, 8, 8), tmp_path / "x.mp4")
