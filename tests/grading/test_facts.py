"""Facts: a right solution passes them all, and every slip is named for what it is."""

import ast
import json
import re

import pytest
import torch
from mini_solutions import RIGHT, SLIPS, D, Local, M, P, evaluated, isolated, write

from ex2.grading import submission
from ex2.grading.run import FACTS, judge
from ex2.grading.submission import pack


def test_a_right_solution_passes_every_fact(tmp_path):
    verdicts = evaluated(write(tmp_path, RIGHT))
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []
    assert verdicts["guidance_calls"]["adapted"] == ["w of p_sample is taken for guidance_scale"]


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_named_for_what_it_is(tmp_path, name):
    """And with its file and line; no other fact of the same function is wrong that isn't said to be."""
    file, there, instead, fact, looks_like, others = SLIPS[name]
    assert RIGHT[file].count(there) == 1
    near = [other for other in FACTS if other.split("_")[0] == fact.split("_")[0]]
    files = {**RIGHT, file: RIGHT[file].replace(there, instead)}
    verdicts = evaluated(write(tmp_path, files), *{fact, *near})
    said = verdicts[fact]
    assert said["verdict"] in (("advice",) if FACTS[fact].advice else ("wrong", "differs")), said
    assert looks_like in said["looks_like"]
    assert said["found"] and said["expected"]
    assert {name for name, said in verdicts.items() if said["verdict"] != "right"} <= {fact, *others.split()}
    if not FACTS[fact].advice:
        path, line = said["where"].split(":")
        assert path == file and files[file].split("\n")[int(line) - 1].lstrip().startswith("def ")


@pytest.mark.parametrize("name", ["variance-posterior", "cosine-lower-clip"])
def test_what_the_sheet_allows_differs_and_is_not_wrong(tmp_path, name):
    file, there, instead, fact, _, others = SLIPS[name]
    text = RIGHT[file].replace(there, instead)
    verdicts = evaluated(write(tmp_path, {**RIGHT, file: text}), fact, *others.split())
    assert {said["verdict"] for said in verdicts.values()} == {"differs"}


def test_labels_that_the_caller_drops_differ_and_are_not_wrong(tmp_path):
    caller = "def train(args, classes):\n    classes[torch.rand(len(classes)) < args.p_uncond] = 10\n\n\ndef run(args):"
    files = {**RIGHT, M: RIGHT[M].replace("elif self.training:", "elif False:")}
    assert evaluated(write(tmp_path, files), "class_dropped")["class_dropped"]["verdict"] == "wrong"
    files[P] = RIGHT[P].replace("def run(args):", caller)
    assert evaluated(write(tmp_path, files), "class_dropped")["class_dropped"]["verdict"] == "differs"


