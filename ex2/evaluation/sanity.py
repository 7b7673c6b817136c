"""Is this normal? What the metrics of a run say, beside those that our own runs had after as many images (2.2 e)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ex2.data.sets import DATASETS

REFERENCE = Path(__file__).with_name("reference.json")  # our runs; benchmarks/reference.py writes it
NOISE_LEVELS = (-4, -2, 0, 2)  # log-SNR at which runs are compared
WORSE = 1.3  # ratio of two losses from which on one is called worse: seeds differ by some percent
DISTANCE_WORSE = 2.0  # the same of Fréchet distances


def images_seen(config: Mapping, log: Sequence[Mapping]) -> int:
    """How many images the training has seen; an image counts each time."""
    return int(log[-1]["step"]) * config["batch_size"] if log else 0


def reference_of(config: Mapping, images: int) -> dict | None:
    """The metrics of our own run on such data at this image size, after at most as many images; None without one."""
    name = DATASETS[config["dataset"]].reference
    runs = json.loads(REFERENCE.read_text(encoding="utf-8")).get(name, {"image_size": None})
    if config["image_size"] != runs["image_size"]:
        return None
    points = [point for point in runs["points"] if point["images"] <= 1.05 * images]
    kind = "conditional" if config["class_free_guidance"] else "unconditional"
    return {**points[-1], **points[-1][kind], "name": name} if points else None


def reference_losses(config: Mapping, report: Mapping, images: int) -> dict | None:
    """l2 losses of `reference_of` at the noise levels of a report's timesteps, as a curve of `plot_loss_over_t`."""
    ours, test = reference_of(config, images), report["losses"]["test"]
    return ours and {"t": test["t"], "l2": [loss_at(ours, log_snr) for log_snr in test["log_snr"]]}


def loss_at(curve: Mapping, log_snr: float) -> float:
    """l2 loss at a log-SNR, between the timesteps that were tested: its logarithm is nearly straight there."""
    return float(np.exp(np.interp(log_snr, curve["log_snr"][::-1], np.log(np.maximum(curve["l2"][::-1], 1e-12)))))


def verdict(config: Mapping, report: Mapping, log: Sequence[Mapping]) -> list[str]:
    """Sentences on what is off and what to try, or that nothing is.

    Args:
        config: settings of the run.
        report: test_metrics.json; only the losses of test images must be there.
        log: rows of log.csv.
    """
    images = images_seen(config, log)
    ours = reference_of(config, images)
    found = [*check_losses(report), *check_labels(report), *check_ema(log)]
    found += check_reference(report, ours, images) if ours else []
    beside = f", also beside our run on {ours['name']} ({ours['images']:,} images)" if ours else ""
    return found or [f"Nothing is off{beside}."]


def check_losses(report: Mapping) -> Iterator[str]:
    """Losses that are not possible if all is right."""
    test, train, optimal = (report["losses"].get(name) for name in ("test", "train", "optimal"))
    if test["log_snr"][-1] < -4 and test["l2"][-1] > 0.2:
        yield (
            f"The loss at t = {test['t'][-1] + 1} is {test['l2'][-1]:.2g}: x_t is nearly pure noise there, and a "
            "model that returns x_t would have less than 0.05. It has hardly learnt: train longer, or try another --lr."
        )
    if max(test["l2"]) > 1.05 and test["l2"][-1] <= 0.2:
        yield f"A loss of {max(test['l2']):.2f} is above 1, that of a guess of zero: lower --lr, or train longer."
    if test["log_snr"][-1] < -4 and test["x_zero_l2"][-1] < 0.05:
        yield (
            f"The images differ by a variance of {test['x_zero_l2'][-1]:.2g} only, photographs in [-1, 1] by 0.2 to "
            "0.5: see whether their values fill the range."
        )
    if train and optimal:
        triples = zip(train["t"], train["l2"], optimal["l2"])
        for t, loss, best in [triple for triple in triples if triple[2] > 0.01 and triple[1] < 0.8 * triple[2]][:1]:
            yield (
                f"The loss of training images at t = {t + 1}, {loss:.2g}, is below the optimal loss of {best:.2g}, "
                "which no model can reach: noise, timesteps or images of the evaluation are not those of training."
            )
    if train:
        gap = float(np.median([of_test / max(own, 1e-9) for of_test, own in zip(test["l2"], train["l2"])]))
        if gap > WORSE:
            yield (
                f"The loss of test images is {gap:.2g} times that of training images: the model starts to "
                "memorise these; train for fewer epochs, or with --dropout 0.1 or more images."
            )


