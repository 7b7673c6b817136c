"""The metrics of a trained model: losses, bits per dimension, class accuracy (2.2 e).

The report becomes `test_metrics.json`; docs/metrics.md has its schema.
"""

from __future__ import annotations

from functools import partial

import torch

from ex2.data.images import DataSplits, ImageSet, reverse_transform
from ex2.data.loader import make_loader
from ex2.data.sets import DATASETS
from ex2.evaluation.classifier import Evaluator
from ex2.evaluation.losses import losses_of_training
from ex2.evaluation.samples import evaluate_samples, inference_model, shared_samples
from ex2.evaluation.templates import TemplateClassifier
from ex2.evaluation.vlb import bits_per_dim
from ex2.machine.inference import InferenceModel
from ex2.settings.config import Config
from ex2_diffusion import Diffusion, evenly_spaced
from ex2_train import loss_over_timesteps

ACCURACY_SAMPLES = 200


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
