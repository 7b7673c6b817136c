"""What do other packages make of the minutes that quick takes? The same shapes, threads and minutes, one evaluator.

    pip install denoising-diffusion-pytorch diffusers
    python benchmarks/peers.py --minutes 3 6 12             108 minutes of training, and the samples
    python benchmarks/peers.py --who ours diffusers         only these, after three minutes

Packages keep their settings (of versions 2.3.4 and 0.42.1) and samplers; "as-ours" has quick's size, learning rate and
batch. None mirrors the shapes. Each package has a process of its own, on the CPU. Where the learning rate is
constant, one training goes on and is evaluated after each of the minutes; where it falls to zero, each has a training.
Seconds are those of training, without samples and evaluation; ours include the validation after each epoch but the
last. On a busy machine the CPU seconds say what a training really had; in ours they include the last validation too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ex2.data.images import DataSplits, ImageSet  # noqa: E402
from ex2.data.loader import make_loader  # noqa: E402
from ex2.evaluation.classifier import SmallClassifier  # noqa: E402
from ex2.evaluation.samples import (  # noqa: E402
    build_evaluator,
    compare,
    extract_features,
    inference_model,
    real_batches,
    sampled_batches,
)
from ex2.evaluation.tables import as_markdown  # noqa: E402
from ex2.machine.files import write_atomically  # noqa: E402
from ex2.optimisation import learning_rate  # noqa: E402
from ex2.settings.build import build_diffusion, load_data  # noqa: E402
from ex2.settings.cli import parse_args, preset_config  # noqa: E402
from ex2.training.run import fit, open_run  # noqa: E402
from ex2.training.start import prepare_training  # noqa: E402

BATCH, SAMPLE_BATCH = 16, 100  # the batch of quick, of Trainer and of train_unconditional.py
OUR_LR, OUR_WARMUP = 1e-3, 200
NO_END = 10**9  # steps: the time ends a training


class Peer:
    """A training that goes on for some minutes, with two networks: of the last weights and of their EMA.

    A subclass has `network`, `optimizer`, and the methods of a step and of samples that are missing here.
    """

    rate, scales = "constant", (None,)  # of learning; of guidance

    def __init__(self, splits: DataSplits, args):
        self.splits, self.args = splits, args
        self.steps, self.images, self.seconds = 0, 0, 0.0
        self.batches = endless_batches(splits.train, args.seed)
        self.sampler = f"{'DDIM' if args.sample_steps < 1000 else 'DDPM'}, {args.sample_steps} steps"

    def train(self, minutes: float) -> None:
        """Takes steps until all of them have taken so long."""
        started = time.monotonic() - self.seconds
        self.network.train()
        while self.seconds < 60 * minutes:
            images = next(self.batches)
            self.optimizer.zero_grad()
            self.loss(images).backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.steps, self.images = self.steps + 1, self.images + len(images)
            self.after_step(self.seconds / (60 * minutes))
            self.seconds = time.monotonic() - started

    def draw(self, network, labels: Tensor, scale: float | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As many samples as labels, in batches of (uint8 images, labels); without labels from a model without."""
        for part in labels.split(SAMPLE_BATCH):
            yield (self.sample(network, len(part)) * 255).round().byte(), None