def check_labels(report: Mapping) -> Iterator[str]:
    """Labels that make no difference: to the loss, or to samples. Of a single class none is expected."""
    if report.get("classes") == 1:
        return
    losses = report["losses"]
    if "test_unconditional" in losses:
        pairs = zip(losses["test"]["l2"], losses["test_unconditional"]["l2"])
        if max((without / given for given, without in pairs if given > 0), default=0) < 1.005:
            yield (
                "The loss is the same with and without the class, at every t: labels are wrong, or dropped too often "
                "(--p_uncond)."
            )
    rows = [row for row in report.get("samples", {}).get("by_scale", ()) if row.get("class_accuracy") is not None]
    if len(rows) > 1 and rows[0]["guidance_scale"] < 0 < rows[-1]["guidance_scale"]:
        none, much = rows[0]["class_accuracy"], rows[-1]["class_accuracy"]
        if much < none + 0.1:
            yield (
                f"Guidance has no effect: {much:.0%} of samples show their class at w = "
                f"{rows[-1]['guidance_scale']:g}, {none:.0%} at w = {rows[0]['guidance_scale']:g}."
            )


def check_ema(log: Sequence[Mapping]) -> Iterator[str]:
    """EMA weights that lag behind when the training ends."""
    rows = [row for row in log if float(row["val_loss"] or 0) > 0 and float(row["epoch_loss"] or 0) > 0][-2:]
    if len(rows) == 2:
        val, epoch = (1 - float(rows[1][name]) / float(rows[0][name]) for name in ("val_loss", "epoch_loss"))
        if val > 0.1 and epoch < 0.03:
            yield (
                f"In the last epoch the EMA weights gained {val:.0%}, the trained ones {max(0, epoch):.0%}: the EMA is "
                "behind; lower --ema_images or train longer."
            )


def check_reference(report: Mapping, ours: Mapping, images: int) -> Iterator[str]:
    """Where the losses, or the samples, are clearly worse than those of our own run, `reference_of`."""
    test, said = report["losses"]["test"], []
    for log_snr in NOISE_LEVELS:
        ratio = loss_at(test, log_snr) / loss_at(ours, log_snr)
        if ratio > WORSE and test["log_snr"][-1] <= log_snr <= test["log_snr"][0]:
            said.append(f"{ratio:.2g} times ours at log-SNR {log_snr}")
    seen = f"ours, on {ours['name']}, had seen {ours['images']:,} images, this one {images:,}"
    if said:
        yield f"The test loss is {', '.join(said)} ({seen}): try another --lr or --schedule, or train longer."
    samples, theirs = report.get("samples", {}), ours.get("samples")
    if theirs and all(samples.get(name) == theirs[name] for name in ("features", "count", "own_scale")):
        own = next((row for row in samples["by_scale"] if row["guidance_scale"] == samples["own_scale"]), {})
        if (own.get("frechet_distance") or 0) > DISTANCE_WORSE * theirs["frechet_distance"]:
            yield (
                f"The Fréchet distance of its samples is {own['frechet_distance']:.3g}, of ours "
                f"{theirs['frechet_distance']:.3g} ({seen}): where the losses are fine, try more --sample_steps or "
                "another --guidance_scale."
            )
