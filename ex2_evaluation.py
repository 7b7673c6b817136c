"""The figures of a trained model: losses, bits per dimension, and what its samples are worth (2.2 e, 2.4 c).

`evaluate` ends every training; `judge_samples` is what the `test` command adds to it. Both fill the report that becomes
`test_metrics.json`; README has its schema.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import ex2_viz as viz
from ex2_config import Config
from ex2_data import DataSplits, InputError, make_loader, reverse_transform, to_model_range
from ex2_diffusion import Diffusion, evenly_spaced, sample_in_batches
from ex2_features import (
    BATCH_SIZE,
    Inception,
    Reference,
    SmallClassifier,
    classifier_reference,
    inception_reference,
)
from ex2_metrics import (
    NOISE_SEED,
    VARIANCES,
    ShapesOracle,
    bits_per_dim,
    frechet_distance,
    kernel_distance,
    loss_over_timesteps,
    nearest,
    precision_recall,
)

ORACLE_SAMPLES = 200
MANIFOLD_LIMIT = 10_000  # images of each side for precision and recall: their cost grows with the square
DRY_RUN_SAMPLES = 16
MEMORY_CHECKED, MEMORY_SHOWN = 256, 16  # samples whose nearest training image is looked for, and shown


# ---------------------------------------------------------------------------- losses and bound


def evaluate(model, splits: DataSplits, diffusor: Diffusion, config: Config, weights: str = "ema") -> dict:
    """Losses of val and test, bits per dimension of test, for conditional shapes also the accuracy of a few samples.

    Prints them, draws their curves and writes `test_metrics.json`; returns the report.

    Args:
        model: in eval mode.  weights: which of the checkpoint's it has, for the report.
    """
    times = evenly_spaced(diffusor.timesteps, config.eval_timesteps)
    count = 1 if config.dry_run else config.eval_images
    loaders = {
        name: make_loader(getattr(splits, name), config.batch_size * 2, diffusor.device, num_workers=config.num_workers)
        for name in ("val", "test")
    }
    losses = {
        name: loss_over_timesteps(model, loader, diffusor, times, max_images=count) for name, loader in loaders.items()
    }
    if config.can_guide:
        for name, loader in loaders.items():
            losses[f"{name}_unconditional"] = loss_over_timesteps(
                model, loader, diffusor, times, max_images=count, unconditional=True
            )
    report = {
        "weights": weights,
        "schedule": config.schedule,
        "timesteps": config.timesteps,
        "losses": losses,
        "bits_per_dim": {
            "split": "test",
            "given": "the class" if config.class_free_guidance else "nothing",
            **bits_per_dim(model, loaders["test"], diffusor, config.eval_timesteps, count),
        },
    }
    if config.dataset == "shapes" and config.class_free_guidance:
        report["class_accuracy"] = shapes_accuracy(model, diffusor, config)
    print_losses(report)
    viz.plot_loss_over_t(losses, config.run_dir / "loss_over_t.png")
    viz.plot_bits_per_dim(report["bits_per_dim"], diffusor.timesteps, config.run_dir / "bits_per_dim.png")
    write_report(report, config)
    return report


def write_report(report: dict, config: Config) -> None:
    """The report as `test_metrics.json` of the run."""
    (config.run_dir / "test_metrics.json").write_text(json.dumps(report, indent=2) + "\n")


def shapes_accuracy(model, diffusor: Diffusion, config: Config) -> dict:
    """Share of conditional samples that the template oracle assigns to their class."""
    count = 10 if config.dry_run else ORACLE_SAMPLES
    classes = torch.arange(count) % model.null_class
    batches = sample_in_batches(
        diffusor, model, count, config.sample_batch, config.seed + 1, classes=classes, **config.sampling
    )
    accuracy = ShapesOracle(config.image_size).accuracy(reverse_transform(torch.cat(list(batches))), classes)
    return {"accuracy": accuracy, "samples": count, **config.sampling}


def print_losses(report: dict) -> None:
    """The losses as a table, a row per time; below it bits per dimension, and the class accuracy if there is one."""
    losses = report["losses"]
    columns = [("val", "l1"), ("val", "l2"), ("test", "l1"), ("test", "l2")]
    columns += [("test_unconditional", "l2")] if "test_unconditional" in losses else []
    titles = [f"{name.replace('test_unconditional', 'no class')} {loss}" for name, loss in columns]
    print("loss of the predicted noise")
    print(f"{'t':>6}", *(f"{title:>11}" for title in titles))
    for k, t in enumerate(losses["val"]["t"]):
        print(f"{t + 1:>6}", *(f"{losses[name][loss][k]:>11.4f}" for name, loss in columns))
    bound = report["bits_per_dim"]
    for name in VARIANCES:
        error = bound[name]["standard_error"]
        spread = "" if error is None else f" +- {error:.3f}"
        print(f"bits/dim of {bound['images']} test images, sigma^2 = {name}: {bound[name]['total']:.3f}{spread}")
    if "class_accuracy" in report:
        figures = report["class_accuracy"]
        print(f"{figures['accuracy']:.1%} of {figures['samples']} samples show their class")


# ---------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Judge:
    """What images are judged by: features to compare them with the training images, and a classifier or None."""

    reference: Reference
    classify: Callable[[Tensor], Tensor] | None  # labels (N,) of uint8 images (N, 3, H, W)


@dataclass(frozen=True)
class Described:
    """What a `Judge` keeps of a set of images: features (N, width), the first pixels, the share of right labels."""

    features: Tensor
    pixels: Tensor
    class_accuracy: float | None


def build_judge(splits: DataSplits, device, config: Config, count: int, inception_weights: str | None = None) -> Judge:
    """The features to judge by; classes are told by the oracle where it knows them, else by the small classifier.

    Args:
        count: how many samples shall be judged.
        inception_weights: their file; None takes the features of the data set's own classifier.

    Raises:
        InputError: too few samples or training images for the width of the features, or no usable Inception.
    """
    if config.dry_run:
        splits = dataclasses.replace(splits, train=splits.train.subset(torch.arange(min(256, len(splits.train)))))
    else:
        check_enough((Inception if inception_weights else SmallClassifier).width, count, splits)
    folder = config.run_dir if config.dry_run else Path(config.results_dir) / "features"
    inception = inception_reference(splits, inception_weights, folder, device) if inception_weights else None
    by_oracle = config.dataset == "shapes"
    if inception is not None and (by_oracle or not config.class_free_guidance):
        reference = inception
    else:
        classifier = classifier_reference(splits, folder, device, flip=config.flip)
        reference = inception or classifier
    if not config.class_free_guidance:
        return Judge(reference, None)
    return Judge(reference, ShapesOracle(config.image_size).classify if by_oracle else classifier.extractor.classify)


def check_enough(width: int, count: int, splits: DataSplits) -> None:
    """Raises an InputError where a covariance of `width` features would be singular."""
    training_images = len(splits.train) + len(splits.val)
    if count <= width:
        raise InputError(
            f"--eval_samples {count} are too few for features of width {width}: give more than {width}, better "
            f"{8 * width}, or 0 to judge no samples"
        )
    if training_images <= width:
        raise InputError(
            f"{training_images} training images are too few for features of width {width}: give --eval_samples 0"
        )


def judge_samples(
    judge: Judge,
    model,
    splits: DataSplits,
    diffusor: Diffusion,
    config: Config,
    *,
    count: int,
    scales: Sequence[float],
    weights: str = "ema",
) -> dict:
    """Samples at each guidance scale against the training images, with test images and noise beside them. 2.4 c.

    All scales start from the same noise. Prints a table, draws the trade-off and the nearest training images.

    Args:
        model: in eval mode.  count: samples per scale; of each batch only the features are kept, so any number fits.
        scales: of Eq. 11, beside the run's own; ignored where the model can't be guided.
        weights: which the model has, for the report.
    """
    count = DRY_RUN_SAMPLES if config.dry_run else count
    own_scale = config.sampling["guidance_scale"]
    labels = judge.reference.images.labels  # in random order, so the first ones have the proportions of all
    labels = labels[torch.arange(count) % len(labels)]
    real = describe(judge, real_batches(splits.test, count), diffusor.device)
    by_scale, own = [], None
    for scale in sorted({*scales, own_scale}) if config.can_guide else [own_scale]:
        samples = describe(judge, sampled_batches(model, diffusor, config, labels, scale), diffusor.device)
        by_scale.append({"guidance_scale": scale, **compare(judge.reference, samples)})
        own = samples if scale == own_scale else own
    report = {
        "weights": weights,
        "features": judge.reference.extractor.description,
        "reference": f"train and val, {len(judge.reference.features)} images",
        "count": count,
        "seed": config.seed + 1,
        "sampler": config.sampling["sampler"],
        "eta": config.sampling["eta"],
        "steps": config.sampling["steps"] or config.timesteps,
        "by_scale": by_scale,
        "test_images": {"count": len(real.features), **compare(judge.reference, real)},
        "noise": compare(judge.reference, describe(judge, noise_batches(count, real.pixels[0].shape), diffusor.device)),
        "memorisation": check_memorisation(judge.reference, own, real, config.run_dir / "nearest.png"),
    }
    print_samples(report)
    if len(by_scale) > 1:
        viz.plot_guidance(report, config.run_dir / "guidance_curve.png")
    return report


def describe(judge: Judge, batches: Iterable[tuple[Tensor, Tensor | None]], device) -> Described:
    """Goes through (uint8 images (B, 3, H, W), labels (B,) or None) once; holds one batch of images at a time."""
    features, pixels, right, kept = [], [], [], 0
    for images, labels in batches:
        images = images.to(device)
        features.append(judge.reference.extractor.features(images).cpu())
        if kept < MEMORY_CHECKED:
            pixels.append(images[: MEMORY_CHECKED - kept].cpu())
            kept += len(pixels[-1])
        if judge.classify is not None and labels is not None:
            right.append(judge.classify(images).cpu() == labels.cpu())
    accuracy = torch.cat(right).double().mean().item() if right else None
    return Described(torch.cat(features), torch.cat(pixels), accuracy)


def real_batches(dataset, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` images of a data set, as the judge takes them."""
    for images, labels in make_loader(dataset.subset(torch.arange(min(count, len(dataset)))), BATCH_SIZE, "cpu"):
        yield reverse_transform(images), labels


