"""Everything about a GPU in one command of at most eight minutes: is what the program does there right, and how fast?

    python benchmarks/gpu_check.py                             all parts but the last
    python benchmarks/gpu_check.py --skeleton DIR              ... beside a solution of the handed-out skeleton in DIR
    python benchmarks/gpu_check.py --data_dir DIR --minutes 3  ... and a training on the images in DIR

Each part runs in a process of its own, with the time that is left: a part that fails or hangs costs the others nothing.
Prints Markdown, and writes it beside the figures as JSON (`--out`). On a machine without a GPU everything runs small on
the CPU, and says so: such figures only show that the check works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench  # noqa: E402

from ex2.machine.inference import InferenceModel  # noqa: E402
from ex2.machine.job import computes_in_bfloat16, pick_device  # noqa: E402
from ex2.noise import ImageNoise  # noqa: E402
from ex2.settings.build import build_diffusion, build_model  # noqa: E402
from ex2.settings.cli import preset_config  # noqa: E402
from ex2.settings.config import Config  # noqa: E402

DEVICE = pick_device(None)
AMP = computes_in_bfloat16("auto", DEVICE)
CUDA = DEVICE.type == "cuda"
TESTS = ("machine/test_gpu.py", "machine/test_cuda_graphs.py", "test_main.py") if CUDA else ("machine/test_gpu.py",)
STEPS = 50 if CUDA else 6  # of which losses are compared
TIMED_STEPS = 40 if CUDA else 2  # steps between two looks at the clock


def networks() -> dict[str, Config]:
    """The sizes that are timed: the command line's defaults, and the presets that are meant for a GPU."""
    if not CUDA:
        return {"tiny": Config(dim=8, dim_mults=(1, 2), image_size=16, batch_size=4, class_free_guidance=True)}
    return {"defaults": Config(), "exercise": preset_config("exercise"), "best": preset_config("best")}


def largest() -> Config:
    return networks().get("exercise") or networks()["tiny"]


def rate(step, images: int) -> float:
    """Images per second, the median of three looks at the clock."""
    for _ in range(8):  # warm-up, capture, check
        step()
    seconds = []
    for _ in range(3):
        bench.wait_for(DEVICE)
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            step()
        bench.wait_for(DEVICE)
        seconds.append((time.perf_counter() - start) / TIMED_STEPS)
    return images / statistics.median(seconds)


# ---------------------------------------------------------------------------- the parts: each returns rows of a table


def check_machine(args) -> list[dict]:
    run, operations = bench.at_best(DEVICE)
    run()
    seconds = bench.interleaved({"best": run}, DEVICE, 3)["best"]
    name = torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine()
    peak = operations / statistics.median(seconds) / 1e12
    return [{"device": name, "torch": torch.__version__, "peak, TFLOP/s": peak, "amp": AMP}]


def check_tests(args) -> list[dict]:
    """The tests that touch the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [{"tests": " ".join(TESTS), "exit code": done.returncode, "result": lines[-1], "failed": "; ".join(failed)}]


def check_losses(args) -> list[dict]:
    """The losses of a replayed training beside those of an eager one from the same seed, and the memory of both."""
    found = {}
    for name, replayed in (("eager", False), ("replayed", True)):
        step = bench.our_step(dataclasses.replace(largest(), compile="off"), DEVICE, replayed)
        memory = bench.memory_of(step, DEVICE)
        found[name] = (torch.stack([step()[0] for _ in range(STEPS)]).cpu(), memory)
        del step
        if CUDA:
            torch.cuda.empty_cache()
    (eager, memory), (replayed, more) = found["eager"], found["replayed"]
    worst = ((replayed - eager).abs() / eager).max().item()
    rows = {"steps": STEPS, "largest difference of a loss, relative": worst, "last loss": replayed[-1].item()}
    return [{**rows, "MB of an eager step": memory, "MB replayed": more}]


def check_speed(args, name: str) -> list[dict]:
    """Training: the skeleton's loop, ours operation by operation, replayed, and replayed after compiling."""
    config, rows = networks()[name], []
    plain = dataclasses.replace(config, class_free_guidance=False, guidance_scale=None, compile="off")
    compiled = dataclasses.replace(plain, compile="on")
    ways = {"skeleton": lambda: bench.skeleton_step(plain, DEVICE, args.skeleton)} if args.skeleton else {}
    ways["eager"] = lambda: bench.our_step(plain, DEVICE, replayed=False)
    if CUDA:
        ways["replayed"] = lambda: bench.our_step(plain, DEVICE)
        ways["compiled and replayed"] = lambda: bench.our_step(compiled, DEVICE)
    operations, peak = bench.operations_per_image(plain), check_machine(args)[0]["peak, TFLOP/s"] * 1e12
    for way, make in ways.items():
        start = time.perf_counter()
        step = make()
        step()
        bench.wait_for(DEVICE)
        row = {
            "network": name,
            "batch": config.batch_size,
            "way": way,
            "s to the first step": time.perf_counter() - start,
        }
        row["images/s"] = rate(step, config.batch_size)
        row["against the first"] = row["images/s"] / rows[0]["images/s"] if rows else 1.0
        row["fraction of peak"] = row["images/s"] * operations / peak
        rows.append(row)
        save(args, rows)  # what is timed so far stays, if the next one takes too long
        del step
    return rows


