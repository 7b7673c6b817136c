"""Pictures and animations of the process: tensors in, PNG and GIF files out (2.2 f, 2.3). Never calls a model.

Timesteps are labelled as in the paper: x_t after t noising steps, so x_0 is the image and x_T the noise; that is the
code's t + 1.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from ex2.data.images import reverse_transform
from ex2.machine.files import write_atomically

notebooks_backend = os.environ.pop("MPLBACKEND", None)  # may be missing here, and matplotlib would not import
import matplotlib.style  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402  without pyplot: needs no display, leaves a notebook's backend alone

if notebooks_backend is not None:
    os.environ["MPLBACKEND"] = notebooks_backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = notebooks_backend
ANIMATIONS = {".gif": "gif", ".apng": "png", ".webp": "webp"}  # endings and what Pillow calls them
TALLEST = 30_000  # pixels of a grid: matplotlib draws at most 65,535
CELL = 64  # pixels: small images are enlarged to about this size, so that they can be seen


@contextmanager
def drawing(path: str | Path, size: tuple[float, float], colours: int | None = None, **saving) -> Iterator[Figure]:
    """A figure of `size` inches, saved as a PNG file at the end. The user's matplotlib settings don't change it.

    A letter that the font lacks is drawn as a box. `colours` makes the file a third as large, and is for curves.
    """
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=size)
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1}, **saving)
    image, buffer = Image.open(buffer).convert("RGB"), io.BytesIO()
    (image.quantize(colours) if colours else image).save(buffer, "png")
    write_atomically(Path(path), buffer.getvalue())


def replace_undrawable(texts: Iterable[str]) -> list[str]:
    """Labels without characters that can't be drawn, as in file names that are not UTF-8."""
    return [str(text).encode("utf-8", "replace").decode() for text in texts]


