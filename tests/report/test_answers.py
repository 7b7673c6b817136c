"""Sentences that follow from the figures of runs and studies."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ex2.evaluation.sanity import loss_at
from ex2.report import answers
from ex2.report.answers import Run, Study, samples_sentences, study_part
from ex2.settings.cli import PRESETS
from ex2_diffusion import SCHEDULES, Diffusion, evenly_spaced


def study_of(distances, seeds=1):
    """A study of schedules, name -> Fréchet distance of the first seed; each other seed has all of them 0.1 larger."""
    rows, runs = [], []
    for i, (name, distance) in enumerate(distances.items()):
        for seed in range(seeds):
            found = {"Fréchet distance": str(distance + 0.1 * seed), "bits/dim": "3"}
            rows.append({"schedule": name, "seed": str(seed), **found})
            curve = {"t": [0, 50, 99], "log_snr": [8.0, 0.0, -8.0], "l2": [0.8, 0.1 * (i + 1), 0.01]}
            config = dataclasses.asdict(dataclasses.replace(PRESETS["quick"], schedule=name, seed=seed))
            runs.append(Run(Path(f"study/schedule={name}"), config, {"losses": {"test": curve}}))
    return Study(Path("study"), ["schedule"], rows, runs)


def test_the_winner_is_the_run_with_the_smallest_distance():
    text = " ".join(study_part(study_of({"linear": 8.0, "cosine": 2.0, "sigmoid": 5.0})).sentences)
    assert "Fréchet distance: smallest for schedule cosine (2), 5 for schedule sigmoid, 8 for schedule linear;" in text
    assert "single run" in text and "not comparable" in text
    assert "Test l2 loss at log-SNR -2: smallest for schedule linear" in text  # of the three curves above


def test_figures_that_hardly_differ_have_no_winner():
    text = " ".join(study_part(study_of({"linear": 2.0, "cosine": 2.05})).sentences)
    assert "so that the first two don't differ clearly" in text.split(";")[0]
    assert answers.study_answer(study_of({"linear": 2.0})) == ""


def test_a_difference_counts_where_it_is_the_same_for_every_seed():
    """Both settings vary by 0.1 from seed to seed; their difference doesn't vary at all."""
    text = answers.study_answer(study_of({"linear": 2.02, "cosine": 2.0}, seeds=3))
    assert "smallest for schedule cosine (2.1 ± 0.25, mean of 3 seeds" in text
    assert "; larger for schedule linear (by 0.02 ± " in text


@pytest.mark.parametrize(
    "values, verdict",
    [
        ({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.1]}, "; larger for b (by 0.1 ± "),
        ({"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.2]}, "; not clearly larger for b (by 0.0667 ± 4.7)."),
        ({"b": [5.0, 5.1], "a": [1.0, 1.1], "c": [1.0, 1.3]}, "; larger for b (by 4 ± "),
        ({"a": [1.0, 1.1]}, ""),
    ],
)
def test_a_difference_smaller_than_its_interval_is_none(values, verdict):
    text = answers.contest({name: dict(enumerate(figures)) for name, figures in values.items()}, "loss")
    assert verdict in text if verdict else text == ""
    if "c" in values:
        assert "; not clearly larger for c (by 0.1 ± 1.3)." in text


def test_seeds_are_compared_with_themselves_alone():
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {1: 2.05, 2: 3.05}}
    text = answers.contest(values, "loss")
    assert "mean of 2 seeds" in text and "; larger for b (by 0.05 ± " in text
    assert answers.contest({"a": {0: 1.0}, "b": {1: 1.0}}, "loss") == ""


@pytest.mark.parametrize("s", [0.1, 0.5])
def test_reading_between_the_times_favours_no_schedule(gaussian, s):
    # The optimal denoiser's loss depends on the log-SNR alone, so whatever differs here is an error of reading.
    found = []
    for schedule in SCHEDULES.values():
        diffusor = Diffusion(1000, schedule, 4, "cpu")
        t = torch.tensor(evenly_spaced(1000, 10))
        abar = diffusor.alphas_bar[t].double()
        loss = abar * s**2 / (abar * s**2 + 1 - abar)
        found.append(loss_at({"log_snr": diffusor.log_snr[t].tolist(), "l2": loss.tolist()}, -2))
    assert max(found) / min(found) < answers.CLEAR


@pytest.mark.parametrize("share, verdict", [(0.05, "no sign of copying"), (0.5, "look for copies")])
def test_copies_are_suspected_where_samples_are_too_near(share, verdict):
    figures = {"frechet_distance": 2.0, "count": 500}
    pixels = {"median": {"samples": 25.0, "test_images": 26.0}, "share_nearer": share}
    samples = {
        "own_scale": 1.0,
        "weights": "ema",
        "count": 500,
        "features": "small classifier",
        "by_scale": [{"guidance_scale": 1.0, **figures}],
        "test_images": figures,
        "noise": figures,
        "memorisation": {"pixels": pixels},
    }
    assert verdict in samples_sentences(samples)[1]
