"""Sentences that follow from the metrics of runs and studies."""

import copy
from pathlib import Path

import made_up
import pytest

from ex2.machine.files import append_command
from ex2.report import answers
from ex2.report.answers import Run, Study, compare_settings, latest_command, study_answer
from ex2.report.page import METRICS, keep_valid


def run_of(report=None, name="run", **changes):
    report = made_up.metrics() if report is None else report
    return Run(Path(name), made_up.config(**changes), keep_valid(report, METRICS) or {}, made_up.log_rows())


def study_of(distances, seeds=1, setting="schedule"):
    """value -> Fréchet distance of the first seed (None: it failed); each other seed has all of them 0.1 larger."""
    runs = {}
    for value, distance in distances.items():
        for seed in range(seeds):
            report = made_up.metrics()
            report["samples"]["by_scale"][2]["frechet_distance"] = (distance or 0) + 0.1 * seed
            run = None if distance is None else run_of(report, seed=seed, **{setting: value})
            runs[f"{setting}={value},seed={seed}"] = run
    return Study(Path("study"), [setting], runs)


# ------------------------------------------------------------------ sentences of a run


def leaves(value, path=()):
    """Where numbers and texts stand in nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [leaf for name, entry in entries for leaf in leaves(entry, (*path, name))] or [path]


def test_a_missing_number_takes_its_half_sentence_and_nothing_else():
    """Of all that is in test_metrics.json each entry in turn, missing, or of another kind."""
    sentences = {make: make(run_of(name="whole")) for make in (answers.quality_answer, answers.guidance_answer)}
    report, tried = made_up.metrics(), 0
    for path in leaves(report):
        for bad in (None, "text", {}, float("nan")):
            damaged = copy.deepcopy(report)
            entry = damaged
            for name in path[:-1]:
                entry = entry[name]
            entry[path[-1]] = bad
            run = run_of(damaged, name="whole")
            answers.sections([run], [])
            for make, whole in sentences.items():
                halves = make(run).partition(": ")[2].rstrip(".").split("; ")
                # Without how many samples there were, or the features, nothing is said of samples.
                assert len(halves) >= whole.count("; ") or "samples" in path, (path, bad)
                # Without the metrics at one scale, another is the best.
                assert "by_scale" in path or all(part in whole for half in halves for part in half.split(", "))
            tried += 1
    assert tried > 350


def test_without_its_losses_a_run_keeps_what_is_said_of_its_samples():
    report = made_up.metrics()
    del report["losses"]["test"]
    said = answers.quality_answer(run_of(report))
    assert (
        said.startswith("run (16 pixels): its samples have a Fréchet distance of 2 ") and "95% of the samples" in said
    )


def test_a_run_without_w_minus_one_keeps_its_answer_and_says_what_is_missing():
    report = made_up.metrics()
    del report["samples"]["by_scale"][0]
    section = answers.guidance([run_of(report, "results/a b")])
    assert (
        section.answer.startswith("a b: 99% of the samples show their class at w = 3; recall")
        and "-1" not in section.answer
    )
    command = "python ex2_main.py test --checkpoint 'results/a b' --eval_scales -1 0 1 3"
    assert section.missing[command] == ["samples of a b without the class (w = -1)"]


def test_each_recall_is_that_of_its_scale():
    said = answers.guidance_answer(run_of())
    assert "0.90 at w = -1, 0.80 at w = 0, 0.70 at w = 1, 0.40 at w = 3" in said
    assert "99% of the samples show their class at w = 3, 10% at w = -1" in said


def test_one_timestep_says_nothing_of_the_last_one():
    """--eval_timesteps 1 evaluates t = 1 alone."""
    report = made_up.metrics()
    report["losses"] = {"test": {name: values[:1] for name, values in made_up.curve().items()}}
    said = answers.process([run_of(report)]).answer
    assert said == "The reverse process goes back from noise to an image, here in 1000 steps."
    assert "a fraction of 3e-07 of the image's variance" in answers.process([run_of()]).answer


def test_losses_of_other_timesteps_are_not_compared():
    report = made_up.metrics()
    assert run_of(report).mean_loss("train") == pytest.approx(0.95 * run_of(report).mean_loss("test"))
    report["losses"]["train"]["t"][1] += 1
    assert run_of(report).mean_loss("train") is None and "training images at" not in answers.quality_answer(
        run_of(report)
    )


def test_as_many_test_images_are_compared_with_as_many_samples():
    report = made_up.metrics()
    report["samples"]["by_scale"][2]["frechet_distance_at_test_count"] = 7.5
    assert "distance of 7.5 to the training images, as many test images 0.5" in answers.quality_answer(run_of(report))


def test_2_5_is_what_the_record_of_the_data_says():
    runs = [run_of(name="a butterfly"), run_of(name="mine", dataset="folder", image_size=32)]
    *_, section, _ = answers.sections(runs, [])
    assert (
        section.title.startswith("2.5")
        and section.answer.startswith("mine (32 pixels)")
        and "a b" not in section.answer
    )


# ------------------------------------------------------------------ commands


def test_the_latest_training_is_neither_a_test_nor_samples(tmp_path):
    assert latest_command(tmp_path) == latest_command(tmp_path, test=True) == ""
    train, test = (
        "python ex2_main.py --preset quick --epochs 3",
        "python ex2_main.py test --checkpoint x --eval_samples 150",
    )
    later = [
        "python ex2_main.py test --checkpoint x --eval_samples 0",  # made none of the metrics of samples
        "python ex2_main.py test --checkpoint x --eval_samples=0 --seed 1",
        "python ex2_main.py sample --checkpoint x",
        "of another program",
    ]
    for line in ("python ex2_main.py", train, test, *later):
        append_command(tmp_path, line)
    assert latest_command(tmp_path) == train
    assert latest_command(tmp_path, test=True) == test


# ------------------------------------------------------------------ studies


def test_the_winner_is_the_run_with_the_smallest_distance():
    said = study_answer(study_of({"linear": 8.0, "cosine": 2.0, "sigmoid": 5.0}))
    wanted = "Fréchet distance: smallest for schedule cosine (2, a single run); 3 more for schedule sigmoid; 6 more for"
    assert said == f"{wanted} schedule linear."
    *_, schedules, _, _, _ = answers.sections([], [study_of({"linear": 8.0, "cosine": 2.0})])
    assert schedules.title.startswith("2.3") and any("not comparable" in part.text for part in schedules.parts)


def test_metrics_that_hardly_differ_may_be_chance():
    assert study_answer(study_of({"linear": 2.0, "cosine": 2.05})).endswith(
        "more for schedule cosine, which may be chance."
    )
    assert study_answer(study_of({"linear": 2.0})) == "Fréchet distance: no two settings to compare with the same seed."


def test_a_difference_counts_where_it_is_the_same_for_every_seed():
    """Both settings vary by 0.1 from seed to seed; their difference doesn't vary at all."""
    said = study_answer(study_of({"linear": 2.02, "cosine": 2.0}, seeds=3))
    assert "smallest for schedule cosine (2.1 ± 0.25, mean of 3 seeds" in said
    assert "; 0.02 ± " in said and "chance" not in said


