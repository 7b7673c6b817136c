"""The figures of a trained model: losses, bits per dimension, and what its samples are worth (2.2 e, 2.4 c).

`evaluate` ends every training; `judge_samples` is what the `test` command adds to it. Both fill the report that becomes
`test_metrics.json`; docs/metrics.md has its schema.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import ex2_metrics as metrics
import ex2_viz as viz
from ex2_checkpoint import RunLog, read_json, write_atomically
from ex2_config import Config
from ex2_data import DataSplits, ImageSet, InputError, reverse_transform, to_model_range
from ex2_diffusion import SPACING, Diffusion, ImageNoise, evenly_spaced, sample_in_batches
from ex2_distributed import gathered_rows, is_main, share_of, shared_samples
from ex2_features import BATCH_SIZE, Inception, Reference, SmallClassifier, classifier_reference, inception_reference
from ex2_loader import make_loader
from ex2_normal import images_seen, reference_losses, verdict

ORACLE_SAMPLES = 200
FLOOR_IMAGES = 64  # training images whose loss is compared with the best possible one
MANIFOLD_LIMIT = 10_000  # images of each side for precision and recall: their cost grows with the square
DRY_RUN_SAMPLES = 16
FEWEST_COMPARED = 8  # images, for neighbours and kernels
MEMORY_CHECKED, MEMORY_SHOWN = 256, 16  # samples whose nearest training image is looked for, and shown


# ---------------------------------------------------------------------------- losses and bound


def evaluate(model, splits: DataSplits, diffusor: Diffusion, config: Config, weights: str = "ema") -> dict:
    """Losses of val and test, bits per dimension of test, for conditional shapes also the accuracy of a few samples.

    Each process evaluates its share; all have the same report. `weights`: which of the checkpoint's the model has.
    """
    times = evenly_spaced(diffusor.timesteps, config.eval_timesteps)
    count = 1 if config.dry_run else config.eval_images
    loaders = {
        name: make_loader(getattr(splits, name), config.batch_size * 2, diffusor.device, num_workers=config.num_workers)
        for name in ("val", "test")
    }
    losses = {}
    for without, name in itertools.product((False, True) if config.can_guide else (False,), loaders):
        losses[f"{name}_unconditional" if without else name] = metrics.loss_over_timesteps(
            model, loaders[name], diffusor, times, max_images=count, unconditional=without
        )
    if isinstance(splits.train, ImageSet):
        losses.update(losses_of_training(model, splits.train, diffusor, config, times))
    bound = {"split": "test", "given": "the class" if config.class_free_guidance else "nothing"}
    bound.update(metrics.bits_per_dim(model, loaders["test"], diffusor, config.eval_timesteps, count))
    report = {"weights": weights, "parameters": sum(p.numel() for p in model.parameters())}
    report.update({name: getattr(config, name) for name in ("schedule", "timesteps", "eval_images")})
    report.update(losses=losses, bits_per_dim=bound)
    if config.dataset == "shapes" and config.class_free_guidance:
        report["class_accuracy"] = shapes_accuracy(model, diffusor, config)
    return report


def losses_of_training(model, train: ImageSet, diffusor: Diffusion, config: Config, times: Sequence[int]) -> dict:
    """Losses of some training images: "train", the model's, and "floor", the optimal one's.

    On average over all training images no model is below the floor.
    """
    count = 1 if config.dry_run else min(config.eval_images, FLOOR_IMAGES)
    loader = make_loader(train.subset(torch.arange(min(count, len(train)))), FLOOR_IMAGES, diffusor.device)
    images, labels = train.images, train.labels
    if config.flip:
        images, labels = torch.cat((images, images.flip(-1))), labels.repeat(2)
    optimal = metrics.OptimalDenoiser(diffusor, images, labels if config.class_free_guidance else None)
    return {
        "train": metrics.loss_over_timesteps(model, loader, diffusor, times),
        "floor": metrics.loss_over_timesteps(optimal, loader, diffusor, times),
    }


def write_report(report: dict, config: Config) -> None:
    """The report as tables, as curves and as `test_metrics.json` of the run; the first process alone writes.

    Figures of samples that are there from an earlier test stay where the losses show that the weights are the same.
    """
    if not is_main():
        return
    path = config.run_dir / "test_metrics.json"
    before, samples = read_json(path), report.get("samples")
    kept = {"samples": before["samples"]} if "samples" in before and before.get("losses") == report["losses"] else {}
    write_atomically(path, (json.dumps({**kept, **report}, indent=2) + "\n").encode())
    settings, log = dataclasses.asdict(config), RunLog.read(config.run_dir / "log.csv")
    reference = reference_losses(settings, report, images_seen(settings, log))
    curves = {**report["losses"], **({"our run": reference} if reference else {})}
    viz.plot_loss_over_t(curves, config.run_dir / "loss_over_t.png")
    viz.plot_bits_per_dim(report["bits_per_dim"], config.timesteps, config.run_dir / "bits_per_dim.png")
    if samples and len(samples["by_scale"]) > 1:
        viz.plot_guidance(samples, config.run_dir / "guidance_curve.png")
    print_losses(report)
    if samples:
        print_samples(samples)
    if not config.dry_run:
        print("is this normal?", *verdict(settings, report, log), sep="\n  ")


def shapes_accuracy(model, diffusor: Diffusion, config: Config) -> dict:
    """Share of conditional samples that the template oracle assigns to their class."""
    count = 10 if config.dry_run else ORACLE_SAMPLES
    classes = torch.arange(count) % model.null_class
    common = {"classes": classes, **config.sampling}
    images = shared_samples(diffusor, model, count, config.sample_batch, config.seed + 1, **common)
    accuracy = metrics.ShapesOracle(config.image_size).accuracy(reverse_transform(images), classes)
    return {"accuracy": accuracy, "samples": count, **config.sampling}


def print_losses(report: dict) -> None:
    """The losses as a table, a row per time; below it bits per dimension, and the class accuracy if there is one."""
    losses = report["losses"]
    columns = [("val", "l1"), ("val", "l2"), ("test", "l1"), ("test", "l2")]
    columns += [(name, "l2") for name in ("test_unconditional", "train", "floor") if name in losses]
    rows = [{"t": t + 1} for t in losses["val"]["t"]]
    for name, loss in columns:
        for row, value in zip(rows, losses[name][loss]):
            row[f"{name.replace('_', ' ')} {loss}"] = value
    print(f"loss of the predicted noise\n{as_markdown(rows)}", end="")
    bound = report["bits_per_dim"]
    for name in metrics.VARIANCES:
        error = bound[name]["standard_error"]
        spread = "" if error is None else f" +- {error:.3f}"
        print(f"bits/dim of {bound['images']} test images, sigma^2 = {name}: {bound[name]['total']:.3f}{spread}")
    if "class_accuracy" in report:
        figures = report["class_accuracy"]
        print(f"{figures['accuracy']:.1%} of {figures['samples']} samples show their class")


def figure(value) -> str:
    """A cell of a table: fractions to four digits, whole numbers as they are, a dash where there is none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return str(value)
    try:
        number = float(value)
    except ValueError:
        return str(value)
    if not math.isfinite(number):
        return str(value)
    return f"{number:.0f}" if number == round(number) or abs(number) >= 1000 else f"{number:.4g}"


