"""How fast is it, and what do samples cost? Training steps and network calls, and quality against network calls.

    python benchmarks/bench.py                                speed, on the GPU where there is one, else the CPU
    python benchmarks/bench.py --skeleton DIR                 ... beside a solution of the handed-out skeleton in DIR
    python benchmarks/bench.py --checkpoint results/quick     ... and what samples of that run are worth, by sampler

Everything that is compared is timed in turns, round by round, so that a busy moment hits all alike; medians are shown,
and written with minimum and maximum as JSON (`--out`). Each way to train has a process of its own, as when people run
it: in one process it would be served from memory that another has freed. Shares of the peak are of the speed of large
matrix products or convolutions (`at_best`) in the same turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ex2_diffusion  # noqa: E402
from ex2.data.images import ImageSet, reverse_transform  # noqa: E402
from ex2.data.loader import make_loader  # noqa: E402
from ex2.evaluation.samples import build_evaluator, compare, extract_features, real_batches  # noqa: E402
from ex2.evaluation.tables import as_markdown  # noqa: E402
from ex2.machine.job import computes_in_bfloat16, pick_device  # noqa: E402
from ex2.noise import sample_in_batches  # noqa: E402
from ex2.settings.build import build_diffusion, build_model, load_data, restore_model  # noqa: E402
from ex2.settings.config import Config, config_of  # noqa: E402
from ex2.training.checkpoint import load_checkpoint  # noqa: E402
from ex2.training.run import Training  # noqa: E402
from ex2_model import Unet  # noqa: E402

SAMPLER_ROWS = (  # name, settings, timesteps; None is all
    ("ddpm (Eq. 8)", {"sampler": "ddpm"}, (None, 100, 25)),
    ("ddim, eta = 1", {"sampler": "ddim", "eta": 1.0}, (100, 25)),
    ("ddim, eta = 0", {"sampler": "ddim", "eta": 0.0}, (25,)),
    ("dpmpp_2m, eta = 1", {"sampler": "dpmpp_2m", "eta": 1.0}, (25, 10, 8)),
    ("dpmpp_2m, eta = 0", {"sampler": "dpmpp_2m"}, (25, 13)),
    ("heun", {"sampler": "heun"}, (13, 7)),
    ("ipndm", {"sampler": "ipndm"}, (25, 8)),
)


# ---------------------------------------------------------------------------- timing


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(variants: dict[str, Callable[[], object]], device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call of every variant, one of each per round; a first round isn't counted."""
    seconds = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times longer the one takes than the other, the median over rounds."""
    return statistics.median([a / b for a, b in zip(slow, fast)])


def at_best(device: torch.device) -> tuple[Callable[[], object], int]:
    """What the machine is best at, to call, and how many operations a call is.

    On a GPU these are matrix products in bfloat16, on a CPU a convolution in float32: MKL's products are half as fast
    on AMD.
    """
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

        def products() -> None:
            for _ in range(32):
                a @ a

        return products, 32 * 2 * 8192**3
    x = torch.randn(8, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    return lambda: conv(x), 2 * 8 * 32**2 * 9 * 256**2


# ---------------------------------------------------------------------------- training


def noise_images(config: Config) -> ImageSet:
    """As many images as a batch has: what they show costs no time."""
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    return ImageSet(torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(config.batch_size) % 10)


def our_step(config: Config, device: torch.device, replayed: bool = True) -> Callable[[], object]:
    """An optimiser step of this package: batch, noise, loss, clipping, AdamW, averaged weights.

    Args:
        replayed: as training does it on a GPU; False launches every operation from Python.
    """
    torch.manual_seed(0)
    config = dataclasses.replace(config, save_model=False, epochs=10**6, log_interval=10**6)
    model = build_model(config, 10).to(device)
    loader = make_loader(noise_images(config), config.batch_size, device, train=True, flip=config.flip)
    training = Training(model, config, build_diffusion(config, device), loader, "0123456789")
    training.start()
    if not replayed:
        training.step_function = training.eager_step
    training.network.train()
    batch = next(iter(loader))

    def step():
        training.epochs_done = training.step  # epochs of a single batch
        return training.take_step(*batch)

    return step


def skeleton_step(config: Config, device: torch.device, folder: str) -> Callable[[], object]:
    """An optimiser step as the handed-out loop makes it, with the U-Net and the process of the solution in `folder`."""
    sys.path.insert(0, folder)
    model_file, process_file = importlib.import_module("ex02_model"), importlib.import_module("ex02_diffusion")
    torch.manual_seed(0)
    model = model_file.Unet(config.dim, dim_mults=config.dim_mults, channels=3).to(device)
    schedule = ex2_diffusion.SCHEDULES[config.schedule]
    diffusor = process_file.Diffusion(config.timesteps, lambda t: schedule(t).float(), config.image_size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    data = noise_images(config)
    images = data.images.float() / 127.5 - 1

    def step() -> float:
        batch = images.to(device)
        optimizer.zero_grad()
        t = torch.randint(0, config.timesteps, (len(batch),), device=device).long()
        loss = diffusor.p_losses(model, batch, t, loss_type="l2")
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def in_own_process(make_step: Callable, *args) -> Callable:
    """The step that `make_step` makes of `args`, made and run in a new process; called with "memory" it is measured.

    Raises:
        EOFError: that process has ended.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, make_step, *args), daemon=True).start()
    theirs.close()

    def call(what: str = "step"):
        ours.send(what)
        return ours.recv()

    return call