def noise_batches(count: int, shape: Sequence[int]) -> Iterator[tuple[Tensor, None]]:
    """Gaussian noise, clamped to the range of images: what a sampler starts from."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for part in torch.arange(count).split(BATCH_SIZE):
        yield reverse_transform(torch.randn(len(part), *shape, generator=generator)), None


def sampled_batches(
    model, diffusor: Diffusion, config: Config, labels: Tensor, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """One sample per label, at guidance scale `scale`; a model without classes makes as many."""
    settings = {**config.sampling, "guidance_scale": scale, "batch_size": config.sample_batch, "seed": config.seed + 1}
    classes = labels if config.class_free_guidance else None
    batches = sample_in_batches(diffusor, model, len(labels), classes=classes, **settings)
    with tqdm(total=len(labels), desc=f"judging, w = {scale:g}", leave=False, disable=None) as progress:
        for images, wanted in zip(batches, labels.split(config.sample_batch)):
            yield reverse_transform(images), wanted
            progress.update(len(images))


def compare(reference: Reference, images: Described) -> dict:
    """Figures of a set of images against the training images; the Fréchet distance needs more images than features."""
    features = images.features
    side = min(len(features), len(reference.features), MANIFOLD_LIMIT)
    kid, deviation = kernel_distance(reference.features, features)
    precision, recall = precision_recall(reference.features[:side], features[:side])
    enough = min(len(features), len(reference.features)) > features.shape[1]
    figures = {
        "frechet_distance": frechet_distance(reference.features, features) if enough else None,
        "kid": kid,
        "kid_deviation": deviation,
        "precision": precision,
        "recall": recall,
    }
    return figures if images.class_accuracy is None else {**figures, "class_accuracy": images.class_accuracy}


def check_memorisation(reference: Reference, samples: Described, real: Described, path: Path) -> dict:
    """Distance to the nearest training image, of samples and, to compare, of test images; draws a few pairs.

    A model that copies its training images has samples much closer to them than test images are. Medians, in grey
    levels (root mean square over pixels) and in feature space.
    """
    sizes = [len(samples.pixels), len(real.pixels)]
    pixels = torch.cat((samples.pixels, real.pixels)).flatten(1).float()  # (Q, 3 * H * W)
    gallery = (images.flatten(1).float() for images, _ in real_batches(reference.images, len(reference.images)))
    by_pixels, pixel_match = nearest(pixels, gallery)
    features = torch.cat((samples.features[: sizes[0]], real.features[: sizes[1]]))
    by_features, feature_match = nearest(features, reference.features.split(5000))
    rows = [to_model_range(samples.pixels[:MEMORY_SHOWN])]
    for match in (pixel_match, feature_match):
        rows.append(torch.stack([reference.images[i][0] for i in match[: len(rows[0])].tolist()]))
    viz.save_grid(torch.cat(rows), path, len(rows[0]), ["sample", "nearest training\nimage by pixels", "by features"])
    figures = {}
    for name, distances in (("pixels", by_pixels / pixels.shape[1] ** 0.5), ("features", by_features)):
        parts = zip(("samples", "test_images"), distances.split(sizes))
        figures[name] = {source: part.median().item() for source, part in parts}
    return {"images": dict(zip(("samples", "test_images"), sizes)), "median_distance": figures}


def print_samples(report: dict) -> None:
    """The figures of samples as a table, a row per guidance scale, between test images and noise."""
    name = "FID" if report["features"] == Inception.description else "Fréchet"
    made_with = f"{report['weights']} weights, {report['sampler']}, {report['steps']} steps"
    print(f"{report['count']} samples per scale ({made_with}) against {report['reference']}")
    print(f"features: {report['features']}")
    print(f"{'':>12} {name:>9} {'KID':>9} {'precision':>9} {'recall':>9} {'class acc.':>10}")
    rows = [("test images", report["test_images"])]
    rows += [(f"w = {row['guidance_scale']:g}", row) for row in report["by_scale"]]
    for title, row in (*rows, ("noise", report["noise"])):
        distance = "-" if row["frechet_distance"] is None else f"{row['frechet_distance']:.4g}"
        accuracy = f"{row['class_accuracy']:.1%}" if "class_accuracy" in row else "-"
        figures = f"{row['kid']:>9.4g} {row['precision']:>9.3f} {row['recall']:>9.3f}"
        print(f"{title:>12} {distance:>9} {figures} {accuracy:>10}")
    pixels = report["memorisation"]["median_distance"]["pixels"]
    print(
        f"nearest training image, median distance in grey levels: {pixels['samples']:.1f} from samples, "
        f"{pixels['test_images']:.1f} from test images (see nearest.png)"
    )
