"""What the samples of a model are worth (2.2 e, 2.4 c)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import ex2_viz as viz
from ex2.data.images import DataSplits, reverse_transform, to_model_range
from ex2.data.loader import make_loader
from ex2.data.sets import DATASETS
from ex2.errors import InputError
from ex2.evaluation.classifier import (
    BATCH_SIZE,
    Evaluator,
    Inception,
    SmallClassifier,
    evaluator_by_classifier,
    evaluator_by_inception,
    real_batches,
    rounded_features,
)
from ex2.evaluation.distances import frechet_distance, kernel_distance, nearest, precision_recall
from ex2.evaluation.templates import TemplateClassifier
from ex2.machine.inference import InferenceModel
from ex2.machine.job import computes_in_bfloat16
from ex2.machine.processes import all_gather_rows, is_main, shard
from ex2.machine.progress import track
from ex2.noise import ImageNoise, sample_in_batches
from ex2.settings.config import Config
from ex2_diffusion import SPACING
from ex2_train import NOISE_SEED

MANIFOLD_LIMIT = 10_000  # images of each side for precision and recall: their cost grows with the square
DRY_RUN_SAMPLES = 16
FEWEST_COMPARED = 8  # images, for neighbours and kernels
MEMORISATION_SAMPLES, MEMORISATION_SHOWN = 256, 16  # samples whose nearest training image is looked for, and shown


def shared_samples(
    diffusor, model, count: int, batch_size: int, seed: int, *, classes=None, first: int = 0, **sampling
) -> Tensor:
    """`count` images (N, C, H, W) on the CPU, each process sampling its part; arguments as in `sample_in_batches`."""
    mine = shard(count)
    own = {"classes": None if classes is None else classes[mine.start : mine.stop], "first": first + mine.start}
    batches = sample_in_batches(diffusor, model, len(mine), batch_size, seed, **own, **sampling)
    return all_gather_rows(list(batches), "samples")


@dataclass(frozen=True)
class ImageFeatures:
    """What an `Evaluator` keeps of a set of images: features (N, width), the first pixels, the class accuracy."""

    features: Tensor
    pixels: Tensor
    class_accuracy: float | None


def inference_model(model, config: Config, device) -> InferenceModel:
    """The model for drawing samples, in the precision of its training."""
    return InferenceModel(model, computes_in_bfloat16(config.amp, device))


def build_evaluator(
    splits: DataSplits, device, config: Config, run_dir: Path, count: int, scales=(), inception_weights=None
) -> Evaluator | None:
    """The evaluator of samples. Templates tell the classes of shapes, the small classifier those of other data.

    Args:
        splits: the data set.
        run_dir: of the run. `features/` beside it keeps classifiers and features, for all runs there.
        count: samples to evaluate, at each guidance scale; of none there is no evaluator.
        scales: guidance scales, beside the run's own.
        inception_weights: file of Inception's weights; None takes the features of the small classifier.

    Raises InputError: too few samples or training images for the width of the features, or no usable Inception.
    """
    if count == 0:
        return None
    if config.dry_run:
        folder, count = config.run_dir, DRY_RUN_SAMPLES
        splits = replace(splits, train=splits.train.subset(torch.arange(min(256, len(splits.train)))))
    else:
        folder = run_dir.resolve().parent / "features"
        check_enough((Inception if inception_weights else SmallClassifier).width, count, splits)
    has_classes = config.class_free_guidance and len(splits.class_names) > 1
    by_templates = has_classes and DATASETS[config.dataset].has_templates
    evaluator = classify = None
    if inception_weights:
        evaluator = evaluator_by_inception(splits, inception_weights, folder, device, config.num_workers)
    if evaluator is None or (has_classes and not by_templates):
        by_classifier = evaluator_by_classifier(splits, folder, device, config.flip, config.num_workers)
        evaluator, classify = evaluator or by_classifier, by_classifier.classify
    if by_templates:
        classify = TemplateClassifier(config.image_size).classify
    return replace(evaluator, classify=classify if has_classes else None, count=count, scales=scales)


def check_enough(width: int, count: int, splits: DataSplits) -> None:
    """Raises an InputError where a covariance of `width` features would be singular."""
    too_few, training_images = f"too few for features of width {width}", len(splits.train) + len(splits.val)
    if count <= width:
        raise InputError(f"--eval_samples {count} are {too_few}: give more, better {8 * width}, or 0 to evaluate none")
    if training_images <= width:
        raise InputError(f"{training_images} training images are {too_few}: give --eval_samples 0")


def evaluation_settings(evaluator: Evaluator, config: Config) -> dict:
    """What the metrics of samples depend on beside the model: how they are drawn and compared."""
    drawn = {"seed": config.seed + 1, "own_scale": config.sampling["guidance_scale"], "sampler": config.sampler}
    drawn.update(eta=config.eta, guidance_interval=list(config.guidance_interval), spacing=SPACING)
    drawn.update(steps=config.sampling["steps"] or config.timesteps)
    return {"features": evaluator.extractor.description, "count": evaluator.count, **drawn}


def evaluate_samples(evaluator: Evaluator, model, splits: DataSplits, diffusor, config: Config, weights="ema") -> dict:
    """Samples at each guidance scale against the training images, with test images and noise beside them. 2.4 c.

    All scales start from the same noise. Of each batch only the features are kept, so any number fits. Draws the
    nearest training images. Each process samples its part; all have the same report.

    Args:
        model: in eval mode.
        weights: which it has, for the report.
    """
    count, own_scale = evaluator.count, config.sampling["guidance_scale"]
    labels = evaluator.images.labels  # in random order, so the first ones have the proportions of all
    labels = labels[torch.arange(count) % len(labels)]
    tested = splits.test.subset(torch.arange(min(count, len(splits.test))))
    real = extract_features(evaluator, real_batches(tested, "cpu", evaluator.num_workers), diffusor.device)
    noise = extract_features(evaluator, noise_batches(count, real.pixels[0].shape), diffusor.device)
    by_scale, own = [], None
    for scale in sorted({*evaluator.scales, own_scale}) if config.can_guide else [own_scale]:
        samples = extract_features(evaluator, sampled_batches(model, diffusor, config, labels, scale), diffusor.device)
        row = {"guidance_scale": scale, **compare(evaluator, samples)}
        if len(real.features) < count:  # the distance falls with the number of images
            first = samples.features[: len(real.features)]
            row["frechet_distance_at_test_count"] = frechet_distance(evaluator.features, first)
        by_scale.append(row)
        own = samples if scale == own_scale else own
    return {
        "weights": weights,
        "reference": f"train and val, {len(evaluator.features)} images",
        **evaluation_settings(evaluator, config),
        "by_scale": by_scale,
        "test_images": compare(evaluator, real),
        "noise": compare(evaluator, noise),
        "memorisation": check_memorisation(evaluator, own, real, diffusor.device, config.run_dir / "nearest.png"),
    }


def extract_features(evaluator: Evaluator, batches: Iterable[tuple[Tensor, Tensor | None]], device) -> ImageFeatures:
    """Features of batches of (uint8 images (B, 3, H, W), labels (B,) or None); holds one batch at a time.

    The batches are this process's part (`shard`) of the images, the result is of all.
    """
    features, pixels, right, kept = [], [], [], 0
    for images, labels in batches:
        images = images.to(device)
        features.append(rounded_features(evaluator.extractor, images))
        if kept < MEMORISATION_SAMPLES:
            pixels.append(images[: MEMORISATION_SAMPLES - kept].cpu())
            kept += len(pixels[-1])
        if evaluator.classify is not None and labels is not None:
            right.append(evaluator.classify(images).cpu() == labels.cpu())
    right = all_gather_rows(right, "classes of images")
    return ImageFeatures(
        all_gather_rows(features, "features of images"),
        all_gather_rows(pixels, "pixels of images")[:MEMORISATION_SAMPLES],
        right.double().mean().item() if len(right) else None,
    )


def noise_batches(count: int, shape: Sequence[int]) -> Iterator[tuple[Tensor, None]]:
    """This process's part of Gaussian noise, clamped to the range of images: what a sampler starts from."""
    mine = shard(count)
    for first in range(mine.start, mine.stop, BATCH_SIZE):
        size = min(BATCH_SIZE, mine.stop - first)
        noise = ImageNoise(NOISE_SEED, first, size).draw((size, *shape))
        yield reverse_transform(noise), None


