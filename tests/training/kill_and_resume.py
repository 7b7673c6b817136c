"""Ends short trainings at random moments, starts them again, and compares the end with a run that nothing stopped.

    python tests/training/kill_and_resume.py --times 200

By SIGKILL, SIGTERM or SIGINT, to the process or to its whole group; anywhere, or while the first or a later checkpoint
is being written; with images in memory or read by two DataLoader workers. Prints a line per trial; exit code 1 if one
of them ends differently. Not a part of the test suite: 200 times take some 20 minutes on one core.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402

import ex2_main  # noqa: E402
from ex2.data import load, shapes  # noqa: E402
from ex2.training import checkpoint, run  # noqa: E402, F401  so that a fork has torch, too

TRAINING = "--image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --epochs 3 --no_cuda --class_free_guidance"
TRAINING += (
    " --schedule cosine --eval_images 20 --eval_timesteps 3 --save_minutes 0.001 --log_interval 7 --num_threads 1"
)
MOMENTS = ("anywhere", "anywhere", "first checkpoint", "later checkpoint")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def make_images(folder: Path) -> None:
    """60 images of two classes, for the DataLoader workers."""
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")


def start(results: Path, images: Path | None) -> int:
    """Starts the program in a fork, which need not import torch; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(results.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Patch:
        setattr = staticmethod(setattr)

    tiny.without_evaluation(Patch)
    shapes.SHAPES_COUNT.update(train=1000, test=200)
    load.RESIDENT_LIMIT = 0
    data = ["--dataset", "shapes", "--batch_size", "60"]
    if images is not None:
        data = ["--dataset", "folder", "--data_dir", str(images), "--batch_size", "5", "--num_workers", "2"]
    code = 99
    with suppress(BaseException):
        code = ex2_main.main([*TRAINING.split(), *data, "--results_dir", str(results)])
    sys.stdout.flush()
    os._exit(code)


def train(
    results: Path, images: Path | None, moment: str = "", number: int = 0, after: float = 0.0, group=False
) -> str:
    """Runs the program, and ends it at a moment; returns how it ended."""
    pid, started, seen = start(results, images), time.monotonic(), 0
    while moment:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "had ended"
        if moment == "anywhere" and time.monotonic() - started >= after:
            break
        writing = any((results / "DDPM").glob("ckpt.pt*.tmp"))
        seen += writing
        if writing and (moment == "first checkpoint" or (moment == "later checkpoint" and seen > 3 + 20 * after)):
            break
    if moment:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(pid, number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not moment and code != 0:
        raise RuntimeError(f"exit code {code}: {(results.parent / 'output.txt').read_text()[-1000:]}")
    return str(code)


def outcome(results: Path) -> tuple:
    """What a run ended with: the digest of its checkpoint but for the folder, and its log but for the clock."""
    content = checkpoint.load_checkpoint(results / "DDPM")
    del content["config"], content["seconds"]
    with open(results / "DDPM" / "log.csv", newline="") as file:
        log = [[cell for name, cell in row.items() if name != "seconds"] for row in csv.DictReader(file)]
    return checkpoint.digest_of(content), log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="how many trainings to end (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    rng, same, started = random.Random(args.seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images)
        wanted, duration = {}, {}
        for kind in (None, images):
            began = time.monotonic()
            train(Path(folder) / f"straight {kind is None}", kind)
            duration[kind] = time.monotonic() - began
            wanted[kind] = outcome(Path(folder) / f"straight {kind is None}")
        for trial in range(args.times):
            results, kind = Path(folder) / str(trial), rng.choice((None, images))
            moment, number, group = rng.choice(MOMENTS), rng.choice(SIGNALS), rng.random() < 0.5
            after = rng.uniform(0, duration[kind] if moment == "anywhere" else 1)
            ended = train(results, kind, moment, number, after, group)
            train(results, kind)
            equal = outcome(results) == wanted[kind]
            same += equal
            whom = "group" if group else "process"
            what = f"{signal.Signals(number).name} to the {whom}, {moment}, {'2 workers' if kind else '0 workers'}"
            print(f"{trial + 1}: {what}: {ended}, then {'same' if equal else 'DIFFERENT'}", flush=True)
    print(
        f"{same} of {args.times} ended as the uninterrupted run, seed {args.seed}, {time.monotonic() - started:.0f} s"
    )
    return 0 if same == args.times else 1


if __name__ == "__main__":
    sys.exit(main())
