"""`check`: our own solution is right, no submission can hang, end or fool it, and many are judged at once."""

import csv
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mini_solutions import RIGHT, write

import ex2_main
from ex2.grading import run, worker
from ex2.grading.adapter import Missing
from ex2.grading.run import FACTS, as_lines, check_submission, judge
from ex2.grading.verdicts import Fact, Wrong


def test_our_own_solution_is_right(pytestconfig, capsys):
    assert ex2_main.main(["check", str(pytestconfig.rootpath)]) == 0
    assert f"{len(FACTS)} of {len(FACTS)} facts are right" in capsys.readouterr().out


# ------------------------------------------------------------------ a process of its own


@pytest.fixture
def three_facts(monkeypatch):
    chosen = {name: FACTS[name] for name in ("linear_schedule", "cosine_schedule", "sigmoid_schedule")}
    monkeypatch.setattr(run, "FACTS", chosen)


SCHEDULES = """import os, subprocess, sys, threading, time
import torch
{start}


def linear_beta_schedule(beta_start, beta_end, timesteps):
    {linear}
    return torch.linspace(beta_start, beta_end, timesteps)


def cosine_beta_schedule(timesteps, s=0.008):
    {cosine}


def sigmoid_beta_schedule(beta_start, beta_end, timesteps):
    {sigmoid}
"""


def schedules(start="", linear="pass", cosine="pass", sigmoid="pass"):
    return {"ex02_diffusion.py": SCHEDULES.format(start=start, linear=linear, cosine=cosine, sigmoid=sigmoid)}


def processes(mark):
    """Process ids with a mark in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found += [path.parent.name] if mark in path.read_bytes() else []
    return found


def test_a_submission_can_neither_see_print_leave_nor_forge_anything(tmp_path, three_facts, monkeypatch, capsys):
    """Its network is off, it may print and have threads; time is CPU time, so a fact that only waits is right."""
    monkeypatch.setenv("SECRET_OF_TUTOR", "hunter2")
    start = """
import ex2.grading; assert ex2.grading.MARK  # a package of our name
sleep = [sys.executable, "-c", "import time; time.sleep(98.7)"]
subprocess.Popen(sleep)
subprocess.Popen(sleep, env={}, start_new_session=True)
subprocess.Popen(["sh", "-c", '"$0" -c "import time; time.sleep(98.7)" &', sys.executable], start_new_session=True)
threading.Thread(target=time.sleep, args=(98.7,)).start()
print("{}", "x" * 10**5)
os.write(1, b"hello")
open("left.txt", "w").write("x")
seen = [sys.stdin.read(), "SECRET_OF_TUTOR" in os.environ]
try:
    import socket; socket.create_connection(("localhost", 9))
except OSError as error:
    seen.append(str(error))
