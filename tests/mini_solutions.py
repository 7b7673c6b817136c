"""A right solution of the exercise in few lines, and deliberate slips, each a replacement in it."""

import sys
from contextlib import contextmanager

import torch

from ex2.grading.adapter import PREFIXES, OnCpu
from ex2.grading.run import FACTS, judge
from ex2.grading.submission import Submission
from ex2.grading.worker import Worker

DIFFUSION = """
import torch
import torch.nn.functional as F


def linear_beta_schedule(beta_start, beta_end, timesteps):
    return torch.linspace(beta_start, beta_end, timesteps)


def cosine_beta_schedule(timesteps, s=0.008):
    x = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alphas_bar = torch.cos((x + s) / (1 + s) * torch.pi / 2) ** 2
    return torch.clip(1 - alphas_bar[1:] / alphas_bar[:-1], 0, 0.999).float()


def sigmoid_beta_schedule(beta_start, beta_end, timesteps, s_limit=6):
    return beta_start + torch.sigmoid(torch.linspace(-s_limit, s_limit, timesteps)) * (beta_end - beta_start)


def extract(a, t):
    return a.gather(0, t).view(-1, 1, 1, 1)


class Diffusion:
    def __init__(self, timesteps, get_noise_schedule, img_size, device="cuda"):
        self.timesteps, self.img_size, self.device = timesteps, img_size, device
        self.betas = get_noise_schedule(timesteps).to(device)
        self.alphas = 1 - self.betas
        self.alphas_bar = torch.cumprod(self.alphas, 0)
        before = F.pad(self.alphas_bar[:-1], (1, 0), value=1.0)
        self.posterior = self.betas * (1 - before) / (1 - self.alphas_bar)

    @torch.no_grad()
    def p_sample(self, model, x, t, t_index, classes=None, w=0.0):
        if classes is None:
            eps = model(x, t)
        elif w == 0:
            eps = model(x, t, classes)
        else:
            both = torch.cat((classes, torch.full_like(classes, model.null_class)))
            eps_c, eps_0 = model(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)
            eps = (1 + w) * eps_c - w * eps_0
        scaled = extract(self.betas, t) / torch.sqrt(1 - extract(self.alphas_bar, t)) * eps
        mean = (x - scaled) / torch.sqrt(extract(self.alphas, t))
        if t_index == 0:
            return mean
        return mean + torch.sqrt(extract(self.betas, t)) * torch.randn_like(x)

    @torch.no_grad()
    def sample(self, model, image_size, batch_size=16, channels=3, classes=None, w=0.0):
        x = torch.randn(batch_size, channels, image_size, image_size, device=self.device)
        for i in reversed(range(self.timesteps)):
            x = self.p_sample(model, x, torch.full((batch_size,), i, device=self.device), i, classes, w)
        return x

    def q_sample(self, x_zero, t, noise=None):
        if noise is None:
            noise = torch.randn_like(x_zero)
        return torch.sqrt(extract(self.alphas_bar, t)) * x_zero + torch.sqrt(1 - extract(self.alphas_bar, t)) * noise

    def p_losses(self, denoise_model, x_zero, t, noise=None, loss_type="l1", classes=None):
        if noise is None:
            noise = torch.randn_like(x_zero)
        x_t = self.q_sample(x_zero, t, noise)
        eps = denoise_model(x_t, t) if classes is None else denoise_model(x_t, t, classes)
        if loss_type == "l1":
            return F.l1_loss(eps, noise)
        if loss_type == "l2":
            return F.mse_loss(eps, noise)
        raise ValueError(loss_type)
"""