def test_there_are_slips_for_nearly_every_fact():
    unseen = {"unet_shape", "linear_schedule", "sample_result", "sample_spread"}
    assert set(FACTS) - {slip[3] for slip in SLIPS.values()} <= unseen


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
        (D, {"eps = model(x, t)": "eps = model.predict(x, t)", "eps = model(x, t, c": "eps = model.predict(x, t, c"}),
        (
            D,
            {
                'img_size, device="cuda"):': 'img_size, device="cuda", classifier_free_guidence=False):\n'
                "        self.conditional = classifier_free_guidence",
                "denoise_model(x_t, t) if classes is None": "denoise_model(x_t, t) if not self.conditional",
            },
        ),
        (
            M,
            {
                "classes=None):\n        emb": "class_labels=None, cond=True):\n"
                "        classes = class_labels if cond else None\n        emb",
            },
        ),
        (
            M,
            {
                "time, classes=None)": "time, classes=None, cond_drop_prob=0.0)",
                "torch.rand(len(x)) < self.p_uncond": "torch.rand(len(x)) < cond_drop_prob",
            },
        ),
        (P, {"device, store_path):": "device, args, store_path):\n    assert not args.run_name"}),
        (
            P,
            {
                "for i, image in enumerate(diffusor.sample(model, diffusor.img_size, n_images))": "for i, image in "
                "enumerate([diffusor.sample(model, 32, 8)[0] for _ in range(n_images // 8)])"
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
    facts = {
        D: "reverse_image loss_classes loss_target guidance_zero guidance_equation guidance_in_sample guidance_calls",
        M: "unet_time class_matters class_in_eval class_dropped class_kept",
        P: "test_loop saved_range end_of_the_process",
    }
    verdicts = evaluated(write(tmp_path, {**RIGHT, file: text}), *facts[file].split())
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []


@pytest.mark.parametrize(
    "part, there, instead, fact",
    [
        (D, "p_sample(self, model, x, t, t_index,", "p_sample(self, my_net, x, t, t_index,", "reverse_image"),
        (D, "sample(self, model, image_size,", "sample(self, my_net, image_size,", "sample_times"),
        (
            D,
            "def q_sample(self, x_zero, t, noise=None)",
            "def q_sample(self, picture, step, noise=None)",
            "forward_noise",
        ),
    ],
)
def test_an_argument_of_another_name_has_the_role_of_its_place(tmp_path, part, there, instead, fact):
    """Not None, for which the submission was blamed."""
    text = RIGHT[part].replace(there, instead)
    if "my_net" in instead:
        before, after = text.split(instead)
        text = before + instead + re.sub(r"(?<=[ (,])model(?=[(,.])", "my_net", after.split("    def ")[0])
        text += "    def " + "    def ".join(after.split("    def ")[1:])
    else:
        text = text.replace("* x_zero + torch.sqrt(1 - extract(self.alphas_bar, t))", "* picture + torch.sqrt(1 - c)")
        text = text.replace(
            "        return torch.sqrt(extract(self.alphas_bar, t)) * picture",
            """\
        x_zero, c = picture, extract(self.alphas_bar, step)
        return torch.sqrt(c) * picture""",
        ).replace("randn_like(x_zero)\n        x_z", "randn_like(picture)\n        x_z")
    said = evaluated(write(tmp_path, {**RIGHT, part: text}), fact)[fact]
    assert said["verdict"] == "right" and any("is taken for" in note for note in said["adapted"]), (said, text)


def test_a_model_that_the_constructor_wants_is_given(tmp_path):
    text = RIGHT[D].replace("img_size, device=", "img_size, denoiser, device=")
    assert evaluated(write(tmp_path, {**RIGHT, D: text}), "reverse_image")["reverse_image"]["verdict"] == "right"


def test_an_argument_that_nobody_knows_is_not_blamed_on_the_submission(tmp_path):
    text = RIGHT[D].replace("p_sample(self, model, x, t, t_index,", "p_sample(self, model, x, t, t_index, eta,")
    text = text.replace(
        "        if classes is None:\n            eps = m",
        "        x = x + 0 * eta\n        if classes is None:\n            eps = m",
    )
    said = evaluated(write(tmp_path, {**RIGHT, D: text}), "reverse_image")["reverse_image"]
    assert said["verdict"] == "missing" and "what is eta?" in said["found"]


def test_a_shape_of_a_submission_is_checked_before_two_of_its_tensors_meet(tmp_path):
    """Two of 60,000 would else be broadcast to 14 GB in the process that judges."""
    text = RIGHT[D].replace("        if t_index == 0:\n", "        mean = mean[:1]\n        if t_index == 0:\n")
    said = evaluated(write(tmp_path, {**RIGHT, D: text}), "reverse_image")["reverse_image"]
    assert said["verdict"] == "wrong" and said["found"] == "shape (1, 3, 8, 8)"


class Forger(Local):
    """Has a right answer's form, and says something else than the submission."""

    def __init__(self, folder, value):
        self.value = None
        super().__init__(folder)
        self.value = value

    def ask(self, line):
        if self.value is None:
            return super().ask(line)
        return self.value.replace("ID", str(json.loads(line)["id"]))


NAN = json.dumps(pack(torch.full((4, 3, 8, 8), float("nan"))))
FORGED = f'{{"verdict": "right", "out": {NAN}, "loss": NaN, "images": {NAN}, "start": {NAN}, "calls": [], "scaled": 1}}'
EMPTY = json.dumps(pack(torch.zeros(0)))
HUGE = '{"tensor": "AAAA", "dtype": "float32", "shape": [99999999999]}'
OTHER = '{"tensor": "AAAA", "dtype": "object", "shape": [1]}'
VALUES = ("null", "{}", "1e999", '"right"', "[]", NAN, EMPTY, FORGED, HUGE, OTHER, "[" * 100_000)


@pytest.mark.parametrize(
    "answer",
    [
        *(f'{{"value": {json.dumps(value)}, "id": ID, "where": "", "adapted": []}}' for value in VALUES),
        '{"verdict": "right", "id": ID, "where": "", "adapted": []}',
        '{"value": "null", "id": 1, "where": "", "adapted": []}',
        "[" * 100_000,
        "right",
        "",
    ],
)
def test_a_submission_can_not_forge_a_verdict(tmp_path, answer):
    write(tmp_path, RIGHT)
    with isolated(tmp_path):
        verdicts = judge(Forger(tmp_path, answer), FACTS)
    forged = {said["fact"] for said in verdicts if said["verdict"] == "right"}
    assert forged <= {"fid_images"}  # read off the source, before any of it runs


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
def test_settings_are_read_off_a_main_file_where_they_are_plain(steps, schedule, found):
    settings = submission.settings_of(ast.parse(MAIN.format(steps=steps, schedule=schedule)))
    assert settings == (found and dict(zip(("timesteps", "name", "ends"), found)))


@pytest.mark.parametrize(
    "line, count",
    [
        ("fid(diffusor.sample(model, 32, 64), images)", 64),
        ("frechet_distance(diffusor.sample(model, 32, batch_size=args.eval_images), images)", 99),
        ("fid(diffusor.sample(model, 32, COUNT), images)", 32),
        ("fid([diffusor.sample(model, 32, 64) for _ in range(100)], images)", None),
        ("confide(diffusor.sample(model, 32, 64), images)", None),
    ],
)
def test_images_of_a_frechet_distance_are_counted_where_they_are_plain(line, count):
    flag = 'parser.add_argument("--eval_images", type=int, default=99)'
    assert submission.count_fid_images(ast.parse(f"COUNT = 32\n{flag}\n\n\ndef test():\n    {line}\n")) == count
