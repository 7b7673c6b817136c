"""`check`: our own solution and a right one pass every fact, every slip is named for what it is, and nothing hangs "
"it."""

import json
import time

import pytest
from mini_solutions import write

import ex2_main
from ex2.grading import run
from ex2.grading.facts import FACTS
from ex2.grading.run import as_lines, check_solution


def test_our_own_solution_is_right(pytestconfig, capsys):
    assert ex2_main.main(["check", str(pytestconfig.rootpath)]) == 0
    assert f"{len(FACTS)} of {len(FACTS)} facts are right" in capsys.readouterr().out


# ------------------------------------------------------------------ a process of its own


@pytest.fixture
def three_facts(monkeypatch):
    monkeypatch.setattr(
        run, "FACTS", {name: FACTS[name] for name in ("linear_schedule", "cosine_schedule", "sigmoid_schedule")}
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
