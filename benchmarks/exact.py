"""What samplers make of data with a known answer: one pixel, N(mean, deviation^2), the exact prediction of the noise.

    python benchmarks/exact.py > docs/exact.md          some ten minutes on one CPU core

Where nothing is clamped a sampler is an affine map of the noise it draws. `UnitNoise` draws one unit of noise per image
of a batch, so that a batch holds the columns of that map, and mean and deviation follow without chance. Clamped samples
are drawn. Where diffusers is installed, its schedulers with their defaults stand beside ours, on the same betas.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ex2.evaluation.tables import as_markdown  # noqa: E402
from ex2.noise import ImageNoise  # noqa: E402
from ex2_diffusion import SCHEDULES, Diffusion  # noqa: E402

STEPS = (5, 8, 10, 15, 25, 50, 334, 501, 999, 1000)
DATA = ((0.0, 0.5), (0.6, 0.2))  # (mean, deviation)
SETTINGS = {
    "ddpm": {"sampler": "ddpm"},
    "ddim": {"sampler": "ddim"},
    "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "dpmpp_2m, eta 1": {"sampler": "dpmpp_2m", "eta": 1.0},
    "heun": {"sampler": "heun"},
    "ipndm": {"sampler": "ipndm"},
}
DIFFUSERS = {  # scheduler -> settings other than the betas; the rest are its defaults
    "DDPMScheduler": {},
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler, SDE": {"algorithm_type": "sde-dpmsolver++"},
    "HeunDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
}
SAMPLES = 5_000


class UnitNoise(ImageNoise):
    """Draw number k is 1 in image k and 0 in all others."""

    def __init__(self):
        self.drawn = 0

    def draw(self, shape, kind: Callable = torch.randn) -> Tensor:
        noise = torch.zeros(shape)
        noise[self.drawn] = 1
        self.drawn += 1
        return noise


def exact_noise(process: Diffusion, mean: float, deviation: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t) -> E[eps | x_t] for data N(mean, deviation^2) per pixel.

    Between two timesteps, which some schedulers of diffusers visit, sigma / alpha is linear in t, as it is there.
    """
    ratios = torch.tensor([math.sqrt(1 / alpha_bar - 1) for alpha_bar in process.alphas_bar_exact])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        ratio = torch.lerp(ratios[t.floor().long()], ratios[t.ceil().long()], (t - t.floor()).float())
        alpha = (1 + ratio**2).rsqrt().reshape(-1, 1, 1, 1)
        sigma = ratio.reshape(-1, 1, 1, 1) * alpha
        return sigma * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    return predict


def moments(process: Diffusion, model, steps: int, **settings) -> tuple[float, float]:
    """Mean and standard deviation of unclamped one-pixel samples of an affine `model`, without chance."""
    adds_noise = settings["sampler"] == "ddpm" or settings.get("eta", 0) > 0
    images = (steps if adds_noise else 1) + 1  # one per draw, x_T among them, and one without any noise
    trajectory = process.sample_trajectory(
        model, 1, images, 1, steps=steps, clamp=False, generator=UnitNoise(), **settings
    )
    *columns, mean = last(trajectory).flatten().double().tolist()
    return mean, sum((column - mean) ** 2 for column in columns) ** 0.5


def sampled_moments(process: Diffusion, model, steps: int, **settings) -> tuple[float, float]:
    """Mean and standard deviation of `SAMPLES` clamped samples of one pixel."""
    noise = torch.Generator().manual_seed(0)
    x = last(process.sample_trajectory(model, 1, SAMPLES, 1, steps=steps, generator=noise, **settings))
    return x.mean().item(), x.std().item()


def last(trajectory) -> Tensor:
    for _, x, _ in trajectory:  # noqa: B007
        pass
    return x


def their_moments(process: Diffusion, model, steps: int, name: str) -> tuple[float, float]:
    """Mean and standard deviation of `SAMPLES` samples by a scheduler of diffusers on the process's betas."""
    import diffusers

    kind = getattr(diffusers, name.partition(",")[0])
    scheduler = kind(process.timesteps, trained_betas=process.betas.numpy(), **DIFFUSERS[name])
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 1, 1, 1) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, torch.full((SAMPLES,), float(t))), t, x).prev_sample
    return x.mean().item(), x.std().item()


def rows(process: Diffusion, names, measure: Callable[[str, int], tuple[float, float]], schedule: str) -> list[dict]:
    """A row per sampler: "mean, deviation" for every number of steps."""
    table = []
    for name in names:
        row = {"schedule": schedule, "sampler": name}
        for steps in (steps for steps in STEPS if steps <= process.timesteps):
            row[str(steps)] = "{:.3f}, {:.3f}".format(*measure(name, steps))
        table.append(row)
        print(name, schedule, process.timesteps, file=sys.stderr)
    return table


def tables(timesteps: int, mean: float, deviation: float, diffusers_version: str | None) -> dict[str, list[dict]]:
    """Title -> table of all samplers and schedules, unclamped and clamped, and of diffusers where it is there."""
    kinds = ["exact, not clamped", f"{SAMPLES:,} samples, x_zero clamped"]
    kinds += [f"diffusers {diffusers_version}, defaults, {SAMPLES:,} samples"] if diffusers_version else []
    found = {kind: [] for kind in kinds}
    for schedule, betas in SCHEDULES.items():
        process = Diffusion(timesteps, betas, 1, "cpu")
        model = exact_noise(process, mean, deviation)
        ways = [
            (SETTINGS, lambda name, steps, p=process, m=model: moments(p, m, steps, **SETTINGS[name])),
            (SETTINGS, lambda name, steps, p=process, m=model: sampled_moments(p, m, steps, **SETTINGS[name])),
            (DIFFUSERS, lambda name, steps, p=process, m=model: their_moments(p, m, steps, name)),
        ]
        for kind, (names, measure) in zip(kinds, ways):
            found[kind] += rows(process, names, measure, schedule)
    return {f"N({mean:g}, {deviation:g}^2), T = {timesteps}: {kind}": table for kind, table in found.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        from diffusers import __version__ as version
    except ImportError:
        version = None
    print(
        "# Samplers on data with a known answer\n\nMade by `python benchmarks/exact.py > docs/exact.md`: mean and "
        "deviation of the samples by number of steps.\n[Which sampler?](samplers.md) says what they mean."
    )
    for timesteps in (1000, 100):
        for mean, deviation in DATA:
            for title, table in tables(timesteps, mean, deviation, version).items():
                print(f"\n## {title}\n\n{as_markdown(table)}", end="")


if __name__ == "__main__":
    main()
