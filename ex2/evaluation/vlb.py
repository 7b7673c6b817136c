"""The variational lower bound (VLB) in bits per dimension (2.2 e)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ex2.evaluation.tables import VARIANCES
from ex2.machine.processes import all_gather_rows
from ex2.noise import randn
from ex2_diffusion import Diffusion
from ex2_train import evaluation_batches, labels_for


def prior_term(diffusor: Diffusion, x_zero: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_zero) || N(0, I)) in nats per dimension, (B,): what the last noise level tells of x_zero."""
    alphas_bar = diffusor.alphas_bar[-1].cpu().double()
    squared = x_zero.cpu().double().square().flatten(1).mean(1)
    return 0.5 * (alphas_bar * (squared - 1) - torch.log1p(-alphas_bar))


def reverse_variances(diffusor: Diffusion) -> dict[str, Tensor]:
    """sigma_t^2 of p(x_{t-1} | x_t), (T,) in float64, for each of `VARIANCES`.

    The posterior has no width at t = 0; there the decoder takes that of t = 1, as in Ho et al.'s code.
    """
    betas, posterior = diffusor.betas.cpu().double(), diffusor.posterior_variance.cpu().double()
    posterior[0] = posterior[1] if diffusor.timesteps > 1 else betas[0]
    return {"beta": betas, "beta_tilde": posterior}


def transition_terms(diffusor: Diffusion, x_zero: Tensor, estimate: Tensor, t: Tensor) -> dict[str, Tensor]:
    """L_t = KL(q(x_{t-1} | x_t, x_zero) || p(x_{t-1} | x_t)), t >= 1, for each of `VARIANCES`; Ho et al. 2020, Eq. 5.

    Both are Gaussians; their means differ by the x_zero `estimate`'s error times a factor of Eq. 7.

    Takes x_zero, estimate (B, C, H, W) and t (B,). Returns (B,) nats per dimension, float64 on the CPU.
    """
    t = t.cpu()
    squared_error = (estimate.cpu().double() - x_zero.cpu().double()).square().flatten(1).mean(1)  # (B,)
    squared_error = diffusor.posterior_mean_x_zero.cpu().double()[t].square() * squared_error
    posterior = diffusor.posterior_variance.cpu().double()[t]
    terms = {}
    for name, variance in reverse_variances(diffusor).items():
        ratio = posterior / variance[t]
        terms[name] = 0.5 * (ratio - 1 - ratio.log() + squared_error / variance[t])
    return terms


def discretised_log_likelihood(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Elementwise log probability of 8-bit pixels x in [-1, 1] under N(mean, sigma^2); Ho et al. 2020, Eq. 13.

    A pixel's bin is 2/255 wide; the bins of 0 and 255 are open at the ends, so the 256 probabilities sum to 1.
    """
    x = ((x.double() + 1) * 127.5).round() / 127.5 - 1  # float32 would leave gaps between the bins
    mean = mean.double()
    lower = ((x - 1 / 255 - mean) / sigma).masked_fill(x < -0.999, -math.inf)
    upper = ((x + 1 / 255 - mean) / sigma).masked_fill(x > 0.999, math.inf)
    # Above the mean both distribution functions round to 1; mirrored, they are small numbers that keep their digits.
    mirrored = lower > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_lower, log_upper = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return log_upper + torch.log1p(-torch.exp(log_lower - log_upper))


def decoder_terms(diffusor: Diffusion, x_zero: Tensor, estimate: Tensor) -> dict[str, Tensor]:
    """L_0 = -log p(x_zero | x_1) for each of `VARIANCES`, (B,) nats per dimension; the mean of p is the `estimate`."""
    x_zero, estimate = x_zero.cpu().double(), estimate.cpu().double()
    return {
        name: -discretised_log_likelihood(x_zero, estimate, math.sqrt(variance[0])).flatten(1).mean(1)
        for name, variance in reverse_variances(diffusor).items()
    }


def timestep_strata(timesteps: int, count: int) -> list[range]:
    """1 .. timesteps - 1 cut into at most `count` ranges; they widen with t, as the terms of the VLB fall with it."""
    if count >= timesteps - 1:
        return [range(t, t + 1) for t in range(1, timesteps)]
    edges = np.unique(np.geomspace(1, timesteps, count + 1).round().astype(int)).tolist()
    return [range(start, stop) for start, stop in zip(edges, edges[1:])]


@torch.no_grad()
def bits_per_dim(model, loader: Iterable, diffusor: Diffusion, draws: int, max_images: int | None = None) -> dict:
    """Bits per dimension of 8-bit images by the VLB, L_T + L_{T-1} + ... + L_0: an upper bound.

    Monte Carlo over images and timesteps: 1 .. T-1 is cut into strata (`timestep_strata`), and each image draws one
    timestep from each, with its own noise. The sum of stratum size times term is unbiased; its spread over the images
    gives the standard error. From T - 1 draws on every timestep is evaluated. The x_zero estimate is clamped, as in
    sampling.

    Args:
        draws: at most how many timesteps per image beside t = 0.
        model, max_images: as in `loss_over_timesteps`.

    Returns: "images", "calls" of the model per image, "t" (first time of each stratum), "prior" (L_T), and for each of
    `VARIANCES` "total", "standard_error" (None for one image), "decoder" (L_0), "terms" (mean L_t of each stratum).
    """
    strata = timestep_strata(diffusor.timesteps, draws)
    priors, terms = [], {name: [] for name in VARIANCES}  # batches of (B,), of (B, 1 + strata), in nats
    for images, labels, source in evaluation_batches(loader, diffusor.device, max_images):
        classes = labels_for(model, labels)
        columns = []  # of each stratum, name -> (B,)
        for stratum in (range(1), *strata):
            t = stratum.start + (source.draw((len(images),), torch.rand) * len(stratum)).long().to(diffusor.device)
            x_t = diffusor.q_sample(images, t, randn(images.shape, images.device, source))
            eps = diffusor.predict_noise(model, x_t, t, classes).float()
            estimate = diffusor.predict_x_zero(x_t, t, eps).clamp(-1, 1)
            if stratum.start == 0:
                columns.append(decoder_terms(diffusor, images, estimate))
            else:
                columns.append(transition_terms(diffusor, images, estimate, t))
        for name in VARIANCES:
            terms[name].append(torch.stack([column[name] for column in columns], dim=1))
        priors.append(prior_term(diffusor, images))

    sizes = torch.tensor([1.0, *map(len, strata)], dtype=torch.float64)
    prior = all_gather_rows(priors, "prior term of the VLB") / math.log(2)  # (N,)
    report = {"images": len(prior), "calls": 1 + len(strata), "t": [stratum.start for stratum in strata]}
    report["prior"] = prior.mean().item()
    for name in VARIANCES:
        bits = all_gather_rows(terms[name], "terms of the VLB") / math.log(2)  # (N, 1 + strata)
        totals = prior + bits @ sizes
        report[name] = {
            "total": totals.mean().item(),
            "standard_error": totals.std().item() / math.sqrt(len(totals)) if len(totals) > 1 else None,
            "decoder": bits[:, 0].mean().item(),
            "terms": bits[:, 1:].mean(0).tolist(),
        }
    return report
