"""`check`: our own solution and a right one pass every fact, every slip is named for what it is, and nothing hangs "
"it."""

import json
import re
import time
from pathlib import Path

import pytest
from mini_solutions import RIGHT, SLIPS, D, M, P

import ex2_check
import ex2_facts
import ex2_main
import ex2_solution
from ex2_check import as_lines, check_solution
from ex2_facts import FACTS, verdict
from ex2_solution import Solution, importing_from


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def judged(folder):
    """fact -> verdict, in this process: a hundred times as fast as in one of its own."""
    with importing_from(folder):
        solution = Solution(folder)
        return {name: verdict(solution, name) for name in FACTS}


def test_our_own_solution_is_right(pytestconfig, capsys):
    assert ex2_main.main(["check", str(pytestconfig.rootpath)]) == 0
    assert f"{len(FACTS)} of {len(FACTS)} facts are right" in capsys.readouterr().out


def test_a_right_solution_passes_every_fact(tmp_path):
    verdicts = judged(write(tmp_path, RIGHT))
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []
    assert verdicts["guidance_calls"]["adapted"] == ["w of p_sample is taken for guidance_scale"]


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_named_for_what_it_is(tmp_path, name):
    file, there, instead, fact, looks_like, others = SLIPS[name]
    assert RIGHT[file].count(there) == 1
    verdicts = judged(write(tmp_path, {**RIGHT, file: RIGHT[file].replace(there, instead)}))
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
    "part, text, fact, found",
    [
        ("diffusion", "", "forward_signal", "ex02_diffusion.py has no Diffusion"),
        ("diffusion", "import no_such_package", "cosine_schedule", "needs no_such_package, which isn't installed here"),
        ("diffusion", "def cosine_beta_schedule(timesteps, s=0.008):\n    pass", "cosine_schedule", "returns nothing"),
        (
            "main",
            "def test(model, testloader, diffusor, device, args):\n    # still to be written\n    pass",
            "test_loop",
            "empty stub",
        ),
        ("model", "class Unet:\n    def forward(self, x, time):\n        pass", "class_matters", "takes no classes"),
    ],
)
def test_what_is_not_there_is_missing(tmp_path, part, text, fact, found):
    said = judged(write(tmp_path, {**RIGHT, f"ex02_{part}.py": text}))[fact]
    assert said["verdict"] == "missing" and found in said["found"]


def test_code_that_raises_is_named_with_its_line(tmp_path):
    files = {
        **RIGHT,
        "ex02_diffusion.py": RIGHT["ex02_diffusion.py"].replace("scaled = extract(", "scaled = 1 / 0 * extract("),
    }
    said = judged(write(tmp_path, files))["reverse_image"]
    line = files["ex02_diffusion.py"].split("1 / 0")[0].count("\n") + 1
    assert said["verdict"] == "fails" and f"ZeroDivisionError in ex02_diffusion.py, line {line}" in said["found"]


@pytest.mark.parametrize(
    "before, after",
    [
        (
            "p_sample(self, model, x, t, t_index, classes=None, w=0.0)",
            "p_sample(self, model, x, y, t, index, cfg_scale=0.0)",
        ),
        ("        return x\n", "        return [x, x]\n"),
        ("        return x\n", "        return torch.stack([x, x]).numpy()\n"),
        ('device="cuda"):', "device):"),
        ('img_size, device="cuda"):', 'img_size):\n        device = "cuda"'),
        ("torch.full((batch_size,), i, device=self.device)", 'torch.full((batch_size,), i, device="cuda").cuda()'),
    ],
)
def test_other_signatures_are_adapted_to_and_said(tmp_path, before, after):
    text = RIGHT["ex02_diffusion.py"]
    assert text.count(before) == 1
    text = text.replace(before, after)
    if "index" in after:
        text = text.replace("t_index == 0", "index == 0").replace(
            "if classes is None", "classes, w = y, cfg_scale\n        if classes is None", 1
        )
        text = text.replace(
            "self.p_sample(model, x, torch.full((batch_size,), i, device=self.device), i, classes, w)",
            "self.p_sample(model, x, classes, torch.full((batch_size,), i), i, w)",
        )
    verdicts = judged(write(tmp_path, {**RIGHT, "ex02_diffusion.py": text}))
    wrong = {name: said for name, said in verdicts.items() if said["verdict"] != "right" and name != "saved_range"}
    assert not wrong
    assert len(verdicts["guidance_calls"]["adapted"]) > (0 if "device" in after else 1)