def serve(connection, make_step: Callable, config: Config, device: torch.device, *args) -> None:
    """Makes a step and runs it whenever asked, until nobody can ask any more."""
    step = make_step(config, device, *args)
    with suppress(EOFError):
        while True:
            answer = None
            if connection.recv() == "memory":
                answer = memory_of(step, device)
            else:
                step()
                wait_for(device)
            connection.send(answer)


def operations_per_image(config: Config) -> int:
    """Of a training step, counted by torch; two per multiplication."""
    model = build_model(config, 10)
    x, t = torch.randn(1, 3, config.image_size, config.image_size), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, t).sum().backward()
    return counter.get_total_flops()


def bench_training(config: Config, device, args) -> tuple[list[dict], float]:
    """Images per second of the ways to train, the last column against the first row of them; and the peak, 1/s."""
    single = "TensorFloat-32" if device.type == "cuda" else "float32"
    amp = computes_in_bfloat16("auto", device) if args.amp is None else args.amp
    kinds = {single: {"amp": "off", "compile": "off"}}
    if amp:
        kinds["bfloat16"] = {"amp": "on", "compile": "off"}
    ways = {f"eager, {kind}": changes for kind, changes in kinds.items()}
    if args.compile:
        ways.update({f"compiled, {kind}": {**changes, "compile": "on"} for kind, changes in kinds.items()})
    makers = {"skeleton": (skeleton_step, config, device, args.skeleton)} if args.skeleton else {}
    makers.update({name: (our_step, dataclasses.replace(config, **change), device) for name, change in ways.items()})
    steps = {name: in_own_process(*maker) for name, maker in makers.items()}
    best, operations = at_best(device)
    *seconds, at_peak = interleaved({**steps, "best": best}, device, args.rounds).values()
    memory = {name: step("memory") for name, step in steps.items()}
    per_step, first = config.batch_size * operations_per_image(config), next(iter(steps))
    rows = []
    for name, times in zip(steps, seconds):
        rate = config.batch_size / statistics.median(times)
        row = {"training": name, "images/s": rate, "slowest": config.batch_size / max(times)}
        # The skeleton may take other operations; a CPU's peak is that of float32.
        unknown = name == "skeleton" or (device.type == "cpu" and "bfloat16" in name)
        share = None if unknown else per_step / operations * ratio(at_peak, times)
        row.update({"fastest": config.batch_size / min(times), "fraction of peak": share})
        rows.append({**row, "memory of a step, MB": memory[name], f"against {first}": ratio(seconds[0], times)})
    return rows, operations / statistics.median(at_peak)