def sampled_batches(model, diffusor, config: Config, labels: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """One sample per label of this process's part, at guidance scale `scale`; as many of a model without classes."""
    mine = shard(len(labels))
    labels = labels[mine.start : mine.stop]
    settings = {**config.sampling, "guidance_scale": scale, "batch_size": config.sample_batch, "seed": config.seed + 1}
    classes = labels if config.class_free_guidance else None
    batches = sample_in_batches(diffusor, model, len(labels), classes=classes, first=mine.start, **settings)
    pairs, total = zip(batches, labels.split(config.sample_batch)), -(-len(labels) // config.sample_batch)
    for images, wanted in track(pairs, f"sampling, w = {scale:g}", total):
        yield reverse_transform(images), wanted


def compare(evaluator: Evaluator, images: ImageFeatures) -> dict:
    """Metrics of a set of images against the training images; None where there are too few images for one."""
    real, features = evaluator.features, images.features
    side = min(len(features), len(real), MANIFOLD_LIMIT)
    few = side < FEWEST_COMPARED
    kid, deviation = (None, None) if few else kernel_distance(real, features)
    precision, recall = (None, None) if few else precision_recall(real[:side], features[:side])
    metrics = {"count": len(features), "frechet_distance": frechet_distance(real, features)}
    metrics.update(kid=kid, kid_deviation=deviation, precision=precision, recall=recall, precision_recall_count=side)
    return metrics if images.class_accuracy is None else {**metrics, "class_accuracy": images.class_accuracy}


def check_memorisation(evaluator: Evaluator, samples: ImageFeatures, real: ImageFeatures, device, path: Path) -> dict:
    """Distance to the nearest training image, of samples and, to compare, of test images; draws a few pairs.

    A model that copies its training images, or mirrors them, has samples much nearer to them than test images are.
    But flat and blurred pictures are near to everything: the picture decides.

    Returns: how many images of each were looked at, and, by pixels (root mean square, in grey levels) and by features,
    the median distances and the fraction of samples nearer than 95% of the test images: 5% where nothing is copied.
    """
    counts = {"samples": len(samples.pixels), "test_images": len(real.pixels)}
    queries = torch.cat((samples.pixels, real.pixels))
    queries = torch.cat((queries, queries.flip(-1)))  # a mirrored copy is a copy, too
    # All of them, in every process.
    gallery = make_loader(evaluator.images, BATCH_SIZE, "cpu", num_workers=evaluator.num_workers)
    gallery = track(gallery, "nearest training images", len(gallery))
    features = rounded_features(evaluator.extractor, queries.to(device))
    pixels = (reverse_transform(images).flatten(1).float() for images, _ in gallery)
    found = {
        "pixels": nearest(queries.flatten(1).float(), pixels),
        "features": nearest(features, evaluator.features.split(5000)),
    }
    grey_levels = queries[0].numel() ** 0.5
    rows, report = [to_model_range(samples.pixels[:MEMORISATION_SHOWN])], {"images": counts}
    for name, (distance, index) in found.items():
        mirrored = distance.view(2, -1).argmin(0)
        index = index.view(2, -1).gather(0, mirrored[None])[0]
        distance = distance.view(2, -1).amin(0) / (grey_levels if name == "pixels" else 1)
        of_samples, of_test = distance.split(list(counts.values()))
        rows.append(torch.stack([evaluator.images[i][0] for i in index[: len(rows[0])].tolist()]))
        report[name] = {
            "median": {"samples": of_samples.median().item(), "test_images": of_test.median().item()},
            "fraction_nearer": (of_samples < of_test.quantile(0.05)).double().mean().item(),
        }
    if is_main():
        labels = ["sample", "nearest training\nimage by pixels", "by features"]
        viz.save_grid(torch.cat(rows), path, len(rows[0]), labels)
    return report