class Ours(Peer):
    """`python ex2_main.py --preset quick --epochs 1000 --max_minutes MINUTES`, with labels or without."""

    rate = "falls"

    def __init__(self, splits: DataSplits, args, labels: bool):
        super().__init__(splits, args)
        self.flags = ["--preset", "quick", "--epochs", "1000", "--no_cuda", "--num_threads", str(args.threads)]
        self.flags += ["--seed", str(args.seed), "--data_seed", "0"] + ([] if labels else ["--no_class_free_guidance"])
        self.scales = (0.0, 1.0) if labels else (None,)

    def train(self, minutes: float) -> None:
        with TemporaryDirectory() as folder:
            flags = [*self.flags, "--max_minutes", str(minutes), "--results_dir", folder]
            self.config, device = prepare_training(parse_args(flags))
            self.diffusor = build_diffusion(self.config, device)
            run = open_run(self.config, self.splits, self.diffusor)
            fit(run)
        self.network, self.average = run.model, lambda: run.ema.model
        self.steps, self.seconds = run.step, run.seconds
        self.images = run.epochs_done * len(self.splits.train) + run.batches_done * self.config.batch_size
        self.sampler = f"{self.config.sampler}, eta {self.config.eta:g}, {self.config.sample_steps} steps"

    def draw(self, network, labels: Tensor, scale: float | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        network = inference_model(network, self.config, self.diffusor.device)
        for images, classes in sampled_batches(network, self.diffusor, self.config, labels, scale or 0.0):
            yield images, None if scale is None else classes


class DenoisingDiffusionPytorch(Peer):
    """Defaults of its `GaussianDiffusion` and `Trainer`, the width of its README."""

    def __init__(self, splits: DataSplits, args, lr: float = 1e-4, **sizes):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        super().__init__(splits, args)
        self.network = Unet(**sizes)
        self.build_process = partial(GaussianDiffusion, image_size=splits.train.images.shape[-1])
        self.process = self.build_process(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr, betas=(0.9, 0.99))
        self.ema = EMA(self.network, beta=0.995, update_every=10)

    def loss(self, images: Tensor) -> Tensor:
        return self.process((images + 1) / 2)

    def after_step(self, done: float) -> None:
        self.ema.update()

    def average(self):
        return self.ema.ema_model

    def sample(self, network, count: int) -> Tensor:
        return self.build_process(network, sampling_timesteps=self.args.sample_steps).sample(count)


class Diffusers(Peer):
    """Its examples/unconditional_image_generation/train_unconditional.py, with --use_ema.

    Its network, (128, 128, 256, 256, 512, 512), halves images five times, which 16 pixels can't be. `widths` replaces
    it; attention is at the last level but one, as there. The learning rate is a cosine over the time.
    """

    rate = "falls"

    def __init__(self, splits: DataSplits, args, widths: tuple[int, ...], lr: float = 1e-4, warmup: int = 500):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        super().__init__(splits, args)
        down, up = ["DownBlock2D"] * len(widths), ["UpBlock2D"] * len(widths)
        down[-2], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        levels = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}
        self.network = UNet2DModel(splits.train.images.shape[-1], 3, 3, layers_per_block=2, **levels)
        weights = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(weights, lr / warmup, betas=(0.95, 0.999), weight_decay=1e-6)
        self.ema = EMAModel(weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.rate_of_step = partial(learning_rate, lr, total_steps=NO_END, warmup_steps=warmup)

    def loss(self, images: Tensor) -> Tensor:
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        return mse_loss(self.network(self.scheduler.add_noise(images, noise, t), t).sample, noise)

    def after_step(self, done: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.rate_of_step(self.steps, time_fraction=done)
        self.ema.step(self.network.parameters())

    def average(self):
        network = deepcopy(self.network)
        self.ema.copy_to(network.parameters())
        return network

    def sample(self, network, count: int) -> Tensor:
        from diffusers import DDIMPipeline, DDPMPipeline

        pipeline = (DDIMPipeline if self.args.sample_steps < 1000 else DDPMPipeline)(network, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(count, num_inference_steps=self.args.sample_steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)


PEERS = {  # name -> package, how its training is made
    "ours": ("torch", partial(Ours, labels=True)),
    "ours-unlabelled": ("torch", partial(Ours, labels=False)),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", partial(DenoisingDiffusionPytorch, dim=64)),
    "denoising-diffusion-pytorch-as-ours": (
        "denoising_diffusion_pytorch",
        partial(DenoisingDiffusionPytorch, dim=32, dim_mults=(1, 2, 2), lr=OUR_LR),
    ),
    "diffusers": ("diffusers", partial(Diffusers, widths=(64, 64, 128, 128))),
    "diffusers-as-ours": ("diffusers", partial(Diffusers, widths=(32, 64, 64), lr=OUR_LR, warmup=OUR_WARMUP)),
}


def endless_batches(images: ImageSet, seed: int) -> Iterator[Tensor]:
    """Batches (16, 3, H, W) in [-1, 1], each epoch in an order of its own."""
    loader, epoch = make_loader(images, BATCH, "cpu", train=True, seed=seed), 0
    while True:
        loader.set_epoch(epoch)
        yield from (batch for batch, _ in loader)
        epoch += 1


def evaluate(evaluator, peer: Peer, network, labels: Tensor, scale: float | None) -> dict:
    """Metrics of one sample per label, and `calls`, how often the network saw each."""
    seen = []
    hook = network.eval().register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        found = compare(evaluator, extract_features(evaluator, peer.draw(network, labels, scale), "cpu"))
    hook.remove()
    return {**found, "calls": sum(seen) / len(labels)}


def measure(name: str, evaluator, splits: DataSplits, args) -> list[dict]:
    """The rows of one package, in a new process."""
    torch.set_num_threads(args.threads)
    labels = evaluator.images.labels[: args.samples]
    rows, peer = [], None
    for minutes in sorted(args.minutes):
        if peer is None or peer.rate == "falls":
            torch.manual_seed(args.seed)
            peer, cpu = PEERS[name][1](splits, args), 0.0
        cpu -= time.process_time()
        peer.train(minutes)
        cpu += time.process_time()
        row = {"training": name, "minutes": minutes, "parameters": sum(p.numel() for p in peer.network.parameters())}
        row.update({"rate": peer.rate, "steps": peer.steps, "images": peer.images})
        row.update({"s": round(peer.seconds), "CPU s": round(cpu)})
        for scale in peer.scales:
            last, ema = (evaluate(evaluator, peer, net, labels, scale) for net in (peer.network, peer.average()))
            found = {"sampler": peer.sampler, "network calls": ema["calls"], "w": scale}
            found["Fréchet distance, last weights"] = last["frechet_distance"]
            found.update({"EMA": ema["frechet_distance"], "class accuracy": ema.get("class_accuracy")})
            rows.append({**row, **found})
            print(as_markdown(rows[-1:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[3], help="of training (default: 3)")
    parser.add_argument("--who", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--samples", type=int, default=500, help="that are evaluated (default: 500)")
    parser.add_argument("--sample_steps", type=int, default=50, help="of the packages (default: 50; 1000: all)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (default: 0)")
    help = "the figures; features/ beside it keeps the classifier (default: %(default)s)"
    parser.add_argument("--out", default="results/peers.json", help=help)
    args = parser.parse_args()
    if args.samples <= SmallClassifier.width or min(args.minutes) <= 0 or not 1 <= args.sample_steps <= 1000:
        parser.error(f"--samples above {SmallClassifier.width}, --minutes above 0, --sample_steps 1 .. 1000")
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(args.threads)
    config = preset_config("quick")
    splits = load_data(config)
    evaluator = build_evaluator(splits, "cpu", config, Path(args.out), args.samples)
    tested = splits.test.subset(torch.arange(min(args.samples, len(splits.test))))
    real = compare(evaluator, extract_features(evaluator, real_batches(tested, "cpu"), "cpu"))
    cores = f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    report = {"machine": cores, "test images, Fréchet distance": real["frechet_distance"], "trainings": []}
    for name in args.who:
        package = PEERS[name][0]
        if importlib.util.find_spec(package) is None:
            print(f"{name} is left out: pip install {package.replace('_', '-')}")
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            report["trainings"] += process.submit(measure, name, evaluator, splits, args).result()
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.out), (json.dumps(report, indent=2) + "\n").encode())
    for title, content in report.items():
        print(as_markdown(content) if title == "trainings" and content else f"{title}: {content}")


if __name__ == "__main__":
    main()