MODEL = """
import torch
from torch import nn


class Unet(nn.Module):
    def __init__(self, dim, dim_mults=(1, 2), channels=3, class_free_guidance=False, p_uncond=None, num_classes=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, channels, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_free_guidance, self.p_uncond, self.null_class = class_free_guidance, p_uncond, num_classes
        if class_free_guidance:
            self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, x, time, classes=None):
        emb = self.time(time.float()[:, None] / 100)
        if self.class_free_guidance:
            if classes is None:
                classes = torch.full((len(x),), self.null_class)
            elif self.training:
                dropped = torch.rand(len(x)) < self.p_uncond
                classes = torch.where(dropped, self.null_class, classes)
            emb = emb + self.embedding(classes)
        return self.last(torch.tanh(self.first(x) + emb[:, :, None, None]))
"""

MAIN = """
import argparse
import torch
from torchvision.utils import save_image
from ex02_diffusion import Diffusion, linear_beta_schedule


def sample_and_save_images(n_images, diffusor, model, device, store_path):
    for i, image in enumerate(diffusor.sample(model, diffusor.img_size, n_images)):
        save_image((image + 1) / 2, f"{store_path}/{i}.png")


def test(model, testloader, diffusor, device, args):
    model.eval()
    with torch.no_grad():
        for images, labels in testloader:
            t = torch.randint(0, diffusor.timesteps, (len(images),))
            print(diffusor.p_losses(model, images, t, loss_type="l2", classes=labels))


def run(args):
    schedule = lambda timesteps: linear_beta_schedule(0.0001, 0.02, timesteps)
    return Diffusion(args.timesteps, schedule, 32, "cpu")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--timesteps", type=int, default=1000)
    run(parser.parse_args())
"""

RIGHT = {"ex02_diffusion.py": DIFFUSION, "ex02_model.py": MODEL, "ex02_main.py": MAIN}