"""
    forger = """import gc, json
    forged = {"value": '"right"', "verdict": "right", "adapted": [], "where": ""}
    ours = [kind for kind in gc.get_objects() if isinstance(kind, type) and kind.__name__ == "Submission"][0]
    ours.answer = lambda self, line: json.dumps({**forged, "id": json.loads(line)["id"]}) + "\\n"
    return torch.linspace(beta_start, beta_end, timesteps)"""
    cosine = "raise ValueError('\\x1b[31m\\u202e' + str(seen) + 'y' * 9999)"
    hostile = tmp_path / "hostile"
    (hostile / "ex2").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    write(hostile / "ex2", {"__init__.py": "", "grading.py": "MARK = 1"})
    write(hostile, schedules(start, "time.sleep(1.3)", cosine, forger))
    command = ["check", str(tmp_path / "none"), str(hostile), "--jobs", "2", "--time_limit", "1", "--json"]
    assert ex2_main.main(command) == 1
    *empty, linear, cosine, sigmoid = json.loads(capsys.readouterr().out)
    assert all(said["verdict"] == "missing" and "none of ex02_diffusion.py" in said["found"] for said in empty)
    assert linear["verdict"] == "right" and cosine["verdict"] == "fails"
    assert "?[31m?['', False, 'no network while a submission is checked']yy" in cosine["found"]
    assert cosine["found"].isprintable() and len(cosine["found"]) <= worker.MAX_TEXT
    assert sigmoid["verdict"] in ("fails", "wrong") and sigmoid["found"]
    line = (hostile / "ex02_diffusion.py").read_text("utf-8").split("def linear")[0].count("\n") + 1
    assert linear["where"] == f"ex02_diffusion.py:{line}"
    assert sorted(path.name for path in hostile.iterdir()) == ["ex02_diffusion.py", "ex2"]
    if sys.platform == "linux":
        assert processes(b"98.7") == []


def test_what_ends_floods_or_hangs_is_said_of_its_fact(tmp_path, three_facts):
    flood = """fds = [fd for fd in range(3, 9) if os.path.exists(f"/dev/fd/{fd}")]
    while True:
        for fd in fds:
            try:
                os.write(fd, b"x" * 10**5)
            except OSError:
                fds.remove(fd)"""
    write(
        tmp_path,
        schedules("", "os._exit(3)", flood, "while True: pass"),
    )
    began = time.monotonic()
    linear, cosine, sigmoid = check_submission(tmp_path, 1)
    assert linear["verdict"] == "fails" and linear["found"] == "its code ended the program"
    assert cosine["verdict"] == "fails" and cosine["found"] == "its answer is too long", cosine
    assert sigmoid["verdict"] == "hangs" and sigmoid["found"] == "no answer within 1 s of CPU time"
    assert time.monotonic() - began < 90


def test_an_import_that_hangs_costs_one_time_limit_and_is_said_once(tmp_path, three_facts, monkeypatch):
    monkeypatch.setattr(worker, "WALL", 1)
    write(tmp_path, schedules("time.sleep(600)"))
    began = time.monotonic()
    verdicts = check_submission(tmp_path, 1)
    assert {said["verdict"] for said in verdicts} == {"hangs"} and time.monotonic() - began < 60
    text = "\n".join(as_lines(verdicts))
    assert text.count("import of diffusion: no answer within 1 s (so for 3 facts)") == 1


def test_no_process_of_another_kind_is_killed():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ours:
        assert worker.kill_all_of("/no/such/home") == 0 and ours.poll() is None
        ours.stdin.close()


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize("limit", ["0", "-1", "inf", "nan"])
def test_impossible_time_limits_are_one_line(tmp_path, capsys, limit):
    assert ex2_main.main(["check", str(tmp_path), "--time_limit", limit]) == 2
    assert "--time_limit must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, flags, line",
    [
        ({}, [], "holds no submission: none of ex02_diffusion.py"),
        ({"ex02_diffusion_v2.py": ""}, [], "is ex02_diffusion_v2.py meant?"),
        (RIGHT, ["--jobs", "0"], "--jobs must lie within 1 .. 256, got 0"),
        (RIGHT, ["no_such_folder"], "no_such_folder is no folder"),
        (RIGHT, ["--csv", "no_such/x.csv"], "can't write no_such/x.csv (No such file or directory)"),
    ],
)
def test_what_can_not_be_checked_is_one_line(tmp_path, capsys, files, flags, line):
    assert ex2_main.main(["check", str(write(tmp_path, files)), *flags]) == 2
    assert line in capsys.readouterr().err


def test_a_submission_with_a_file_of_another_name_is_told_so(tmp_path):
    from mini_solutions import evaluated

    files = {"ex02_model.py": RIGHT["ex02_model.py"], "ex02_diffusion_v2.py": RIGHT["ex02_diffusion.py"]}
    said = evaluated(write(tmp_path, files), "forward_signal")["forward_signal"]
    assert said["verdict"] == "missing" and said["found"].endswith("is ex02_diffusion_v2.py meant?")


@pytest.fixture
def canned(monkeypatch):
    """Verdicts without a process: what a submission is, is its folder's name."""

    class Canned:
        where, adapted = "ex02_diffusion.py:57", ()

        def __init__(self, kind):
            self.kind = kind

        def begin(self):
            if self.kind == "einops":
                raise Missing("einops isn't installed: pip install einops")
            if self.kind == "wrong":
                raise Wrong("=1+1", "2", "a sum")

    names = ("linear_schedule", "cosine_schedule")
    monkeypatch.setattr(run, "FACTS", {name: Fact("2.3", name, "", lambda _: None) for name in names})
    monkeypatch.setattr(run, "check_submission", lambda folder, limit: judge(Canned(folder.name.split("-")[0]), names))


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        write(tmp_path / name, RIGHT)
    return [str(tmp_path / name) for name in names]


