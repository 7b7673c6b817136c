"""The metrics of a trained model: losses, bits per dimension, class accuracy (2.2 e).

`evaluate` ends every training, `evaluate_with_samples` is what `test` and `compare` do. Their report becomes
`test_metrics.json`; docs/metrics.md has its schema.
"""

from __future__ import annotations

import torch

from ex2.data.images import DataSplits, ImageSet, reverse_transform
from ex2.data.loader import make_loader
from ex2.data.sets import DATASETS
from ex2.evaluation.losses import losses_of_training
from ex2.evaluation.samples import evaluate_samples, inference_model, shared_samples
from ex2.evaluation.templates import TemplateClassifier
from ex2.evaluation.vlb import bits_per_dim
from ex2.machine.inference import InferenceModel
from ex2.settings.config import Config
from ex2_diffusion import Diffusion, evenly_spaced
from ex2_train import loss_over_timesteps

ACCURACY_SAMPLES = 200


def evaluate(model, splits: DataSplits, diffusor: Diffusion, config: Config, weights: str = "ema") -> dict:
    """Losses of val and test, bits per dimension of test; where templates tell the classes, accuracy of a few samples.

    Each process evaluates its part; all have the same report. Losses are in float32, samples in the precision of the
    training.

    Args:
        model: the U-Net in eval mode.
        weights: which of the checkpoint's it has, "ema" or "raw".
    """
    network = InferenceModel(model)
    timesteps = evenly_spaced(diffusor.timesteps, config.eval_timesteps)
    count = 1 if config.dry_run else config.eval_images
    loaders = {
        name: make_loader(getattr(splits, name), config.batch_size * 2, diffusor.device, num_workers=config.num_workers)
        for name in ("val", "test")
    }
    sets = {"val": ("val", False), "test": ("test", False)}  # losses of -> (images of, without their classes)
    if config.can_guide:
        sets["test_unconditional"] = ("test", True)
    losses = {
        name: loss_over_timesteps(network, loaders[part], diffusor, timesteps, max_images=count, unconditional=without)
        for name, (part, without) in sets.items()
    }
    if isinstance(splits.train, ImageSet):
        losses.update(losses_of_training(network, splits.train, diffusor, config, timesteps))
    vlb = {"split": "test", "given": "the class" if config.class_free_guidance else "nothing"}
    vlb.update(bits_per_dim(network, loaders["test"], diffusor, config.eval_timesteps, count))
    report = {"weights": weights, "classes": len(splits.class_names)}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report.update({name: getattr(config, name) for name in ("schedule", "timesteps", "eval_images")})
    report.update(losses=losses, bits_per_dim=vlb)
    if DATASETS[config.dataset].has_templates and config.class_free_guidance:
        report["class_accuracy"] = template_accuracy(inference_model(model, config, diffusor.device), diffusor, config)
    return report


def evaluate_with_samples(
    evaluator, model, splits, diffusor, config: Config, count: int, scales, weights="ema"
) -> dict:
    """`evaluate`, and, where there is an evaluator, the metrics of `count` samples per guidance scale of `scales`."""
    report = evaluate(model, splits, diffusor, config, weights)
    if evaluator is not None:
        model = inference_model(model, config, diffusor.device)
        how = {"count": count, "scales": scales, "weights": weights}
        report["samples"] = evaluate_samples(evaluator, model, splits, diffusor, config, **how)
    return report


def template_accuracy(model, diffusor: Diffusion, config: Config) -> dict:
    """Fraction of conditional samples that a `TemplateClassifier` assigns to their class."""
    count = 10 if config.dry_run else ACCURACY_SAMPLES
    classes = torch.arange(count) % model.null_class
    common = {"classes": classes, **config.sampling}
    images = shared_samples(diffusor, model, count, config.sample_batch, config.seed + 1, **common)
    accuracy = TemplateClassifier(config.image_size).accuracy(reverse_transform(images), classes)
    return {"accuracy": accuracy, "samples": count, **config.sampling}
