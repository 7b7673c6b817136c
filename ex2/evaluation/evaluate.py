"""The metrics of a trained model: losses, bits per dimension, class accuracy (2.2 e).

The report becomes `test_metrics.json`; docs/metrics.md has its schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ex2.data.images import DataSplits, ImageSet, reverse_transform, to_model_range
from ex2.data.loader import make_loader
from ex2.data.sets import DATASETS
from ex2.evaluation.classifier import Evaluator
from ex2.evaluation.samples import evaluate_samples, inference_model, shared_samples
from ex2.evaluation.templates import TemplateClassifier
from ex2.evaluation.vlb import bits_per_dim
from ex2.machine.inference import InferenceModel
from ex2.settings.config import Config
from ex2_diffusion import Diffusion, evenly_spaced, extract
from ex2_train import loss_over_timesteps

ACCURACY_SAMPLES = 200
OPTIMAL_IMAGES = 64  # training images whose loss is compared with the best possible one


def evaluate(
    model, splits: DataSplits, diffusor: Diffusion, config: Config, evaluator: Evaluator | None = None, weights="ema"
) -> dict:
    """Losses of val and test, bits per dimension of test; where templates tell the classes, accuracy of a few samples.

    Each process evaluates its part; all have the same report. Losses are in float32, samples in the precision of the
    training.

    Args:
        model: the U-Net in eval mode.
        evaluator: of samples, as `test` and `compare` have one; None: after a training no more are drawn.
        weights: which of the checkpoint's it has, "ema" or "raw".
    """
    network, count = InferenceModel(model), 1 if config.dry_run else config.eval_images
    timesteps = evenly_spaced(diffusor.timesteps, config.eval_timesteps)
    how = {"device": diffusor.device, "num_workers": config.num_workers}
    val, test = (make_loader(part, config.batch_size * 2, **how) for part in (splits.val, splits.test))
    loss = partial(loss_over_timesteps, network, diffusor=diffusor, timesteps=timesteps, max_images=count)
    losses = {"val": loss(val), "test": loss(test)}
    if config.can_guide:
        losses["test_unconditional"] = loss(test, unconditional=True)
    if isinstance(splits.train, ImageSet):
        losses.update(losses_of_training(network, splits.train, diffusor, config, timesteps))
    report = {
        "weights": weights,
        "classes": len(splits.class_names),
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: getattr(config, name) for name in ("schedule", "timesteps", "eval_images")},
        "losses": losses,
        "bits_per_dim": {
            "split": "test",
            "given": "the class" if config.class_free_guidance else "nothing",
            **bits_per_dim(network, test, diffusor, config.eval_timesteps, count),
        },
    }
    network = inference_model(model, config, diffusor.device)
    if DATASETS[config.dataset].has_templates and config.class_free_guidance:
        report["class_accuracy"] = template_accuracy(network, diffusor, config)
    if evaluator is not None:
        report["samples"] = evaluate_samples(evaluator, network, splits, diffusor, config, weights)
    return report


def template_accuracy(model, diffusor: Diffusion, config: Config) -> dict:
    """Fraction of conditional samples that a `TemplateClassifier` assigns to their class."""
    count = 10 if config.dry_run else ACCURACY_SAMPLES
    classes = torch.arange(count) % model.null_class
    how = {"batch_size": config.sample_batch, "seed": config.seed + 1, "classes": classes, **config.sampling}
    images = shared_samples(diffusor, model, count, **how)
    accuracy = TemplateClassifier(config.image_size).accuracy(reverse_transform(images), classes)
    return {"accuracy": accuracy, "samples": count, **config.sampling}


class IdealDenoiser:
    """The best possible noise predictor on its own images: eps from the posterior mean of x_zero.

    By Bayes and Eq. 5 each image x_i weighs exp(-|x_t - sqrt(alphas_bar) x_i|^2 / (2 (1 - alphas_bar))). It only knows
    the training set, so a trained model beats it on test images.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,), for a predictor that is given the class; None: it isn't.
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


def losses_of_training(model, train: ImageSet, diffusor: Diffusion, config: Config, timesteps: Sequence[int]) -> dict:
    """Losses of some training images: "train", the model's, and "optimal", the ideal denoiser's.

    On average over all training images no model is below the optimal loss.
    """
    count = 1 if config.dry_run else min(config.eval_images, OPTIMAL_IMAGES)
    loader = make_loader(train.subset(torch.arange(min(count, len(train)))), OPTIMAL_IMAGES, diffusor.device)
    images, labels = train.images, train.labels
    if config.flip:
        images, labels = torch.cat((images, images.flip(-1))), labels.repeat(2)
    optimal = IdealDenoiser(diffusor, images, labels if config.class_free_guidance else None)
    return {
        "train": loss_over_timesteps(model, loader, diffusor, timesteps),
        "optimal": loss_over_timesteps(optimal, loader, diffusor, timesteps),
    }
