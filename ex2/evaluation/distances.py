"""Distances between two sets of image features (2.2 e)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ex2_train import NOISE_SEED

EXACT = "donot_use_mm_for_euclid_dist"  # the distance of two equal rows is 0; torch's faster way rounds it up


def frechet_distance(a: Tensor, b: Tensor) -> float | None:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D); Heusel et al. 2017, Eq. 6.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), as torchmetrics computes it. https://arxiv.org/abs/1706.08500.
    It is called FID on Inception's features only. None: no more samples than features, so a covariance is singular.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, as it takes a second: `sample` needs none

    if min(len(a), len(b)) <= a.shape[1]:
        return None
    features = torch.nn.Identity()
    features.num_features = a.shape[1]
    metric = FrechetInceptionDistance(features)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return max(0.0, metric.compute().item())


def kernel_distance(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """KID: squared maximum mean discrepancy with the cubic kernel, mean and deviation over 100 random subsets.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, as torchmetrics computes it, on features (N, D), (M, D).
    Unlike the Fréchet distance it has no bias that grows as samples get fewer.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

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
    """Fraction of generated images within the real ones' manifold (quality), and the reverse (diversity).

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991: the manifold is the union of balls around the features
    (N, D), each as wide as the distance to its `neighbours`-th neighbour. Give sets of equal size.
    """
    return fraction_inside(generated, real, neighbours), fraction_inside(real, generated, neighbours)


def fraction_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Fraction of `points` (N, D) within the balls around `manifold` (M, D)."""
    distances = (torch.cdist(part, manifold, compute_mode=EXACT) for part in manifold.split(1000))
    # The nearest one is the point itself.
    radii = torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in distances])  # (M,)
    inside = [(torch.cdist(part, manifold, compute_mode=EXACT) <= radii).any(dim=1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def nearest(queries: Tensor, gallery: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest row of `gallery`, given in batches (B, D), for each of `queries` (Q, D)."""
    best, index, first = torch.full((len(queries),), math.inf), torch.zeros(len(queries), dtype=torch.long), 0
    for rows in gallery:
        where = torch.cdist(queries, rows).argmin(dim=1)
        distance = (queries - rows[where]).norm(dim=1)  # what cdist says of copies is not 0
        closer = distance < best
        best, index = torch.where(closer, distance, best), torch.where(closer, first + where, index)
        first += len(rows)
    return best, index