@pytest.mark.parametrize(
    "values, verdict",
    [
        ({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.75, 3.5]}, "; 0.583 ± 0.36 more for b."),
        ({"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.2]}, "; 0.0667 ± 4.7 more for b, which may be chance."),
        ({"b": [5.0, 5.1], "a": [1.0, 1.1], "c": [1.0, 1.3]}, "; 0.1 ± 1.3 more for c, which may be chance; 4 ± "),
    ],
)
def test_a_difference_smaller_than_its_interval_may_be_chance(values, verdict):
    said = compare_settings({name: dict(enumerate(figures)) for name, figures in values.items()}, "loss")
    assert verdict in said


def test_seeds_are_compared_with_themselves_alone():
    said = compare_settings({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {1: 2.05, 2: 3.05}}, "loss")
    assert "mean of 2 seeds" in said and "; 0.05 ± " in said
    assert "no two settings" in compare_settings({"a": {0: 1.0}, "b": {1: 1.0}}, "loss")


def test_every_value_has_its_place_also_one_without_guidance():
    """p_uncond = 0 can't be guided: its samples are of w = 0, those of the others of w = 1."""
    study = study_of({0.0: 1.0, 0.1: 2.0, 0.2: 3.0}, setting="p_uncond")
    samples = study.runs["p_uncond=0.0,seed=0"].metrics["samples"]
    samples.update(own_scale=0.0, by_scale=[{**samples["by_scale"][1], "frechet_distance": 1.0}])
    said = study_answer(study)
    assert "smallest for p_uncond 0.0 (1, a single run); 1 more for p_uncond 0.1; 2 more for p_uncond 0.2." in said
    assert "Left out" not in said


def test_what_is_left_out_of_a_comparison_is_said():
    said = study_answer(study_of({"linear": 8.0, "cosine": None, "sigmoid": 5.0}))
    assert said.endswith("schedule linear. Left out, as it failed or was not evaluated: schedule=cosine,seed=0.")


def test_settings_are_compared_by_bits_per_dimension_where_no_samples_were_evaluated():
    study = study_of({"linear": 8.0, "cosine": 5.0})
    for run in study.runs.values():
        del run.metrics["samples"]
    assert study_answer(study).startswith("bits/dim: smallest for schedule linear (3.3, a single run); 0 more for")
