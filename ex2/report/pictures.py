"""What a trained model shows: noising and denoising step by step, samples of every class, guidance (2.2 f to 2.4)."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import torch

import ex2_viz as viz
from ex2.data.images import DataSplits
from ex2.data.loader import make_loader
from ex2.evaluation.samples import shared_samples
from ex2.machine.files import file_name_of, number_name
from ex2.machine.processes import is_main, world_size
from ex2.machine.progress import track
from ex2.noise import ImageNoise, sample_in_batches
from ex2.report.exact_guidance import draw_exact_guidance
from ex2.settings.config import GUIDANCE_SCALES, Config
from ex2_diffusion import SCHEDULES, Diffusion, evenly_spaced, thin_trajectory

GUIDANCE_FRAMES = tuple(k / 2 for k in range(-2, 11))  # scales of the guidance animation; has those of the grid
GIF_FRAMES = 41
LARGE = 64  # pixels from which on a picture shows half as many images: they fill a page sooner
STRIP_COLUMNS = 9
GRID_IMAGES = 100  # at most, the first ones: thousands would take gigabytes to draw, and nobody could look at them


def draw_process(model, splits: DataSplits, diffusor: Diffusion, config: Config) -> None:
    """2.1, 2.2 f, 2.3: time embedding, schedules, and the forward and reverse process as strips and animations."""
    out = config.run_dir
    viz.plot_schedules(possible_schedules(config.timesteps), out / "schedules.png")
    timesteps = torch.arange(config.timesteps, device=diffusor.device)
    viz.plot_time_embedding(model.time_mlp[0](timesteps), out / "time_embedding.png")

    count = min(4 if config.image_size < LARGE else 2, len(splits.test))
    loader = make_loader(splits.test, count, diffusor.device)
    x_zero = next(iter(loader))[0].to(diffusor.device)
    forward = diffusor.forward_trajectory(x_zero, ImageNoise(config.seed, 0, count, diffusor.device))
    forward = [(t, x) for t, x, _ in thin_trajectory(forward, diffusor.timesteps + 1, GIF_FRAMES)]
    columns = evenly_spaced(len(forward), STRIP_COLUMNS)
    viz.save_strip([forward[i] for i in columns], out / "forward_strip.png", "forward process: x_t")
    viz.save_process_gif(forward, out / f"forward.{config.animation}")

    classes = None if model.null_class is None else torch.arange(count) % model.null_class
    how = {"classes": classes, "generator": ImageNoise(config.seed, 0, count, diffusor.device), **config.sampling}
    steps = how["steps"] or config.timesteps
    if not config.dry_run:  # an animation needs more steps than a good sample does
        how["steps"] = steps = min(max(steps, GIF_FRAMES - 1), config.timesteps)
    reverse = diffusor.sample_trajectory(model, config.image_size, count, **how)
    reverse = thin_trajectory(reverse, steps + 1, GIF_FRAMES)
    strip = [reverse[i] for i in evenly_spaced(len(reverse), STRIP_COLUMNS)]
    viz.save_strip([(t, x) for t, x, _ in strip], out / "reverse_strip.png", "reverse process: x_t")
    viz.save_strip([(t, x) for t, _, x in strip], out / "x_zero_strip.png", "reverse process: estimate of x_0 at t")
    viz.save_process_gif([(t, x) for t, x, _ in reverse], out / f"reverse.{config.animation}")


def possible_schedules(timesteps: int) -> dict:
    """name -> betas (T,) of the named schedules that exist for that many steps."""
    betas = {}
    for name, schedule in SCHEDULES.items():
        with suppress(ValueError):
            betas[name] = schedule(timesteps)
    return betas


def draw_samples(model, class_names, diffusor: Diffusion, config: Config) -> None:
    """2.2 b and 2.4: a grid of samples. For a conditional model: by class, and over guidance scales at equal noise."""
    common = {"batch_size": config.sample_batch, "seed": config.seed, **config.sampling}
    if model.null_class is None:
        images = torch.cat(list(sample_in_batches(diffusor, model, 4 if config.dry_run else 64, **common)))
        viz.save_grid(images, config.run_dir / "samples.png")
        return
    columns = 1 if config.dry_run else 8 if config.image_size < LARGE else 4
    classes = torch.arange(len(class_names)).repeat_interleave(columns)
    images = torch.cat(list(sample_in_batches(diffusor, model, len(classes), classes=classes, **common)))
    title = f"guidance scale w = {common['guidance_scale']:g}"
    viz.save_grid(images, config.run_dir / "class_grid.png", columns, class_names, title=title)

    if not config.can_guide:
        return
    classes = torch.arange(len(class_names))
    by_scale = {}
    for w in GUIDANCE_SCALES if config.dry_run else GUIDANCE_FRAMES:
        guided = {**common, "guidance_scale": w}
        by_scale[w] = torch.cat(list(sample_in_batches(diffusor, model, len(classes), classes=classes, **guided)))
    frames = [viz.caption(images, f"w = {w:g}") for w, images in by_scale.items()]
    viz.save_gif(frames, config.run_dir / f"guidance.{config.animation}", fps=4)
    grid = torch.stack([by_scale[w] for w in GUIDANCE_SCALES], dim=1).flatten(0, 1)
    columns = [f"w = {w:g}" for w in GUIDANCE_SCALES]
    viz.save_grid(grid, config.run_dir / "guidance_grid.png", len(columns), class_names, columns)
    if not config.dry_run:  # of no run: what Eq. 11 does to data with a known answer
        draw_exact_guidance(config.run_dir / "guidance_exact.png")


def sample_and_save_images(
    n_images, diffusor, model, device, store_path, *, classes=None, class_names=None, seed=0, batch_size=100, **sampling
) -> torch.Tensor:
    """Samples images and saves each as a file in `images/`. Returns (n_images, C, H, W) on the CPU.

    That folder holds nothing else, as tools that evaluate folders expect. The first images are in `grid.png` beside it.

    Each process samples its part; the first one saves, batch by batch, so that a long call shows its images early.

    Args:
        n_images: how many.
        diffusor: the `Diffusion` process.
        model: the U-Net; put on `device`.
        store_path: the folder.
        classes: a label per image, for a conditional model.
        class_names: their names, for file names and the grid.
        seed: image i depends on it and on i alone.
        batch_size: images that are sampled at a time.
        sampling: `guidance_scale`, `sampler`, `steps` and `eta` as in `Diffusion.sample`.
    """
    folder, model = Path(store_path) / "images", model.to(device)
    labels = [] if classes is None else [class_names[c] if class_names else str(int(c)) for c in classes]
    suffixes = [f"_{file_name_of(label)}" for label in labels] or [""] * n_images
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    images, step, how = [], batch_size * world_size(), {"channels": getattr(model, "channels", 3), **sampling}
    for start in track(range(0, n_images, step), "sampling", -(-n_images // step)):
        end = min(start + step, n_images)
        own = None if classes is None else torch.as_tensor(classes[start:end])
        images.append(shared_samples(diffusor, model, end - start, batch_size, seed, classes=own, first=start, **how))
        if is_main():
            viz.save_images(images[-1], [folder / f"{i:04d}{suffixes[i]}.png" for i in range(start, end)])
    images = torch.cat(images)
    if is_main():
        viz.save_grid(images[:GRID_IMAGES], Path(store_path) / "grid.png", labels=labels[:GRID_IMAGES])
    return images


def save_start(diffusor: Diffusion, config: Config, start: dict, path: Path) -> None:
    """The start image as the model sees it, and noised (Eq. 4): on a CPU that is where the first sample starts."""
    image = start["start_image"][None]
    process = diffusor.respace(config.sampling["steps"]).until(round(start["start_fraction"] * config.timesteps))
    t = torch.tensor([process.timesteps - 1])
    x_t = process.to("cpu").q_sample(image, t, ImageNoise(config.seed, 0, 1).draw(image.shape))
    labels = ["start image", f"x_t, t = {int(process.model_timesteps[t]) + 1}"]
    viz.save_grid(torch.cat((image, x_t)), path, 1, labels)


def sample_at_scales(count, scales, diffusor, model, config: Config, out: Path, classes, class_names, start) -> None:
    """2.4 c: `count` samples at each guidance scale, from the same noise; several have a folder each, and one grid.

    start: what they start from, of `open_start_image`.
    """
    if start and is_main():
        save_start(diffusor, config, start, out / "start.png")
    common = {"classes": classes, "class_names": class_names, "seed": config.seed, "batch_size": config.sample_batch}
    rows = []
    for scale in scales:
        folder = out if len(scales) == 1 else out / f"w={number_name(scale)}"
        how = {**common, **dataclasses.replace(config, guidance_scale=scale).sampling, **start}
        images = sample_and_save_images(count, diffusor, model, diffusor.device, folder, **how)
        rows.append(images[:GRID_IMAGES].clone())  # so that the others need not be kept
    if len(scales) > 1 and is_main():
        columns = min(16, len(rows[0]))
        shown, labels = [class_names[c] for c in (classes or ())[:columns]], [f"w = {w:g}" for w in scales]
        viz.save_grid(torch.cat([row[:columns] for row in rows]), out / "guidance_grid.png", columns, labels, shown)
