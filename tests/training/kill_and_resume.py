"""Kills a short training at random moments (SIGKILL), and compares the end with a run that nothing stopped.

    python tests/kill_and_resume.py --times 50                  one process, started again after the kill
    python tests/kill_and_resume.py --times 10 --processes 2    one of two, which torchrun starts again

Prints a line per trial; exit code 1 if a single one ends differently. Not a part of the test suite: 50 times take a
quarter of an hour on one core, 10 times two processes as long.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ex2.training import checkpoint  # noqa: E402

TRAINING = (
    "--dataset shapes --image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --batch_size 300 --epochs 3 --no_cuda"
)
TRAINING += " --class_free_guidance --schedule cosine --eval_images 20 --eval_timesteps 3 --sample_steps 3"
TRAINING += " --save_minutes 0.01 --log_interval 7 --num_threads 1"


def command(results: Path, processes: int) -> list[str]:
    """Runs the program, in several processes under a torchrun that starts them again."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max-restarts=9"]
    return [
        sys.executable,
        *(torchrun if processes > 1 else []),
        str(ROOT / "ex2_main.py"),
        *TRAINING.split(),
        "--results_dir",
        str(results),
    ]


def workers_of(agent: int) -> list[int]:
    """Process ids of what the torchrun with that process id has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(agent):
                found.append(int(stat.parent.name))
    return sorted(found)


def train(results: Path, processes: int, kill_after: float | None = None, victim: int = 0) -> float:
    """Runs the program, kills it or one of its processes after some seconds; returns how long it ran."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command(results, processes), stdout=subprocess.DEVNULL, stderr=said)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=kill_after)
        if process.poll() is None:
            workers = workers_of(process.pid) if processes > 1 else [process.pid]
            for worker in workers[victim : victim + 1]:
                os.kill(worker, signal.SIGKILL)
        process.wait()
        if process.returncode != 0 and not (processes == 1 and kill_after is not None):
            said.seek(0)
            raise RuntimeError(f"exit code {process.returncode}: {said.read()}")
    return time.monotonic() - started


def outcome(results: Path) -> tuple:
    """What a run ended with: the digest of its checkpoint but for the folder, and its log but for the clock."""
    content = checkpoint.load_checkpoint(results / "DDPM")
    del content["config"], content["seconds"]
    with open(results / "DDPM" / "log.csv", newline="") as file:
        log = [[cell for name, cell in row.items() if name != "seconds"] for row in csv.DictReader(file)]
    return checkpoint.digest_of(content), log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="how many trainings to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--processes", type=int, default=1, help="that train together (default: 1)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder) / "straight"
        duration = train(straight, args.processes)
        wanted = outcome(straight)
        print(f"uninterrupted: {duration:.1f} s")
        for trial in range(args.times):
            results = Path(folder) / str(trial)
            moment, victim = moments.uniform(0, duration), moments.randrange(args.processes)
            took = train(results, args.processes, moment, victim)
            if args.processes == 1:
                took += train(results, 1)
            equal = outcome(results) == wanted
            same += equal
            verdict = "same" if equal else "DIFFERENT"
            print(f"{trial + 1}: process {victim} killed after {moment:.1f} s, {took:.1f} s in all: {verdict}")
    print(f"{same} of {args.times} ended as the uninterrupted run")
    return 0 if same == args.times else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