def memory_of(run: Callable[[], object], device) -> float | None:
    """What a call takes of the GPU's memory beside the weights, MB; None on a CPU, where that can't be told."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


# ---------------------------------------------------------------------------- sampling


def bench_calls(config: Config, device, args) -> list[dict]:
    """Network calls without gradients: plain ones, and guided ones, whose batch is twice as large."""
    model: Unet = build_model(dataclasses.replace(config, class_free_guidance=True), 10).to(device).eval()
    x = torch.randn(2 * config.batch_size, 3, config.image_size, config.image_size, device=device)
    t, classes = torch.zeros(len(x), dtype=torch.long, device=device), torch.arange(len(x), device=device) % 10
    half = config.batch_size
    calls = {"plain": lambda: model(x[:half], t[:half], classes[:half]), "guided": lambda: model(x, t, classes)}
    best, operations = at_best(device)
    with torch.no_grad():
        *seconds, at_peak = interleaved({**calls, "best": best}, device, args.rounds).values()
    per_call, rows = half * operations_per_image(config) / 3, []
    for name, times in zip(calls, seconds):
        rate = half / statistics.median(times)
        share = per_call * (2 if name == "guided" else 1) / operations * ratio(at_peak, times)
        row = {"network call": name, "images/s": rate, "slowest": half / max(times), "fastest": half / min(times)}
        rows.append({**row, "fraction of peak": share})
    return rows


def bench_samplers(args, device) -> list[dict]:
    """Quality of a run's samples by sampler and number of timesteps, on the evaluator's features; best is smallest."""
    checkpoint = load_checkpoint(args.checkpoint)
    config = config_of(checkpoint, {"cuda": None, "data_dir": args.data_dir} if args.data_dir else {"cuda": None})
    splits, diffusor = load_data(config), build_diffusion(config, device)
    model = restore_model(checkpoint, config, device)
    evaluator = build_evaluator(splits, device, config, Path(args.checkpoint), args.samples)
    labels = evaluator.images.labels
    labels = labels[torch.arange(args.samples) % len(labels)]
    scale = {"guidance_scale": args.guidance_scale} if config.can_guide else {}
    rows = []
    for name, settings, visits in SAMPLER_ROWS:
        for steps in visits:
            calls, start = [], time.perf_counter()

            def counting(*inputs, calls=calls):
                calls.append(len(inputs[0]))
                return model(*inputs)

            counting.null_class = model.null_class
            sampling = {**settings, **scale, "steps": steps, "classes": labels if config.class_free_guidance else None}
            batches = sample_in_batches(
                diffusor, counting, args.samples, config.sample_batch, config.seed + 1, **sampling
            )
            images = [reverse_transform(batch) for batch in batches]
            seconds = time.perf_counter() - start
            pairs = zip(images, labels.split(config.sample_batch))
            figures = compare(evaluator, extract_features(evaluator, pairs, device))
            row = {"sampler": name, "times": steps or config.timesteps}
            row["network calls"] = len(calls) / len(images)
            row.update({key: figures.get(key) for key in ("frechet_distance", "recall", "class_accuracy")})
            rows.append({**row, "images/s": args.samples / seconds})
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    tested = splits.test.subset(torch.arange(min(args.samples, len(splits.test))))
    figures = compare(evaluator, extract_features(evaluator, real_batches(tested, device), device))
    rows.append(
        {**dict.fromkeys(rows[0]), "sampler": "test images", **{k: figures[k] for k in figures if k in rows[0]}}
    )
    return rows


# ---------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=32, help="base width of the U-Net (default: 32)")
    parser.add_argument("--dim_mults", type=int, nargs="+", default=[1, 2, 4], help="of its levels (default: 1 2 4)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels (default: 32)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--rounds", type=int, default=7, help="times each variant is timed (default: 7)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time compiled steps too"
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="time steps in bfloat16 too (default: where --amp auto does; a CPU that lacks it takes many times longer)",
    )
    parser.add_argument("--no_cuda", action="store_true", help="stay off the GPU")
    parser.add_argument("--skeleton", metavar="DIR", help="folder with another solution's ex02_model.py to time beside")
    parser.add_argument("--checkpoint", help="a run's folder, for quality against network calls")
    parser.add_argument("--data_dir", help="where that run's data lies now")
    parser.add_argument("--samples", type=int, default=500, help="that are evaluated per sampler (default: 500)")
    parser.add_argument("--guidance_scale", type=float, default=0.0, help="at which they are drawn (default: 0)")
    parser.add_argument("--out", default="results/bench.json", help="the figures (default: results/bench.json)")
    args = parser.parse_args()
    config = Config(
        dim=args.dim, dim_mults=tuple(args.dim_mults), image_size=args.image_size, batch_size=args.batch_size
    )
    device = pick_device(False if args.no_cuda else None)
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    training, peak = bench_training(config, device, args)
    report = {
        "machine": f"{machine}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "peak, GFLOP/s": peak / 1e9,
        "settings": f"dim {args.dim}, mults {args.dim_mults}, {args.image_size} pixels, batch {args.batch_size}",
        "training": training,
        "network calls": bench_calls(config, device, args),
    }
    if args.checkpoint:
        report["samplers"] = bench_samplers(args, device)
    report["peak memory of the process, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    for name, content in report.items():
        print(f"\n{as_markdown(content)}" if isinstance(content, list) else f"{name}: {content}")
    with suppress(FileExistsError):
        Path(args.out).parent.mkdir(parents=True)
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