def check_kernels(args) -> list[dict]:
    """What a step launches, and how long the GPU works on it."""
    from torch.profiler import ProfilerActivity, profile

    rows = []
    for way, replayed in (("eager", False), ("replayed", True))[: 2 if CUDA else 1]:
        step = bench.our_step(dataclasses.replace(largest(), compile="off"), DEVICE, replayed)
        for _ in range(8):
            step()
        bench.wait_for(DEVICE)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=activities) as profiler:
            for _ in range(3):
                step()
            bench.wait_for(DEVICE)
        events = profiler.key_averages()
        kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
        busy = "self_device_time_total" if CUDA else "self_cpu_time_total"
        mine = [event for event in events if event.device_type == kind]
        launches = sum(event.count for event in events if "Launch" in event.key) / 3
        row = {"step": way, "operations": sum(event.count for event in mine) / 3, "launches from Python": launches}
        rows.append({**row, "busy, ms": sum(getattr(event, busy) for event in mine) / 3e3})
    return rows


def check_sampling(args) -> list[dict]:
    """Guided samples of 20 network calls, operation by operation and replayed."""
    config, rows = largest(), []
    model, diffusor = build_model(config, 10).to(DEVICE).eval(), build_diffusion(config, DEVICE)
    for count in (100, 500) if CUDA else (2,):
        classes = torch.arange(count, device=DEVICE) % 10
        for way in ("eager, TF32", "replayed, TF32", "replayed, bfloat16") if CUDA else ("eager",):
            network = InferenceModel(model, amp="bfloat16" in way)
            if "eager" in way:
                network.replayed = network.predict
            options = {"classes": classes, "guidance_scale": 1.0, "sampler": "dpmpp_2m", "eta": 1.0, "steps": 20}
            size, seconds = config.image_size, []
            for _ in range(3):
                bench.wait_for(DEVICE)
                start = time.perf_counter()
                diffusor.sample(network, size, count, generator=ImageNoise(0, 0, count, DEVICE), **options)
                bench.wait_for(DEVICE)
                seconds.append(time.perf_counter() - start)
            rows.append({"batch": count, "way": way, "images/s": count / min(seconds)})
    return rows


def check_training(args) -> list[dict]:
    """`exercise` on the images in --data_dir, with its figures."""
    out, data = Path(args.out).resolve().parent, ["--dataset", "folder", "--data_dir", args.data_dir]
    name = ["--run_name", "gpu-check", "--results_dir", str(out), "--no_resume"]
    size = (
        ["--preset", "exercise"]
        if CUDA
        else "--dim 8 --dim_mults 1 2 --image_size 8 --sample_steps 2 --timesteps 20".split()
    )
    train = [sys.executable, "ex2_main.py", *size, *data, *name, "--max_minutes", str(args.minutes)]
    start = time.monotonic()
    subprocess.run(train, cwd=ROOT, check=True)
    report = json.loads((out / "gpu-check" / "test_metrics.json").read_text())
    log = (out / "gpu-check" / "log.csv").read_text().splitlines()[-1].split(",")
    row = {"steps": int(log[0]), "epochs": int(log[1]) + 1, "val loss": float(log[-1])}
    row["bits/dim"] = min(report["bits_per_dim"][kind]["total"] for kind in ("beta", "beta_tilde"))
    return [{**row, "minutes in all": (time.monotonic() - start) / 60}]


def parts(args) -> dict:
    """name -> the function that makes its table."""
    table = {"machine": check_machine, "losses": check_losses}
    for name in networks():
        table[f"speed of {name}"] = lambda args, name=name: check_speed(args, name)
    table.update({"kernels": check_kernels, "sampling": check_sampling, "tests": check_tests})
    if args.data_dir:
        table["training"] = check_training
    return table


# ---------------------------------------------------------------------------- the command


def save(args, rows: list[dict]) -> None:
    Path(args.part_file).write_text(json.dumps(rows))


def run_part(name: str, argv: list[str], out: Path, seconds: float) -> list[dict]:
    """The rows of a part, run in a process of its own; a row that says why where there are none."""
    path, log = out.with_suffix(".part"), out.with_suffix(".log")
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, *argv, "--part", name, "--part_file", str(path)]
    with open(log, "a") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds).returncode
            why = f"failed with exit code {code}, see {log.name}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
    rows = json.loads(path.read_text()) if path.is_file() else []
    path.unlink(missing_ok=True)
    if not why:
        return rows
    return [*({**row, "note": ""} for row in rows), {**dict.fromkeys(rows[0] if rows else ()), "note": why}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skeleton", metavar="DIR", help="folder with another solution's ex02_model.py to time beside")
    parser.add_argument("--data_dir", help="a folder of images, train/<class>/* and test/<class>/*, to train on")
    parser.add_argument("--minutes", type=float, default=2.0, help="of that training (default: 2)")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything (default: 480)")
    parser.add_argument("--out", default="results/gpu_check.json", help="the figures (default: results/gpu_check.json)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part_file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        save(args, parts(args)[args.part](args))
        return
    end, out, report = time.monotonic() + args.limit, Path(args.out), {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".log").unlink(missing_ok=True)
    text = "" if CUDA else "No GPU here: everything ran small on the CPU, to show that the check works.\n"
    print(text)
    for name in parts(args):
        left = end - time.monotonic()
        rows = run_part(name, sys.argv[1:], out, left) if left > 10 else [{"note": "no time left"}]
        report[name] = rows
        table = f"\n### {name}\n\n{bench.as_markdown(rows)}"
        print(table, flush=True)
        text += table
        out.write_text(json.dumps(report, indent=2) + "\n")
        out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
