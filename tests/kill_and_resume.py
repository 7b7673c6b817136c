"""Kills a short training at random moments (SIGKILL), resumes it, and compares the end with a run that nothing stopped.

    python tests/kill_and_resume.py --times 50

Prints a line per trial; exit code 1 if a single one ends differently. Not a part of the test suite: 50 times take a
quarter of an hour on one core.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ex2_checkpoint as ckpt  # noqa: E402

TRAINING = (
    "--dataset shapes --image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --batch_size 300 --epochs 3 --no_cuda"
)
TRAINING += " --class_free_guidance --schedule cosine --eval_images 20 --eval_timesteps 3 --sample_steps 3"
TRAINING += " --save_minutes 0.01 --log_interval 7 --num_threads 1"


def train(results: Path, kill_after: float | None = None) -> float:
    """Runs the program, kills it after some seconds or lets it finish; returns how long it ran."""
    command = [sys.executable, str(ROOT / "ex2_main.py"), *TRAINING.split(), "--results_dir", str(results)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    else:
        if process.returncode != 0:
            raise RuntimeError(f"exit code {process.returncode}: {error}")
    return time.monotonic() - started


def outcome(results: Path) -> tuple:
    """What a run ended with: the digest of its checkpoint but for the folder, and its log but for the clock."""
    content = ckpt.load_checkpoint(results / "DDPM")
    content.pop("config")
    with open(results / "DDPM" / "log.csv", newline="") as file:
        log = [[cell for name, cell in row.items() if name != "seconds"] for row in csv.DictReader(file)]
    return ckpt.digest_of(content), log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="how many trainings to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder) / "straight"
        duration = train(straight)
        wanted = outcome(straight)
        print(f"uninterrupted: {duration:.1f} s")
        for trial in range(args.times):
            results = Path(folder) / str(trial)
            moment = moments.uniform(0, duration)
            train(results, kill_after=moment)
            reached = sorted(path.name for path in (results / "DDPM").glob("*.pt*"))
            train(results)
            equal = outcome(results) == wanted
            same += equal
            verdict = "same" if equal else "DIFFERENT"
            print(f"{trial + 1}: killed after {moment:.1f} s with {', '.join(reached) or 'no checkpoint'}: {verdict}")
    print(f"{same} of {args.times} ended as the uninterrupted run")
    return 0 if same == args.times else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