def test_a_missing_package_is_said_once_with_its_pip_line(tmp_path, canned, capsys):
    assert ex2_main.main(["check", *folders(tmp_path, "einops")]) == 1
    out = capsys.readouterr().out
    assert out.count("pip install einops") == 1 and "(so for 2 facts)" in out


def test_the_verdict_names_the_line_of_the_submission(tmp_path, canned, capsys):
    assert ex2_main.main(["check", *folders(tmp_path, "wrong")]) == 1
    captured = capsys.readouterr()
    assert "2.3      WRONG    linear_schedule\n" in captured.out
    assert "ex02_diffusion.py:57: found =1+1, expected 2: a sum" in captured.out
    assert captured.err.startswith("error: 2 of 2 facts are not right in ")


def test_many_submissions_are_one_table_with_the_errors_of_one_cause_grouped(tmp_path, canned, capsys):
    paths = folders(tmp_path, "right", "wrong-1", "wrong-2", "einops")
    files = ["--csv", str(tmp_path / "all.csv"), "--json", str(tmp_path / "all.json")]
    assert ex2_main.main(["check", *paths, "--jobs", "2", *files]) == 1
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.split("\n")[:5]]
    assert rows[0] == ["submission", "right", "differs", "wrong", "fails", "missing"]
    assert rows[1] == ["right", "2", "0", "0", "0", "0"] and rows[2] == ["wrong-1", "0", "0", "2", "0", "0"]
    assert captured.out.count("a sum") == 2 and captured.out.count("2: wrong-1, wrong-2") == 2
    assert captured.out.count("pip install einops") == 1
    assert "README has the command for a sandbox" in captured.out
    assert captured.err.split("\n")[0] == "1 of 4: right: 2 right"  # progress
    assert captured.err.endswith("error: 3 of 4 submissions are not all right\n")
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["submission"] for row in table] == ["right"] * 2 + ["wrong-1"] * 2 + ["wrong-2"] * 2 + ["einops"] * 2
    assert table[2]["found"] == "'=1+1"  # no formula in a spreadsheet
    as_json = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert [said["verdict"] for said in as_json] == [row["verdict"] for row in table]
    assert ex2_main.main(["check", paths[0], "--json"]) == 0
    assert [said["submission"] for said in json.loads(capsys.readouterr().out)] == ["right", "right"]


def test_folders_of_one_name_are_told_apart_and_none_is_judged_twice(tmp_path, canned):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [*folders(tmp_path / "a", "right"), *folders(tmp_path / "b", "right")]
    args = ex2_main.parse_args(["check", *paths, paths[0]])
    rows = run.judge_all(list(dict.fromkeys(map(Path, args.folders))), args)
    assert [row["submission"] for row in rows] == [paths[0]] * 2 + [paths[1]] * 2


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="in the background of a shell")
def test_ctrl_c_ends_every_submission(tmp_path):
    write(tmp_path, schedules("time.sleep(97.6)"))
    command = [sys.executable, ex2_main.__file__, "check", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not processes(str(tmp_path).encode() + b"\x0030") and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(2)
        assert process.wait(60) != 0
    assert processes(str(tmp_path).encode() + b"\x0030") == []


def test_einops_is_among_the_requirements(pytestconfig):
    lines = (pytestconfig.rootpath / "requirements.txt").read_text("utf-8").split("\n")
    assert any(line.startswith("einops>=") and "#" in line for line in lines)