def as_markdown(rows: Sequence[Mapping]) -> str:
    """A Markdown table with padded columns. The keys of the first row are its head."""
    lines = [list(rows[0]), *([figure(cell) for cell in row.values()] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, cells, widths))} |\n" for cells in lines)


# ---------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Judge:
    """What images are judged by: features to compare them with the training images, and a classifier or None."""

    reference: Reference
    classify: Callable[[Tensor], Tensor] | None  # labels (N,) of uint8 images (N, 3, H, W)
    num_workers: int = 0  # that read image files


@dataclass(frozen=True)
class Described:
    """What a `Judge` keeps of a set of images: features (N, width), the first pixels, the share of right labels."""

    features: Tensor
    pixels: Tensor
    class_accuracy: float | None


def build_judge(splits: DataSplits, device, config: Config, folder: Path, count: int, inception_weights=None) -> Judge:
    """The judge of samples. The oracle tells the classes of shapes, the small classifier those of other data.

    Args:
        folder: keeps the small classifier and the features of the training images for the next call.
        count: how many samples shall be judged.  inception_weights: their file, else the small classifier is taken.

    Raises InputError: too few samples or training images for the width of the features, or no usable Inception.
    """
    if config.dry_run:
        folder = config.run_dir
        splits = dataclasses.replace(splits, train=splits.train.subset(torch.arange(min(256, len(splits.train)))))
    else:
        check_enough((Inception if inception_weights else SmallClassifier).width, count, splits)
    by_oracle, workers = config.dataset == "shapes", config.num_workers
    has_classes = config.class_free_guidance and len(splits.class_names) > 1
    reference = classifier = classify = None
    if inception_weights:
        reference = inception_reference(splits, inception_weights, folder, device, num_workers=workers)
    if reference is None or (has_classes and not by_oracle):
        classifier = classifier_reference(splits, folder, device, flip=config.flip, num_workers=workers)
    if has_classes:
        classify = metrics.ShapesOracle(config.image_size).classify if by_oracle else classifier.extractor.classify
    return Judge(reference or classifier, classify, workers)