# ------------------------------------------------------------------ a process of its own


@pytest.fixture
def three_facts(monkeypatch):
    monkeypatch.setattr(
        ex2_check, "FACTS", {name: FACTS[name] for name in ("linear_schedule", "cosine_schedule", "sigmoid_schedule")}
    )


SCHEDULES = """import torch


def linear_beta_schedule(beta_start, beta_end, timesteps):
    {}
    return torch.linspace(beta_start, beta_end, timesteps)
"""


@pytest.mark.parametrize(
    "line, said, found",
    [
        ("while True: pass", "hangs", "no answer within 4 s"),
        ("import os; os._exit(3)", "fails", "its code ended the program"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "fails", "its code ended the program"),
        ("import sys; sys.exit(0)", "fails", "SystemExit"),
        (
            "import socket; socket.create_connection(('localhost', 9))",
            "fails",
            "no network while a solution is checked",
        ),
        ("import os; os.closerange(3, 256); import time; time.sleep(50)", "fails", "its code ended the program"),
        ("import os; os.write(1, b'hello'); os.write(3, b'7\\n{}\\n')", "right", ""),
        ("import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()", "right", ""),
        ("print('{}', 'x' * 10**5); open('left.txt', 'w').write('x')", "right", ""),
    ],
)
def test_a_stranger_can_neither_hang_nor_end_the_check(tmp_path, three_facts, line, said, found):
    write(tmp_path, {"ex02_diffusion.py": SCHEDULES.format(line)})
    began = time.monotonic()
    first, *others = check_solution(tmp_path, 4.0)
    assert first["fact"] == "linear_schedule" and first["verdict"] == said and found in first["found"]
    assert [other["verdict"] for other in others] == ["missing", "missing"]
    assert time.monotonic() - began < 60
    assert [path.name for path in tmp_path.iterdir()] == ["ex02_diffusion.py"]


def test_only_the_fact_that_hangs_is_said_to(tmp_path, three_facts):
    text = (
        SCHEDULES.format("pass") + "\n\ndef cosine_beta_schedule(timesteps, s=0.008):\n    while True:\n        pass\n"
    )
    write(tmp_path, {"ex02_diffusion.py": text})
    assert [said["verdict"] for said in check_solution(tmp_path, 4.0)] == ["right", "hangs", "missing"]


@pytest.mark.parametrize("limit", ["0", "-1", "inf", "nan"])
def test_impossible_time_limits_are_one_line(tmp_path, capsys, limit):
    assert ex2_main.main(["check", str(tmp_path), "--time_limit", limit]) == 2
    assert "--time_limit must be above 0" in capsys.readouterr().err


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
    verdicts = judged(write(tmp_path, {**RIGHT, file: text}))
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []


def test_the_table_the_json_and_the_exit_code(tmp_path, three_facts, capsys):
    write(tmp_path, {"ex2_diffusion.py": SCHEDULES.format("timesteps += 1")})
    assert ex2_main.main(["check", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "2.3      WRONG    the linear schedule runs from beta_start to beta_end\n" in captured.out
    assert "found 1001 betas, expected 1000, one per timestep: 0 .. T has T + 1 entries" in captured.out
    assert captured.err == f"error: 3 of 3 facts are not right in {tmp_path}\n"
    assert ex2_main.main(["check", str(tmp_path), "--json"]) == 1
    verdicts = json.loads(capsys.readouterr().out)
    assert [said["verdict"] for said in verdicts] == ["wrong", "missing", "missing"]
    assert "0 of 3 facts are right" in "\n".join(as_lines(verdicts))


def test_a_folder_without_a_solution_is_one_line(tmp_path, capsys):
    assert ex2_main.main(["check", str(tmp_path)]) == 2
    assert "holds no solution" in capsys.readouterr().err


def test_facts_know_nothing_of_ours():
    sources = Path(ex2_facts.__file__).read_text("utf-8") + Path(ex2_solution.__file__).read_text("utf-8")
    assert set(re.findall(r"(?:from|import) (ex2_\w+)", sources)) == {"ex2_solution"}
