"""How good is the model? Loss over the timesteps, bits per dimension, and distances between sets of images (2.2 e).

Nothing here draws or trains: tensors, loaders and a model go in, figures come out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from ex2_data import to_model_range
from ex2_diffusion import Diffusion, ImageNoise, check_images, extract, randn
from ex2_distributed import gathered_rows, share_of, total_of
from ex2_shapes import SHAPES, draw_shapes

NOISE_SEED = 20_201_216  # of every evaluation, so that figures of different runs are comparable
VARIANCES = ("beta", "beta_tilde")  # sigma_t^2 of the reverse process: beta_t, or that of the posterior


# ---------------------------------------------------------------------------- losses


def evaluation_batches(loader: Iterable, device, max_images: int | None) -> Iterator[tuple[Tensor, Tensor, ImageNoise]]:
    """Batches of the first `max_images` images of `loader`: (images, labels, their noise).

    Image i has the same noise in every run, at any batch size and on any device. Each process has its share of a batch.
    """
    seen = 0
    for images, labels in tqdm(loader, "evaluating", leave=False, disable=None):
        if max_images is not None:
            images, labels = images[: max_images - seen], labels[: max_images - seen]
        images, labels = images.to(device), labels.to(device)
        check_images(images)
        mine = share_of(len(images))
        if mine:
            source = ImageNoise(NOISE_SEED, seen + mine.start, len(mine))
            yield images[mine.start : mine.stop], labels[mine.start : mine.stop], source
        seen += len(images)
        if seen == max_images:
            return


def labels_for(model, labels: Tensor, unconditional: bool = False) -> tuple[Tensor, ...]:
    """The arguments after (x, t) in a call of `model`: the labels, null labels if `unconditional`, or nothing."""
    if not getattr(model, "class_free_guidance", False):
        return ()
    return (torch.full_like(labels, model.null_class) if unconditional else labels,)


@torch.no_grad()
def loss_over_timesteps(
    model, loader: Iterable, diffusor: Diffusion, times: Sequence[int], *, max_images=None, unconditional=False
) -> dict:
    """Mean error of the predicted noise and of the x_zero estimate at each of `times`, over images of `loader`.

    Image i gets the same noise at every time and in every run (`evaluation_batches`), so the figures of two models
    differ by the models alone.

    Args:
        model: in eval mode; (x_t, t) -> eps, or (x_t, t, classes) -> eps where its `class_free_guidance` is true.
        max_images: how many of the first images to take; None takes all.
        unconditional: give a class-conditional model the null token in place of the labels.

    Returns: {"t": [...], "log_snr": [...], "l1": [...], "l2": [...], "x_zero_l1": [...], "x_zero_l2": [...], "images":
    how many}. l1 and l2 are of eps: a predictor of zeros has l2 = 1. The x_zero estimate is clamped, as in sampling.
    """
    totals = {name: torch.zeros(len(times), dtype=torch.float64) for name in ("l1", "l2", "x_zero_l1", "x_zero_l2")}
    seen = torch.zeros((), dtype=torch.long)
    for images, labels, source in evaluation_batches(loader, diffusor.device, max_images):
        classes = labels_for(model, labels, unconditional)
        noise = randn(images.shape, images.device, source)
        for k, time in enumerate(times):
            t = torch.full((len(images),), time, device=diffusor.device, dtype=torch.long)
            x_t = diffusor.q_sample(images, t, noise)
            eps = model(x_t, t, *classes).float()
            x_zero = diffusor.predict_x_zero(x_t, t, eps).clamp(-1, 1)
            for of, estimate, truth in (("", eps, noise), ("x_zero_", x_zero, images)):
                totals[f"{of}l1"][k] += F.l1_loss(estimate, truth).item() * len(images)
                totals[f"{of}l2"][k] += F.mse_loss(estimate, truth).item() * len(images)
        seen += len(images)
    seen = int(total_of(seen, "images of the losses"))
    means = {name: (total_of(total, "losses") / seen).tolist() for name, total in totals.items()}
    return {"t": list(times), "log_snr": diffusor.log_snr[list(times)].tolist(), **means, "images": seen}


class OptimalDenoiser:
    """The best possible noise predictor on its own images: eps from the posterior mean of x_zero.

    By Bayes and Eq. 5 each image x_i weighs exp(-|x_t - sqrt(alphas_bar) x_i|^2 / (2 (1 - alphas_bar))). Of test images
    it knows nothing: there a trained model is far better.

    images: (N, 3, H, W) uint8.  labels: (N,), for a predictor that is told the class; None: it isn't.
    """

    def __init__(self, diffusor: Diffusion, images: Tensor, labels: Tensor | None = None):
        self.diffusor, self.images = diffusor, images
        self.labels = None if labels is None else labels.to(diffusor.device)
        self.class_free_guidance = labels is not None

    def gallery(self) -> Iterator[Tensor]:
        """The images in float64, (about 1000, D) at a time: float32 would mix up neighbours at small t."""
        for images in self.images.split(1000):
            yield to_model_range(images.to(self.diffusor.device)).double().flatten(1)

    def __call__(self, x_t: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        alphas_bar = extract(self.diffusor.alphas_bar.double(), t, (len(t), 1))
        signal, points = alphas_bar.sqrt(), x_t.double().flatten(1)
        logits = [signal * points @ part.T - 0.5 * alphas_bar * part.square().sum(1) for part in self.gallery()]
        logits = torch.cat(logits, dim=1) / (1 - alphas_bar)  # (B, N)
        if self.labels is not None:
            logits = logits.masked_fill(self.labels != classes[:, None], -math.inf)
        weights = logits.softmax(dim=1).split(1000, dim=1)
        x_zero = sum(part @ images for part, images in zip(weights, self.gallery()))
        return ((points - signal * x_zero) / (1 - alphas_bar).sqrt()).view_as(x_t).float()


# ---------------------------------------------------------------------------- the variational bound


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


def decoder_terms(
    diffusor: Diffusion, x_zero: Tensor, estimate: Tensor, log_likelihood: Callable = discretised_log_likelihood
) -> dict[str, Tensor]:
    """L_0 = -log p(x_zero | x_1) for each of `VARIANCES`, (B,) nats per dimension; the mean of p is the `estimate`."""
    x_zero, estimate = x_zero.cpu().double(), estimate.cpu().double()
    return {
        name: -log_likelihood(x_zero, estimate, math.sqrt(variance[0])).flatten(1).mean(1)
        for name, variance in reverse_variances(diffusor).items()
    }


def time_strata(timesteps: int, count: int) -> list[range]:
    """1 .. timesteps - 1 cut into at most `count` ranges; they widen with t, because the bound's terms fall with it."""
    if count >= timesteps - 1:
        return [range(t, t + 1) for t in range(1, timesteps)]
    edges = np.unique(np.geomspace(1, timesteps, count + 1).round().astype(int)).tolist()
    return [range(start, stop) for start, stop in zip(edges, edges[1:])]


