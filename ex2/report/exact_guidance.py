"""What guidance samples, on data with a known answer: one pixel of two classes, N(+1, 0.5^2) and N(-1, 0.5^2) (2.4 b).

Many think that the guided noise of Eq. 11 samples p(x | c)^(1+w) / p(x)^w. It would if it were the score of that
distribution with noise added. But it is (1 + w) times one noisy score minus w times another, which is not the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import ex2_viz as viz
from ex2.noise import ImageNoise
from ex2_diffusion import SCHEDULES, Diffusion, extract

DEVIATION = 0.5  # of a class; its mean is +1 or -1
SCALES = (1.0, 3.0)  # w
STEPS, SAMPLES = 25, 5_000
GRID = torch.linspace(-1, 3.5, 451, dtype=torch.float64)  # pixels at which densities are computed
BLUR = 0.06  # standard deviation, in pixels, of what each sample adds to a density
TILTED = r"$p(x|c)^{1+w}\,/\,p(x)^w$"
WAYS = {  # label -> how samples are drawn
    "samples, deterministic": {"sampler": "heun"},
    "samples, fresh noise": {"sampler": "dpmpp_2m", "eta": 1.0},
}


class TwoClasses:
    """The exact prediction of the noise: of a class, 0 (mean 1) or 1 (mean -1), and of both, in closed form."""

    null_class = 2

    def __init__(self, process: Diffusion):
        self.process = process

    def __call__(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        alpha_bar = extract(self.process.alphas_bar, t, x.shape)
        variance = alpha_bar * DEVIATION**2 + 1 - alpha_bar
        both = torch.tanh(alpha_bar.sqrt() * x / variance)  # E[mean of the class | x_t]
        classes = classes.reshape(-1, 1, 1, 1)
        mean = torch.where(classes == self.null_class, both, 1 - 2.0 * classes)
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / variance


class EvenNoise(ImageNoise):
    """The first draw is the quantiles of N(0, 1), in order, so that deterministic samples are without chance."""

    def __init__(self):
        self.generator, self.started = torch.Generator().manual_seed(0), False

    def draw(self, shape, kind=torch.randn) -> Tensor:
        if self.started:
            return kind(*shape, generator=self.generator)
        self.started = True
        return torch.special.ndtri((torch.arange(shape[0]) + 0.5) / shape[0]).reshape(shape)


def guided_samples(guidance_scale: float, **sampling) -> Tensor:
    """`SAMPLES` guided samples (N,) of the class whose mean is 1, with a cosine schedule."""
    process = Diffusion(1000, SCHEDULES["cosine"], 1, "cpu")
    how = {"guidance_scale": guidance_scale, "classes": torch.zeros(SAMPLES, dtype=torch.long), "steps": STEPS}
    how.update(generator=EvenNoise(), clamp=False, **sampling)
    return process.sample(TwoClasses(process), 1, SAMPLES, 1, **how).flatten()


def tilted_density(guidance_scale: float) -> Tensor:
    """p(x | c)^(1+w) / p(x)^w at the pixels of `GRID`, with integral 1."""
    of_class, other = (-((GRID - mean) ** 2) / (2 * DEVIATION**2) for mean in (1, -1))
    density = (of_class + guidance_scale * (of_class - torch.logaddexp(of_class, other))).exp()
    return density / torch.trapezoid(density, GRID)


def draw_exact_guidance(path: Path) -> None:
    """For each w the density of the class, that of p(x | c)^(1+w) / p(x)^w, and those of guided samples, blurred."""
    curves = {}
    for w in SCALES:
        curves[w] = {"the class: w = 0": (GRID, tilted_density(0.0)), TILTED: (GRID, tilted_density(w))}
        for label, how in WAYS.items():
            samples = torch.distributions.Normal(guided_samples(w, **how).double(), BLUR)
            curves[w][label] = (GRID, samples.log_prob(GRID[:, None]).exp().mean(dim=1))
    viz.plot_guided_densities(curves, path)