def check_enough(width: int, count: int, splits: DataSplits) -> None:
    """Raises an InputError where a covariance of `width` features would be singular."""
    too_few, training_images = f"too few for features of width {width}", len(splits.train) + len(splits.val)
    if count <= width:
        raise InputError(f"--eval_samples {count} are {too_few}: give more, better {8 * width}, or 0 to judge none")
    if training_images <= width:
        raise InputError(f"{training_images} training images are {too_few}: give --eval_samples 0")


def how_judged(judge: Judge, config: Config, count: int) -> dict:
    """What the figures of `count` samples depend on beside the model: how they are drawn and compared."""
    drawn = {"seed": config.seed + 1, "own_scale": config.sampling["guidance_scale"], "sampler": config.sampler}
    drawn.update(eta=config.eta, guidance_interval=list(config.guidance_interval), spacing=SPACING)
    drawn.update(steps=config.sampling["steps"] or config.timesteps)
    return {"features": judge.reference.extractor.description, "count": count, **drawn}


def judge_samples(judge: Judge, model, splits, diffusor, config: Config, *, count: int, scales, weights="ema") -> dict:
    """Samples at each guidance scale against the training images, with test images and noise beside them. 2.4 c.

    All scales start from the same noise. Draws the nearest training images. Each process samples its share; all have
    the same report.

    Args:
        model: in eval mode.  count: samples per scale; of each batch only the features are kept, so any number fits.
        scales: of Eq. 11, beside the run's own; ignored where the model can't be guided.
        weights: which the model has, for the report.
    """
    count = DRY_RUN_SAMPLES if config.dry_run else count
    own_scale = config.sampling["guidance_scale"]
    labels = judge.reference.images.labels  # in random order, so the first ones have the proportions of all
    labels = labels[torch.arange(count) % len(labels)]
    real = describe(judge, real_batches(splits.test, count, judge.num_workers), diffusor.device)
    by_scale, own = [], None
    for scale in sorted({*scales, own_scale}) if config.can_guide else [own_scale]:
        samples = describe(judge, sampled_batches(model, diffusor, config, labels, scale), diffusor.device)
        row = {"guidance_scale": scale, **compare(judge.reference, samples)}
        if len(real.features) < count:  # the distance falls with the number of images: no floor
            row["frechet_distance_at_test_count"] = distance_or_none(judge.reference, samples, len(real.features))
        by_scale.append(row)
        own = samples if scale == own_scale else own
    return {
        "weights": weights,
        "reference": f"train and val, {len(judge.reference.features)} images",
        **how_judged(judge, config, count),
        "by_scale": by_scale,
        "test_images": compare(judge.reference, real),
        "noise": compare(judge.reference, describe(judge, noise_batches(count, real.pixels[0].shape), diffusor.device)),
        "memorisation": check_memorisation(judge, own, real, diffusor.device, config.run_dir / "nearest.png"),
    }