@torch.no_grad()
def bits_per_dim(model, loader: Iterable, diffusor: Diffusion, draws: int, max_images: int | None = None) -> dict:
    """Bits per dimension of 8-bit images by the variational bound, L_T + L_{T-1} + ... + L_0: an upper bound.

    Monte Carlo over images and times: 1 .. T-1 is cut into strata (`time_strata`), and each image draws one time from
    each, with its own noise. The sum of stratum size times term is unbiased; its spread over the images gives the
    standard error. From T - 1 draws on every time is visited. The x_zero estimate is clamped, as in sampling.

    draws: at most how many times per image beside t = 0.  model, max_images: as in `loss_over_timesteps`.

    Returns: "images", "calls" of the model per image, "t" (first time of each stratum), "prior" (L_T), and for each of
    `VARIANCES` "total", "standard_error" (None for one image), "decoder" (L_0), "terms" (mean L_t of each stratum).
    """
    strata = time_strata(diffusor.timesteps, draws)
    priors, terms = [], {name: [] for name in VARIANCES}  # batches of (B,), of (B, 1 + strata), in nats
    for images, labels, source in evaluation_batches(loader, diffusor.device, max_images):
        classes = labels_for(model, labels)
        columns = {name: [] for name in VARIANCES}
        for stratum in (range(1), *strata):
            t = stratum.start + (source.draw((len(images),), torch.rand) * len(stratum)).long().to(diffusor.device)
            x_t = diffusor.q_sample(images, t, randn(images.shape, images.device, source))
            estimate = diffusor.predict_x_zero(x_t, t, model(x_t, t, *classes).float()).clamp(-1, 1)
            if stratum.start == 0:
                column = decoder_terms(diffusor, images, estimate)
            else:
                column = transition_terms(diffusor, images, estimate, t)
            for name in VARIANCES:
                columns[name].append(column[name])
        for name in VARIANCES:
            terms[name].append(torch.stack(columns[name], dim=1))
        priors.append(prior_term(diffusor, images))

    sizes = torch.tensor([1.0, *map(len, strata)], dtype=torch.float64)
    prior = gathered_rows(priors, "prior term of the bound") / math.log(2)  # (N,)
    report = {"images": len(prior), "calls": 1 + len(strata), "t": [stratum.start for stratum in strata]}
    report["prior"] = prior.mean().item()
    for name in VARIANCES:
        bits = gathered_rows(terms[name], "terms of the bound") / math.log(2)  # (N, 1 + strata)
        totals = prior + bits @ sizes
        report[name] = {
            "total": totals.mean().item(),
            "standard_error": totals.std().item() / math.sqrt(len(totals)) if len(totals) > 1 else None,
            "decoder": bits[:, 0].mean().item(),
            "terms": bits[:, 1:].mean(0).tolist(),
        }
    return report


