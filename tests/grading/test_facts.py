"""Facts: a right solution passes them all, and every slip is named for what it is."""

import re
from pathlib import Path

import pytest
from mini_solutions import RIGHT, SLIPS, D, M, P, evaluated, write

from ex2.grading import facts, submission
from ex2.grading.facts import FACTS


def test_a_right_solution_passes_every_fact(tmp_path):
    verdicts = evaluated(write(tmp_path, RIGHT))
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []
    assert verdicts["guidance_calls"]["adapted"] == ["w of p_sample is taken for guidance_scale"]


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_named_for_what_it_is(tmp_path, name):
    file, there, instead, fact, looks_like, others = SLIPS[name]
    assert RIGHT[file].count(there) == 1
    verdicts = evaluated(write(tmp_path, {**RIGHT, file: RIGHT[file].replace(there, instead)}))
    assert verdicts[fact]["verdict"] in ("wrong", "advice") and looks_like in verdicts[fact]["looks_like"], verdicts[
        fact
    ]
    assert verdicts[fact]["found"] and verdicts[fact]["expected"]
    wrong = {name for name, said in verdicts.items() if said["verdict"] != "right"}
    assert wrong <= {fact, *others.split()}


def test_there_are_slips_for_nearly_every_fact():
    assert len(SLIPS) >= 25
    assert set(FACTS) - {slip[3] for slip in SLIPS.values()} <= {
        "unet_shape",
        "linear_schedule",
        "sample_result",
        "sample_spread",
    }


@pytest.mark.parametrize(
    "file, changes",
    [
        (
            D,
            {
                "model(x, t, classes)": "model(x, time=t, classes=classes)",
                "denoise_model(x_t, t, classes)": "denoise_model(x_t, time=t, classes=classes)",
            },
        ),
        (D, {"model.null_class)": "-1)"}),
        (
            D,
            {
                "denoise_model(x_t, t) if classes is None": "denoise_model(x_t, t) if not "
                "denoise_model.class_free_guidance or classes is None"
            },
        ),
        (
            M,
            {
                "torch.rand(len(x)) < self.p_uncond": "torch.from_numpy(np.random.rand(len(x))) < self.p_uncond",
                "import torch\n": "import numpy as np\nimport torch\n",
            },
        ),
        (
            M,
            {
                "torch.rand(len(x)) < self.p_uncond": "torch.tensor([random.random() < self.p_uncond for _ in x])",
                "import torch\n": "import random\nimport torch\n",
            },
        ),
        (
            P,
            {
                'save_image((image + 1) / 2, f"{store_path}/{i}.png")': (
                    'save_image(image, f"{store_path}{i}.png", normalize=True)'
                )
            },
        ),
        (
            P,
            {
                "    model.eval()\n": "",
                "def run(args):": "def judge(model, *r):\n    model.eval()\n    test(model, *r)\n\n\ndef run(args):",
            },
        ),
        (P, {"default=1000": "default=STEPS", "def run(args)": "STEPS = 1_0\n\n\ndef run(args)"}),
        (P, {"\n\ndef run(args):": "    (args.out / 'x').write_text('')\n\n\ndef run(args):"}),
    ],
)
def test_other_right_ways_are_right(tmp_path, file, changes):
    text = RIGHT[file]
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after, 1)
    verdicts = evaluated(write(tmp_path, {**RIGHT, file: text}))
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []


def test_facts_know_nothing_of_ours():
    sources = Path(facts.__file__).read_text("utf-8") + Path(submission.__file__).read_text("utf-8")
    assert set(re.findall(r"(?:from|import) (ex2_\w+)", sources)) == {"ex2_solution"}


MAIN = """
import argparse
from ex02_diffusion import *


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--timesteps", type=int, help="steps (T)", default = {steps})


def run(args):
    {schedule}
    return Diffusion(args.timesteps, my_scheduler, 32)
"""


@pytest.mark.parametrize(
    "steps, schedule, found",
    [
        ("100", "my_scheduler = lambda x: linear_beta_schedule(0.0001, 0.02, x)", (100, "linear", [1e-4, 0.02])),
        ("1_000", "my_scheduler = lambda x: cosine_beta_schedule(x)", (1000, "cosine", [])),
        ("10**3", "my_scheduler = lambda x: cosine_beta_schedule(x)", None),
        ("100", "my_scheduler = cosine_beta_schedule; linear_beta_schedule(0.0001, 0.02, 100)", None),
        ("100", "my_scheduler = lambda x: (linear_beta_schedule(1e-4, 0.02, x), cosine_beta_schedule(x))[1]", None),
        ("100", "my_scheduler = lambda x: linear_beta_schedule(beta_end=0.02, beta_start=1e-4, timesteps=x)", None),
    ],
)
def test_settings_are_read_off_a_main_file_where_they_are_plain(tmp_path, steps, schedule, found):
    write(tmp_path, {"ex02_main.py": MAIN.format(steps=steps, schedule=schedule)})
    settings = facts.settings_of_main(tmp_path)
    assert (settings and (*settings[:2], list(settings[2].values()))) == found