def enlarge(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8, each pixel repeated until the images are about `CELL` wide."""
    factor = max(1, round(CELL / images.shape[-1]))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def as_rgb(images: Tensor) -> Tensor:
    """(N, 3, H, W) from (N, 1, H, W) or (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images to draw must be (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def tile(images: Tensor, columns: int, padding: int) -> np.ndarray:
    """(height, width, 3) uint8: the images (N, 3, H, W) row by row on white, `padding` pixels apart.

    As torchvision's make_grid does, which takes three seconds to import.
    """
    columns = min(columns, len(images))
    cells = pad(images, (0, padding, 0, padding), value=255)
    cells = torch.cat((cells, cells.new_full((-len(cells) % columns, *cells.shape[1:]), 255)))
    grid = cells.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (height, width, 3)
    return pad(grid, (0, 0, padding, 0, padding, 0), value=255).numpy()


def save_images(images: Tensor, paths: Sequence[Path]) -> None:
    """One PNG per image of (N, C, H, W) in [-1, 1], at its own size; one channel becomes three."""
    for image, path in zip(reverse_transform(images), paths):
        write_atomically(Path(path), imageio.imwrite("<bytes>", as_frame(image), extension=".png"))


def save_grid(images: Tensor, path, columns=None, row_labels=(), column_labels=(), labels=(), title="") -> None:
    """All images (N, 3, H, W) in [-1, 1], row by row, as one PNG; labels at rows, at columns, or below each image.

    columns: images in a row; None makes the grid about square.
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    side = images.shape[-1] * max(1, round(CELL / images.shape[-1])) + 16
    rows = max(1, TALLEST // side)
    if len(images) > rows * columns:
        print(f"{path} shows the first {rows} of {-(-len(images) // columns)} rows: more would be too tall to draw")
        images, row_labels, labels = images[: rows * columns], row_labels[:rows], labels[: rows * columns]
    tiles = enlarge(reverse_transform(as_rgb(images.cpu())))
    padding = 16 if labels else 2
    grid = tile(tiles, columns, padding)
    height, width = tiles.shape[-2] + padding, tiles.shape[-1] + padding

    size = (grid.shape[1] / 100, grid.shape[0] / 100)
    with drawing(path, size, dpi=100, bbox_inches="tight", pad_inches=0.1) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(grid, interpolation="nearest")
        axes.xaxis.tick_top()
        places = [padding + width * (i + 0.5) for i in range(len(column_labels))]
        axes.set_xticks(places, replace_undrawable(column_labels), parse_math=False)
        places = [padding + height * (i + 0.5) for i in range(len(row_labels))]
        axes.set_yticks(places, replace_undrawable(row_labels), parse_math=False)
        fits = max(4, width // 5)  # letters; more would run into the next label
        for i, label in enumerate(replace_undrawable(labels)):
            label = label if len(label) <= fits else f"{label[: fits - 1]}…"
            row, column = divmod(i, columns)
            axes.text(padding + width * column, height * (row + 1) + 1, label, fontsize=7, va="top", parse_math=False)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=11, pad=10)
        for spine in axes.spines.values():
            spine.set_visible(False)


def save_strip(steps: Sequence[tuple[int, Tensor]], path: str | Path, title: str) -> None:
    """Images over time as a PNG: one row per image, one column per (t, images (N, 3, H, W)), in the given order."""
    images = torch.stack([x.cpu() for _, x in steps], dim=1).flatten(0, 1)  # (N * columns, 3, H, W)
    labels = [f"t = {t + 1}" for t, _ in steps]
    save_grid(images, path, columns=len(steps), column_labels=labels, title=title)


def as_frame(frame) -> np.ndarray:
    """(H, W, 3) uint8 from a (C, H, W) or (H, W, C) image, uint8 or float in [-1, 1]; one channel becomes three."""
    frame = torch.as_tensor(frame).cpu()
    if frame.ndim != 3 or not {frame.shape[0], frame.shape[-1]} & {1, 3}:
        raise ValueError(f"a frame must be (C, H, W) or (H, W, C) with 1 or 3 channels, got {tuple(frame.shape)}")
    if frame.is_floating_point():
        frame = reverse_transform(frame)
    if frame.shape[0] in (1, 3):
        frame = frame.permute(1, 2, 0)
    return frame.expand(-1, -1, 3).numpy()


def save_gif(frames: Iterable, path: str | Path, fps: float = 10) -> None:
    """An endless animation from (C, H, W) or (H, W, C) images in time order; the last one stays for two seconds.

    Args:
        frames: uint8, or float in [-1, 1].
        path: its ending chooses the format: .gif (256 colours a frame), or .apng or .webp, which are exact.
        fps: frames a second, at most 50. Browsers keep times of whole 10 ms only, from 20 ms on.
    """
    images = [Image.fromarray(as_frame(frame)) for frame in frames]
    kind = ANIMATIONS.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"{path}: an animation ends in {', '.join(ANIMATIONS)}")
    if kind == "gif":  # Pillow's default palette costs up to 102 grey levels on noise, this one 32
        images = [image.quantize(256, Image.Quantize.MAXCOVERAGE) for image in images]
    durations = [max(20, round(100 / fps) * 10)] * (len(images) - 1) + [2000]  # milliseconds
    buffer = io.BytesIO()
    exact = {"lossless": True} if kind == "webp" else {}
    images[0].save(
        buffer, kind, save_all=True, append_images=images[1:], duration=durations[-len(images) :], loop=0, **exact
    )
    write_atomically(Path(path), buffer.getvalue())


def caption(images: Tensor, text: str) -> np.ndarray:
    """The images (N, 3, H, W) in [-1, 1] as one (H, W, 3) uint8 frame, with `text` in a line above them."""
    tiles = enlarge(reverse_transform(as_rgb(images.cpu())))
    columns = int(np.ceil(np.sqrt(len(tiles))))
    grid = tile(tiles, columns, 2)
    bar = Image.new("RGB", (grid.shape[1], 20), "white")
    ImageDraw.Draw(bar).text((4, 4), text, fill="black", font=ImageFont.load_default())
    return np.concatenate((np.asarray(bar), grid))


def save_process_gif(steps: Sequence[tuple[int, Tensor]], path: str | Path, fps: float = 10) -> None:
    """An animation of (t, images (N, 3, H, W)) in the given order, each frame labelled with its t."""
    save_gif([caption(x, f"t = {t + 1}") for t, x in steps], path, fps)


@contextmanager
def curve_axes(path: str | Path, count: int) -> Iterator:
    """The axes of `count` plots side by side, over the time or the steps; saved at the end."""
    with drawing(path, (4 * count, 3.6), colours=256, dpi=110) as figure:
        # Fixed margins: matplotlib's "tight" layout draws every figure twice.
        axes = figure.subplots(1, count)
        figure.subplots_adjust(left=0.22 / count, right=1 - 0.05 / count, bottom=0.14, top=0.91, wspace=0.32)
        for ax in axes:
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        yield axes


def plot_schedules(schedules: Mapping[str, Tensor], path: str | Path) -> None:
    """2.3: beta, alphas_bar and log-SNR of each schedule, name -> betas (T,), over its own T steps."""
    with curve_axes(path, 3) as axes:
        for name, betas in schedules.items():
            betas = betas.double().cpu()
            alphas_bar = torch.cumprod(1 - betas, dim=0)
            t = np.arange(1, len(betas) + 1)
            axes[0].plot(t, betas, label=name)
            axes[1].plot(t, alphas_bar, label=name)
            axes[2].plot(t, torch.log(alphas_bar / (1 - alphas_bar)), label=name)
        axes[0].set(title=r"noise added in step t, $\beta_t$", yscale="log")
        axes[1].set(title=r"signal left after t steps, $\bar\alpha_t$")
        axes[2].set(title=r"log-SNR, $\log\,\bar\alpha_t / (1 - \bar\alpha_t)$")
        for ax in axes:
            ax.set_xlabel("t")
            ax.legend()


def plot_guided_densities(curves: Mapping[float, Mapping[str, tuple]], path: str | Path) -> None:
    """2.4: densities of one pixel for each guidance scale, w -> label -> (x, density)."""
    with curve_axes(path, len(curves)) as axes:
        for ax, (w, lines) in zip(axes, curves.items()):
            for label, (x, density) in lines.items():
                ax.plot(x, density, label=label)
            ax.set(title=f"w = {w:g}", xlabel="pixel", xlim=(-1, 3), ylim=(0, 2.2))  # room for the legend
        axes[0].set_ylabel("density")
        axes[-1].legend(fontsize="small")


def plot_time_embedding(embedding: Tensor, path: str | Path) -> None:
    """2.1: the positional encoding (T, dim) of the timesteps; each row is a sine or cosine over t."""
    with drawing(path, (8, 3.2), colours=256, dpi=80) as figure:
        figure.set_layout_engine("tight")
        axes = figure.add_subplot()
        extent = (1, len(embedding), embedding.shape[1], 0)
        picture = axes.imshow(embedding.detach().cpu().T.numpy(), aspect="auto", cmap="RdBu", extent=extent)
        axes.set(title="sinusoidal embedding of the time", xlabel="t", ylabel="dimension")
        figure.colorbar(picture)


def read_column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a column of log.csv, where it has a value."""
    filled = [row for row in rows if row[name] != ""]
    return [int(row["step"]) for row in filled], [float(row[name]) for row in filled]


def plot_training(rows: Sequence[Mapping[str, str]], path: str | Path) -> None:
    """2.1: loss, learning rate and gradient norm over the optimiser steps, from the rows of log.csv."""
    with curve_axes(path, 3) as axes:
        axes[0].plot(*read_column(rows, "train_loss"), alpha=0.5, label="train, mean since the last row")
        axes[0].plot(*read_column(rows, "epoch_loss"), "o-", label="train, mean of the epoch")
        axes[0].plot(*read_column(rows, "val_loss"), "o-", label="val, EMA weights, fixed t and noise")
        axes[0].set(title="loss of the predicted noise", yscale="log")
        axes[0].legend(fontsize=8)
        axes[1].plot(*read_column(rows, "lr"))
        axes[1].set(title="learning rate")
        axes[2].plot(*read_column(rows, "grad_norm"))
        axes[2].set(title="gradient norm before clipping, mean", yscale="log")
        for ax in axes:
            ax.set_xlabel("optimiser step")