D, M, P = "ex02_diffusion.py", "ex02_model.py", "ex02_main.py"
# name: (file, what stands there, what stands there instead, the fact, what it looks like, other facts it breaks)
SLIPS = {
    "signal-no-root": (
        *(D, "torch.sqrt(extract(self.alphas_bar, t)) * x_zero", "extract(self.alphas_bar, t) * x_zero"),
        *("forward_signal", "root of alpha-bar left out", "loss_values"),
    ),
    "signal-root-twice": (
        *(D, "torch.sqrt(extract(self.alphas_bar, t)) * x_zero", "extract(self.alphas_bar, t) ** 0.25 * x_zero"),
        *("forward_signal", "root of alpha-bar taken twice", ""),
    ),
    "signal-one-step": (
        *(D, "torch.sqrt(extract(self.alphas_bar, t)) * x_zero", "torch.sqrt(extract(self.alphas, t)) * x_zero"),
        *("forward_signal", "alpha_t of one step in place of the product", ""),
    ),
    "signal-as-noise": (
        *(D, "torch.sqrt(extract(self.alphas_bar, t)) * x_z", "torch.sqrt(1 - extract(self.alphas_bar, t)) * x_z"),
        *("forward_signal", "the image has the factor of the noise", ""),
    ),
    "noise-no-root": (
        *(D, "torch.sqrt(1 - extract(self.alphas_bar, t)) * noise", "(1 - extract(self.alphas_bar, t)) * noise"),
        *("forward_noise", "root of 1 - alpha-bar left out", "forward_draws loss_draws"),
    ),
    "noise-uniform": (
        *(D, "noise = torch.randn_like(x_zero)\n        return", "noise = torch.rand_like(x_zero)\n        return"),
        *("forward_draws", "uniform noise", ""),
    ),
    "noise-shared": (
        *(
            D,
            "noise = torch.randn_like(x_zero)\n        return",
            "noise = torch.randn(x_zero.shape[1:])\n        return",
        ),
        *("forward_draws", "noise drawn without the batch's shape", ""),
    ),
    "step-root-twice": (
        *(D, "/ torch.sqrt(extract(self.alphas, t))", "/ extract(self.alphas, t) ** 0.25"),
        *("reverse_image", "root of alpha_t taken twice", "reverse_prediction sample_spread"),
    ),
    "step-alphas-bar": (
        *(D, "/ torch.sqrt(extract(self.alphas, t))", "/ torch.sqrt(extract(self.alphas_bar, t))"),
        *("reverse_image", "alpha-bar_t in place of alpha_t", "reverse_prediction sample_spread"),
    ),
    "step-no-root": (
        *(D, "/ torch.sqrt(1 - extract(self.alphas_bar, t)) * eps", "/ (1 - extract(self.alphas_bar, t)) * eps"),
        *("reverse_prediction", "root of 1 - alpha-bar left out", "sample_spread"),
    ),
    "step-sign": (
        *(D, "(x - scaled)", "(x + scaled)", "reverse_prediction", "the noise is added, not subtracted"),
        "sample_spread",
    ),
    "variance-posterior": (
        *(
            D,
            "torch.sqrt(extract(self.betas, t)) * torch.randn_like",
            "torch.sqrt(extract(self.posterior, t)) * torch.randn_like",
        ),
        *("reverse_noise", "sigma^2 is the posterior variance", "sample_spread"),
    ),
    "variance-no-root": (
        *(D, "torch.sqrt(extract(self.betas, t)) * torch.randn_like", "extract(self.betas, t) * torch.randn_like"),
        *("reverse_noise", "root of beta_t left out", "sample_spread"),
    ),
    "variance-posterior-no-root": (
        *(
            D,
            "torch.sqrt(extract(self.betas, t)) * torch.randn_like",
            "extract(self.posterior, t) * torch.randn_like",
        ),
        *("reverse_noise", "the posterior variance without its root", "sample_spread"),
    ),
    "variance-uniform": (
        *(D, "torch.randn_like(x)\n\n", "torch.rand_like(x)\n\n", "reverse_noise", "uniform noise", "sample_spread"),
    ),
    "noise-at-the-end": (
        *(D, "if t_index == 0:", "if t_index < 0:", "reverse_first_noise", "noise is added to the finished image"),
        "sample_spread guidance_zero guidance_equation",
    ),
    "no-noise-at-1": (
        *(D, "if t_index == 0:", "if t_index <= 1:", "reverse_first_noise", "the last step is taken for t = 1", ""),
    ),
    "never-0": (
        *(D, "reversed(range(self.timesteps))", "reversed(range(1, self.timesteps))"),
        *("sample_times", "t = 0 is never visited", "guidance_in_sample"),
    ),
    "wrong-way-round": (
        *(D, "reversed(range(self.timesteps))", "range(self.timesteps)"),
        *("sample_times", "the wrong way round", "sample_spread"),
    ),
    "start-uniform": (
        *(
            D,
            "x = torch.randn(batch_size",
            "x = torch.rand(batch_size",
            "sample_start",
            "uniform noise",
            "sample_spread",
        ),
    ),
    "loss-sum": (
        *(D, "F.mse_loss(eps, noise)", 'F.mse_loss(eps, noise, reduction="sum")'),
        *("loss_values", "summed over the pixels, not averaged", "loss_draws"),
    ),
    "loss-root": (
        *(D, "F.mse_loss(eps, noise)", "F.mse_loss(eps, noise).sqrt()", "loss_values", "the root of the mean squared"),
        "loss_draws",
    ),
    "loss-target": (
        *(D, "F.mse_loss(eps, noise)", "F.mse_loss(eps, x_t)", "loss_target", "the target is x_t"),
        "loss_values loss_draws",
    ),
    "loss-x-0": (
        *(D, "F.mse_loss(eps, noise)", "F.mse_loss(eps, x_zero)", "loss_target", "the target is x_0"),
        "loss_values loss_draws",
    ),
    "loss-noise-twice": (
        *(D, "x_t = self.q_sample(x_zero, t, noise)", "x_t = self.q_sample(x_zero, t)"),
        *("loss_draws", "noise is drawn twice", ""),
    ),
    "cosine-clip": (*(D, "0, 0.999).float()", "0, 1).float()", "cosine_schedule", "clip missing at 0.999", ""),),
    "cosine-annotated": (
        *(
            D,
            "0, 0.999).float()",
            "0.0001, 0.9999).float()",
            "cosine_schedule",
            "cut off at 0.0001 below and at 0.9999",
            "",
        ),
    ),
    "cosine-square": (*(D, "torch.pi / 2) ** 2", "torch.pi / 2)", "cosine_schedule", "the cosine is not squared", ""),),
    "cosine-0.02": (*(D, "0, 0.999).float()", "0, 0.02).float()", "cosine_schedule", "cut off at 0.02", ""),),
    "cosine-lower-clip": (
        *(D, "0, 0.999).float()", "1e-4, 0.999).float()", "cosine_schedule", "cut off at 0.0001 below, which", ""),
    ),
    "cosine-inverted": (
        *(D, "1 - alphas_bar[1:] / alphas_bar[:-1], 0,", "1 - alphas_bar[:-1] / alphas_bar[1:], 0,"),
        *("cosine_schedule", "the ratio of alpha-bar is inverted", ""),
    ),
    "cosine-inverted-clipped": (
        *(D, "1 - alphas_bar[1:] / alphas_bar[:-1], 0,", "1 - alphas_bar[:-1] / alphas_bar[1:], 1e-4,"),
        *("cosine_schedule", "the ratio of alpha-bar is inverted", ""),
    ),
    "cosine-appended": (
        *(D, "return torch.clip(1 - alphas_bar[1:] / alphas_bar[:-1], 0, 0.999).float()"),
        """x = torch.linspace(0, 1, timesteps)
    alphas_bar = torch.cos((x + s) / (1 + s) * torch.pi / 2) ** 2
    betas = torch.clip(1 - alphas_bar[1:] / alphas_bar[:-1], 0, 0.999)
    return torch.cat((betas, betas[-1:]))""",
        *("cosine_schedule", "the last beta is appended", ""),
    ),
    "cosine-one-less": (
        *(D, "torch.linspace(0, 1, timesteps + 1, d", "torch.linspace(0, 1, timesteps, d"),
        *("cosine_schedule", "T points have T - 1 ratios", ""),
    ),
    "sigmoid-range": (
        *(D, "torch.linspace(-s_limit, s_limit, timesteps)", "torch.linspace(0, 1, timesteps)"),
        *("sigmoid_schedule", "the sigmoid schedule's range", ""),
    ),
    "sigmoid-unscaled": (
        *(D, "beta_start + torch.sigmoid(", "torch.sigmoid(", "sigmoid_schedule", "the sigmoid schedule's range", ""),
    ),
    "sigmoid-one-more": (
        *(D, "s_limit, s_limit, timesteps)", "s_limit, s_limit, timesteps + 1)"),
        *("sigmoid_schedule", "0 .. T has T + 1 entries", ""),
    ),
    "x-T-keeps": (
        *(P, "default=1000", "default=100", "end_of_the_process", "x_T keeps 36% of the image at T = 100", ""),
    ),
    "time-lost": (
        *(M, "emb = self.time(time.float()[:, None] / 100)", "emb = self.time(torch.zeros(len(x), 1))"),
        *("unet_time", "the time embedding reaches no block", ""),
    ),
    "class-lost": (
        *(M, "emb = emb + self.embedding(classes)", "emb = emb + 0 * self.embedding(classes)"),
        *("class_matters", "the class embedding reaches no block", "class_in_eval class_dropped"),
    ),
    "dropped-in-eval": (*(M, "elif self.training:", "else:", "class_in_eval", "labels are dropped in eval mode", ""),),
    "never-dropped": (*(M, "elif self.training:", "elif False:", "class_dropped", "labels are never dropped", ""),),
    "dropped-by-batch": (
        *(
            M,
            "torch.rand(len(x))",
            "torch.rand(1).expand(len(x))",
            "class_dropped",
            "dropped for the batch as a whole",
            "",
        ),
    ),
    "dropped-in-place": (
        *(M, "classes = torch.where(dropped, self.null_class, classes)", "classes[dropped] = self.null_class"),
        *("class_kept", "dropped in place", ""),
    ),
    "labels-lost": (
        *(
            D,
            "eps = denoise_model(x_t, t) if classes is None else denoise_model(x_t, t, classes)",
            "eps = denoise_model(x_t, t)",
        ),
        *("loss_classes", "labels are lost on the way", ""),
    ),
    "guidance-none": (
        *(D, "eps = (1 + w) * eps_c - w * eps_0", "eps = eps_c", "guidance_equation", "guidance has no effect"),
        "guidance_in_sample",
    ),
    "guidance-exchanged": (
        *(D, "(1 + w) * eps_c - w * eps_0", "w * eps_c - (1 + w) * eps_0"),
        *("guidance_equation", "Eq. 11 with w and 1 + w exchanged", ""),
    ),
    "guidance-other-w": (
        *(D, "(1 + w) * eps_c - w * eps_0", "eps_0 + w * (eps_c - eps_0)"),
        *("guidance_equation", "w in place of 1 + w", ""),
    ),
    "guidance-unconditional": (
        *(
            D,
            "eps = model(x, t, classes)",
            "eps = model(x, t)",
            "guidance_zero",
            "w = 0 is the unconditional prediction",
            "",
        ),
    ),
    "guidance-fixed": (
        *(D, "(1 + w) * eps_c - w * eps_0", "3 * eps_c - 2 * eps_0"),
        *("guidance_equation", "the guidance scale is fixed, at w = 2", "guidance_in_sample"),
    ),
    "guidance-fixed-in-sample": (
        *(D, "i, classes, w)", "i, classes, 0.5)"),
        *("guidance_in_sample", "the guidance scale is fixed, at w = 0.5", ""),
    ),
    "guidance-p-uncond": (
        *(D, "i, classes, w)", "i, classes, model.p_uncond)"),
        *("guidance_in_sample", "the guidance scale is fed with p_uncond", ""),
    ),
    "guidance-two-calls": (
        *(D, "model(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2)", "model(x, t, classes), model(x, t)"),
        *("guidance_calls", "the model is called twice where one batch of double size does", ""),
    ),
    "fid-of-few": (
        *(P, "def run(args):"),
        """def fid(diffusor, model, images, count=64):
    return frechet_distance(images, diffusor.sample(model, 32, batch_size=count))


def run(args):""",
        *("fid_images", "FID on 64 images", ""),
    ),
    "images-dark": (*(P, "(image + 1) / 2", "image", "saved_range", "images saved dark", ""),),
    "test-in-training": (*(P, "    model.eval()\n", "", "test_loop", "model.eval() is missing", ""),),
    "test-with-gradients": (*(P, "with torch.no_grad():", "if True:", "test_loop", "torch.no_grad() is missing", ""),),
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


class Local(Worker):
    """A submission in this process: a hundred times as fast as in one of its own."""

    def __init__(self, folder):
        self.submission = Submission(folder)
        super().__init__(folder, limit=10**6)

    def ask(self, line):
        return self.submission.answer(line)

    def lose(self):
        self.lost += 1


@contextmanager
def isolated(folder):
    """Imports modules of the exercise from `folder`, and forgets them afterwards. Ours of the same names are hidden."""

    def taken_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PREFIXES)}

    sys.path.insert(0, str(folder))
    hidden, threads = taken_out(), torch.get_num_threads()
    torch.set_num_threads(1)  # the images are small
    try:
        with OnCpu():
            yield
    finally:
        sys.path.remove(str(folder))
        torch.set_num_threads(threads)
        taken_out()
        sys.modules.update(hidden)


def evaluated(folder, *facts):
    """fact -> verdict, of all facts or of some."""
    with isolated(folder):
        return {said["fact"]: said for said in judge(Local(folder), facts or FACTS)}