# ---------------------------------------------------------------------------- distances between sets of features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D); Heusel et al. 2017, Eq. 6.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). https://arxiv.org/abs/1706.08500. It is called FID on
    Inception's features only.

    Raises ValueError: no more samples than features, so that a covariance is singular.
    """
    width, fewest = a.shape[1], min(len(a), len(b))
    if fewest <= width:
        raise ValueError(f"{fewest} samples are too few for {width} features: take more, or a covariance is singular")
    means = [x.double().mean(0) for x in (a, b)]
    covariances = [torch.cov(x.double().T).reshape(width, width) for x in (a, b)]
    # tr (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2), which stays real and symmetric.
    root_a, root_b = (matrix_root(c) for c in covariances)
    overlap = torch.linalg.matrix_norm(root_a @ root_b, "nuc")
    distance = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * overlap
    return max(0.0, distance.item())


def matrix_root(matrix: Tensor) -> Tensor:
    """The positive root of a positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """KID: squared maximum mean discrepancy with the cubic kernel, mean and deviation over 100 random subsets.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, as torchmetrics computes it, on features (N, D), (M, D).
    Unlike the Fréchet distance it has no bias that grows as samples get fewer.
    """
    size = min(1000, len(real) // 2, len(generated) // 2)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps the features in memory: we hand them over from there
        torch.manual_seed(NOISE_SEED)
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=100, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated images within the real ones' manifold (quality), and the reverse (diversity).

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991: the manifold is the union of balls around the features
    (N, D), each as wide as the distance to its `neighbours`-th neighbour. Give sets of equal size.
    """
    return share_inside(generated, real, neighbours), share_inside(real, generated, neighbours)


def share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of `points` (N, D) within the balls around `manifold` (M, D)."""
    distances = (torch.cdist(part, manifold) for part in manifold.split(1000))
    radii = torch.cat(
        [part.kthvalue(neighbours + 1, dim=1).values for part in distances]
    )  # (M,); + 1 for the point itself
    inside = [(torch.cdist(part, manifold) <= radii).any(dim=1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def nearest(queries: Tensor, gallery: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest row of `gallery`, given in batches (B, D), for each of `queries` (Q, D)."""
    best, index, first = torch.full((len(queries),), math.inf), torch.zeros(len(queries), dtype=torch.long), 0
    for rows in gallery:
        distance, where = torch.cdist(queries, rows).min(dim=1)
        closer = distance < best
        best, index = torch.where(closer, distance, best), torch.where(closer, first + where, index)
        first += len(rows)
    return best, index


# ---------------------------------------------------------------------------- the oracle for shapes


class ShapesOracle:
    """Tells the class of a picture of the `shapes` set by the rendered template that it resembles most.

    Knows the renderer and no trained network, so it can judge the samples of one. Colours are taken out first: each
    picture becomes one channel, its pixels' projection on the line between ground and paint.

    image_size: pixels.  templates: renders per class.
    """

    def __init__(self, image_size: int, templates: int = 800):
        labels = np.repeat(np.arange(len(SHAPES)), templates)
        rng = np.random.default_rng(NOISE_SEED)
        self.labels = torch.from_numpy(labels)
        parts = [self.normalised_masks(draw_shapes(part, image_size, rng)) for part in np.array_split(labels, 16)]
        self.templates = torch.cat(parts)

    @staticmethod
    def normalised_masks(images: Tensor) -> Tensor:
        """(N, H*W) of mean 0 and length 1, high on the shape, from (N, 3, H, W) uint8."""
        pixels = images.float() / 255
        if pixels.shape[-1] > 32:  # shapes are as plain at 32x32, and thousands of templates fit the memory
            pixels = F.interpolate(pixels, size=(32, 32), mode="area")
        edges = (pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1])  # 4 x (N, 3, H)
        border = torch.cat(edges, dim=-1)
        contrast = pixels.flatten(2) - border.median(dim=-1, keepdim=True).values  # (N, 3, H*W)
        paint = (contrast * contrast.norm(dim=1, keepdim=True)).mean(dim=-1, keepdim=True)  # (N, 3, 1)
        masks = (contrast * paint).sum(1)  # (N, H*W)
        return F.normalize(masks - masks.mean(-1, keepdim=True), dim=-1)

    def classify(self, images: Tensor) -> Tensor:
        """(N,) labels of (N, 3, H, W) uint8 images."""
        parts = [self.normalised_masks(part.cpu()) @ self.templates.T for part in images.split(500)]
        return self.labels[torch.cat(parts).argmax(dim=1)]

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images (N, 3, H, W) uint8 that show what their label (N,) says."""
        return (self.classify(images) == labels.cpu()).float().mean().item()