def describe(judge: Judge, batches: Iterable[tuple[Tensor, Tensor | None]], device) -> Described:
    """Describes batches of (uint8 images (B, 3, H, W), labels (B,) or None); holds one batch at a time.

    The batches are this process's share (`share_of`) of the images, the result is of all.
    """
    features, pixels, right, kept = [], [], [], 0
    for images, labels in batches:
        images = images.to(device)
        features += [judge.reference.extractor.features(part).cpu() for part in images.split(BATCH_SIZE)]
        if kept < MEMORY_CHECKED:
            pixels.append(images[: MEMORY_CHECKED - kept].cpu())
            kept += len(pixels[-1])
        if judge.classify is not None and labels is not None:
            right.append(judge.classify(images).cpu() == labels.cpu())
    right = gathered_rows(right, "classes of images")
    return Described(
        gathered_rows(features, "features of images"),
        gathered_rows(pixels, "pixels of images")[:MEMORY_CHECKED],
        right.double().mean().item() if len(right) else None,
    )


def real_batches(dataset, count: int, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the first `count` images of a data set, as the judge takes them."""
    mine = share_of(min(count, len(dataset)))
    dataset = dataset.subset(torch.arange(mine.start, mine.stop))
    for images, labels in make_loader(dataset, BATCH_SIZE, "cpu", num_workers=num_workers):
        yield reverse_transform(images), labels


def noise_batches(count: int, shape: Sequence[int]) -> Iterator[tuple[Tensor, None]]:
    """This process's share of Gaussian noise, clamped to the range of images: what a sampler starts from."""
    mine = share_of(count)
    for first in range(mine.start, mine.stop, BATCH_SIZE):
        size = min(BATCH_SIZE, mine.stop - first)
        noise = ImageNoise(metrics.NOISE_SEED, first, size).draw((size, *shape))
        yield reverse_transform(noise), None


def sampled_batches(model, diffusor, config: Config, labels: Tensor, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """One sample per label of this process's share, at guidance scale `scale`; as many of a model without classes."""
    mine = share_of(len(labels))
    labels = labels[mine.start : mine.stop]
    settings = {**config.sampling, "guidance_scale": scale, "batch_size": config.sample_batch, "seed": config.seed + 1}
    classes = labels if config.class_free_guidance else None
    batches = sample_in_batches(diffusor, model, len(labels), classes=classes, first=mine.start, **settings)
    with tqdm(total=len(labels), desc=f"judging, w = {scale:g}", leave=False, disable=None) as progress:
        for images, wanted in zip(batches, labels.split(config.sample_batch)):
            yield reverse_transform(images), wanted
            progress.update(len(images))


def compare(reference: Reference, images: Described) -> dict:
    """Figures of a set of images against the training images; None where there are too few images for one."""
    features = images.features
    side = min(len(features), len(reference.features), MANIFOLD_LIMIT)
    few = side < FEWEST_COMPARED
    kid, deviation = (None, None) if few else metrics.kernel_distance(reference.features, features)
    precision, recall = (None, None) if few else metrics.precision_recall(reference.features[:side], features[:side])
    figures = {"count": len(features), "frechet_distance": distance_or_none(reference, images, len(features))}
    figures.update(kid=kid, kid_deviation=deviation, precision=precision, recall=recall, precision_recall_count=side)
    return figures if images.class_accuracy is None else {**figures, "class_accuracy": images.class_accuracy}


def distance_or_none(reference: Reference, images: Described, count: int) -> float | None:
    """Fréchet distance of the first `count` images; None where there are no more of them than features."""
    features = images.features[:count]
    enough = min(len(features), len(reference.features)) > features.shape[1]
    return metrics.frechet_distance(reference.features, features) if enough else None


def check_memorisation(judge: Judge, samples: Described, real: Described, device, path: Path) -> dict:
    """Distance to the nearest training image, of samples and, to compare, of test images; draws a few pairs.

    A model that copies its training images, or mirrors them, has samples much nearer to them than test images are.
    But flat and blurred pictures are near to everything: the picture decides.

    Returns: how many images of each were looked at, and, by pixels (root mean square, in grey levels) and by features,
    the median distances and the share of samples nearer than 95% of the test images: 5% where nothing is copied.
    """
    counts = {"samples": len(samples.pixels), "test_images": len(real.pixels)}
    queries = torch.cat((samples.pixels, real.pixels))
    queries = torch.cat((queries, queries.flip(-1)))  # a mirrored copy is a copy, too
    training = judge.reference.images
    gallery = make_loader(training, BATCH_SIZE, "cpu", num_workers=judge.num_workers)  # all of them, in every process
    gallery = tqdm(gallery, "nearest training images", -(-len(training) // BATCH_SIZE), leave=False, disable=None)
    describe_part = judge.reference.extractor.features
    features = torch.cat([describe_part(part.to(device)).cpu() for part in queries.split(BATCH_SIZE)])
    pixels = (reverse_transform(images).flatten(1).float() for images, _ in gallery)
    found = {
        "pixels": metrics.nearest(queries.flatten(1).float(), pixels),
        "features": metrics.nearest(features, judge.reference.features.split(5000)),
    }
    grey_levels = queries[0].numel() ** 0.5
    rows, report = [to_model_range(samples.pixels[:MEMORY_SHOWN])], {"images": counts}
    for name, (distance, index) in found.items():
        mirrored = distance.view(2, -1).argmin(0)
        index = index.view(2, -1).gather(0, mirrored[None])[0]
        distance = distance.view(2, -1).amin(0) / (grey_levels if name == "pixels" else 1)
        of_samples, of_test = distance.split(list(counts.values()))
        rows.append(torch.stack([training[i][0] for i in index[: len(rows[0])].tolist()]))
        report[name] = {
            "median": {"samples": of_samples.median().item(), "test_images": of_test.median().item()},
            "share_nearer": (of_samples < of_test.quantile(0.05)).double().mean().item(),
        }
    if is_main():
        labels = ["sample", "nearest training\nimage by pixels", "by features"]
        viz.save_grid(torch.cat(rows), path, len(rows[0]), labels)
    return report


def samples_table(samples: dict) -> list[dict]:
    """The figures of test images, of samples at each scale and of noise, as rows."""
    name = "FID" if samples["features"] == Inception.description else "Fréchet distance"
    columns = {name: "frechet_distance", "KID": "kid", "precision": "precision", "recall": "recall"}
    columns["class accuracy"] = "class_accuracy"
    entries = [(f"{samples['test_images']['count']} test images", samples["test_images"])]
    entries += [(f"samples, w = {row['guidance_scale']:g}", row) for row in samples["by_scale"]]
    entries.append(("noise", samples["noise"]))
    return [{"images": title, **{head: row.get(key) for head, key in columns.items()}} for title, row in entries]


def print_samples(samples: dict) -> None:
    """The figures of samples as a table, a row per guidance scale, between test images and noise."""
    made_with = f"{samples['weights']} weights, {samples['sampler']}, {samples['steps']} steps"
    print(f"{samples['count']} samples per scale ({made_with}) against {samples['reference']}")
    print(f"features: {samples['features']}\n{as_markdown(samples_table(samples))}", end="")
    pixels = samples["memorisation"]["pixels"]
    print(
        f"nearest training image, in grey levels: {pixels['median']['samples']:.1f} from samples and "
        f"{pixels['median']['test_images']:.1f} from test images (medians);\n"
        f"{pixels['share_nearer']:.0%} of samples are nearer than 95% of test images (see nearest.png)"
    )
