"""The diffusion process: beta schedules, forward and reverse process, samplers and guidance (2.2 a-d, 2.3, 2.4 b).

Symbols are those of the sheet and of Ho et al. 2020 (https://arxiv.org/abs/2006.11239): x_zero is the image, x_t the
noisy image, eps the noise, alphas_bar the cumulative product of alphas = 1 - betas. Code t is the paper's t - 1.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ex2.noise import NoiseSource, randn
from ex2.samplers import SAMPLERS, Estimate, check_classes, check_sampling, takes_eta

SPACING = 1.5  # exponent of the subsequence of timesteps; 1 is even, 2 quadratic
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def check_betas(betas: Tensor, timesteps: int) -> Tensor:
    """`betas`, or a ValueError where they are not T values strictly between 0 and 1."""
    if betas.shape != (timesteps,):
        raise ValueError(f"the schedule gave betas of shape {tuple(betas.shape)}, expected ({timesteps},)")
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"every beta must lie strictly between 0 and 1, got {betas.min():.4g} to {betas.max():.4g}")
    return betas


def check_timesteps(timesteps: int) -> None:
    """Raises a ValueError for a T below 1."""
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")


def linear_beta_schedule(beta_start: float, beta_end: float, timesteps: int) -> Tensor:
    """Betas that grow linearly from `beta_start` to `beta_end`; Ho et al. 2020, section 4. (T,) in float64."""
    check_timesteps(timesteps)
    return check_betas(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64), timesteps)


def cosine_beta_schedule(timesteps: int, s: float = 0.008) -> Tensor:
    """Betas whose alphas_bar follows a squared cosine, at most 0.999; Nichol and Dhariwal 2021, Eq. 17. (T,), float64.

    `s` keeps the first betas from vanishing.
    """
    check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return check_betas((1 - f[1:] / f[:-1]).clamp(max=0.999), timesteps)


def sigmoid_beta_schedule(beta_start: float, beta_end: float, timesteps: int, s_limit: float = 6) -> Tensor:
    """Betas that follow a sigmoid over [-s_limit, s_limit]; the sheet's Eq. 10. (T,) in float64.

    The sheet leaves the range of t open; here T equally spaced points from 0 to T, both ends included.
    """
    check_timesteps(timesteps)
    t = torch.linspace(0, timesteps, timesteps, dtype=torch.float64)
    rise = torch.sigmoid(-s_limit + 2 * t / timesteps * s_limit)
    return check_betas(beta_start + rise * (beta_end - beta_start), timesteps)


def rescale_schedule(schedule: Callable[[float, float, int], Tensor], timesteps: int) -> Tensor:
    """`schedule` from 1e-4 to 0.02 as published for T = 1000, its betas multiplied by 1000/T at any other T.

    Otherwise linear betas leave alphas_bar = 0.364 at T = 100: samples would start from noise the model never saw.
    """
    check_timesteps(timesteps)
    if timesteps <= 20:
        raise ValueError(
            f"{timesteps} timesteps are too few, the last beta would reach 1: use 21 or more, or --schedule cosine"
        )
    return schedule(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps, timesteps)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": partial(rescale_schedule, linear_beta_schedule),
    "cosine": cosine_beta_schedule,
    "sigmoid": partial(rescale_schedule, sigmoid_beta_schedule),
}


def extract(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """The entries of table `a` (T,) at timesteps `t` (B,), shaped (B, 1, ..., 1) to broadcast over `x_shape`."""
    return a.gather(-1, t).reshape(len(t), *[1] * (len(x_shape) - 1))


def check_images(x_zero: Tensor) -> None:
    """Raises a ValueError for integer images and, on the CPU only, for values outside [-1, 1]."""
    if not x_zero.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {x_zero.dtype}: scale 0..255 by x / 127.5 - 1")
    if x_zero.device.type == "cpu" and x_zero.numel() and (largest := x_zero.abs().amax().item()) > 1 + 1e-4:
        raise ValueError(f"images must lie in [-1, 1], got |x| up to {largest:.4g}: scale 0..255 by x / 127.5 - 1")


def guided_eps(model, x: Tensor, t: Tensor, classes: Tensor | None = None, guidance_scale: float = 0.0) -> Tensor:
    """Classifier-free guidance, the sheet's Eq. 11: (1 + w) eps(x, t, c) - w eps(x, t). 2.4 b.

    Args:
        model: (x, t) -> eps, or (x, t, classes) -> eps with an attribute `null_class`, the label of "no class".
        x: (B, C, H, W) noisy images.
        t: (B,) timesteps.
        classes: (B,) labels, or None for an unconditional prediction.
        guidance_scale: w. 0 is conditional, -1 unconditional; any other w takes both in one call on 2B images. It needs
            classes, and a model with a null class, or it is a ValueError.
    """
    null_class = getattr(model, "null_class", None)
    if guidance_scale != 0 and (classes is None or null_class is None):
        raise ValueError(f"guidance_scale={guidance_scale:g} needs classes and a class-conditional model")
    if classes is None:
        return model(x, t)
    if guidance_scale == 0:
        return model(x, t, classes)
    null = torch.full_like(classes, null_class)
    if guidance_scale == -1:
        return model(x, t, null)
    both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((classes, null)))  # (2B, C, H, W)
    eps_class, eps_null = both.chunk(2)
    return (1 + guidance_scale) * eps_class - guidance_scale * eps_null


class Diffusion:
    """A forward process q with fixed betas, and the reverse process p that a noise-predicting model drives.

    Args:
        timesteps: T, the number of noising steps.
        get_noise_schedule: T -> betas (T,), as `SCHEDULES["cosine"]`; a ValueError where they are not strictly between
            0 and 1.
        img_size: height and width in pixels.
        device: where the tables live, and the model has to; None takes CUDA where there is some, else the CPU.
    """

    def __init__(self, timesteps, get_noise_schedule, img_size, device=None):
        """2.2 a: every factor of Eqs. 4 and 8 is computed once, in float64, and kept as a float32 table."""
        check_timesteps(timesteps)
        try:
            betas = torch.as_tensor(get_noise_schedule(timesteps))
        except TypeError as error:
            example = "lambda t: linear_beta_schedule(1e-4, 0.02, t)"
            raise ValueError(
                f"get_noise_schedule takes the number of timesteps alone, as {example}: {error}"
            ) from error
        betas = check_betas(betas.to("cpu", torch.float64), timesteps)

        self.timesteps, self.img_size = timesteps, img_size
        self.model_timesteps = torch.arange(timesteps)  # the t that the model is given; `respace` thins it

        alphas = 1 - betas
        alphas_bar = torch.cumprod(alphas, dim=0)
        alphas_bar_prev = F.pad(alphas_bar[:-1], (1, 0), value=1.0)  # before step 0 there is no noise
        if alphas_bar[-1] > 0.01:
            what = f"alphas_bar ends at {alphas_bar[-1]:.3g} > 0.01: x_T still shows the image, and samples start from "
            warnings.warn(f"{what}noise the model never saw. Use more timesteps or larger betas.", stacklevel=2)
        self.alphas_bar_exact = alphas_bar.tolist()  # in float64, for `respace` and `second_order_x_zero`
        self.betas, self.alphas_bar, self.alphas_bar_prev = betas, alphas_bar, alphas_bar_prev
        self.log_snr = torch.log(alphas_bar / (1 - alphas_bar))  # the scale on which schedules can be compared
        # Eq. 4: x_t = sqrt_alphas_bar * x_zero + sqrt_one_minus_alphas_bar * eps
        self.sqrt_alphas_bar, self.sqrt_one_minus_alphas_bar = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
        # Eq. 8: x_{t-1} = sqrt_recip_alphas * (x_t - eps_factor * eps) + sqrt_betas * z
        self.sqrt_recip_alphas = alphas.rsqrt()
        self.eps_factor = betas / (1 - alphas_bar).sqrt()
        self.sqrt_betas = betas.sqrt()
        # Ho et al. 2020, Eq. 7: q(x_{t-1} | x_t, x_zero), of whose mean this is the factor of x_zero
        self.posterior_mean_x_zero = alphas_bar_prev.sqrt() * betas / (1 - alphas_bar)
        self.posterior_variance = betas * (1 - alphas_bar_prev) / (1 - alphas_bar)
        self.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device) -> Diffusion:
        """Moves the tables to `device` (as float32: some devices have no float64) and returns the diffusor."""
        self.device = torch.device(device)
        for name, table in vars(self).items():
            if isinstance(table, Tensor):
                setattr(self, name, table.to(self.device, torch.float32 if table.is_floating_point() else None))
        return self

    def network_output(self, model, x_t: Tensor, t: Tensor, classes=None, guidance_scale: float = 0.0) -> Tensor:
        """What a network says of x_t, (B, C, H, W); see `guided_eps`. All network calls go through here."""
        return guided_eps(model, x_t, self.model_timesteps[t], classes, guidance_scale)

    def loss_target(self, x_zero: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a network learns to predict: the noise. For v or x_0, change this and `predict_noise`."""
        return noise

    def predict_noise(self, model, x_t: Tensor, t: Tensor, classes=None, guidance_scale: float = 0.0) -> Tensor:
        """eps (B, C, H, W) by the network's output, which is the noise already."""
        return self.network_output(model, x_t, t, classes, guidance_scale)

    def q_sample(self, x_zero: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draws x_t ~ q(x_t | x_zero) in one step; the sheet's Eqs. 4 and 5. 2.2 c.

        Args:
            x_zero: (B, C, H, W) images in [-1, 1].
            t: (B,) timesteps.
            noise: eps like x_zero; None draws it from N(0, I).
        """
        noise = torch.randn_like(x_zero) if noise is None else noise
        signal = extract(self.sqrt_alphas_bar, t, x_zero.shape) * x_zero
        return signal + extract(self.sqrt_one_minus_alphas_bar, t, x_zero.shape) * noise

    @torch.no_grad()
    def forward_trajectory(self, x_zero: Tensor, generator: NoiseSource = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Eq. 3 step by step: yields (-1, x_zero, x_zero), then (t, x_t, x_zero) for t = 0 .. T-1."""
        yield -1, x_zero, x_zero
        x = x_zero
        for t in range(self.timesteps):
            x = (1 - self.betas[t]).sqrt() * x + self.sqrt_betas[t] * randn(x.shape, x.device, generator)
            yield t, x, x_zero

    def predict_x_zero(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. 4 solved for x_zero: the image that `eps` turned into `x_t`. (B, C, H, W), not clamped."""
        noise = extract(self.sqrt_one_minus_alphas_bar, t, x_t.shape) * eps
        return (x_t - noise) / extract(self.sqrt_alphas_bar, t, x_t.shape)

    def predict_eps(self, x_t: Tensor, t: Tensor, x_zero: Tensor) -> Tensor:
        """Eq. 4 solved for eps: the noise between `x_zero` and `x_t`. (B, C, H, W)."""
        signal = extract(self.sqrt_alphas_bar, t, x_t.shape) * x_zero
        return (x_t - signal) / extract(self.sqrt_one_minus_alphas_bar, t, x_t.shape)

    def p_losses(self, denoise_model, x_zero, t, noise=None, loss_type="l1", classes=None, min_snr=None) -> Tensor:
        """The simplified loss, Eq. 9: how well the model predicts the noise in x_t. A scalar. 2.2 d.

        Args:
            denoise_model: (x_t, t) -> eps, or (x_t, t, classes) -> eps where classes are given.
            x_zero: (B, C, H, W) images in [-1, 1], or a ValueError.
            t: (B,) timesteps.
            noise: the target; None draws it from N(0, I).
            loss_type: "l1" (mean absolute error, the skeleton's default) or "l2" (mean squared error, as in Eq. 9).
            classes: (B,) labels for a conditional model.
            min_snr: gamma of `min_snr_weights`; None weighs all timesteps alike, as Eq. 9 does.
        """
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type must be 'l1' or 'l2', got {loss_type!r}")
        check_images(x_zero)
        noise = torch.randn_like(x_zero) if noise is None else noise
        output = self.network_output(denoise_model, self.q_sample(x_zero, t, noise), t, classes)
        target = self.loss_target(x_zero, t, noise)
        if min_snr is None:
            return LOSSES[loss_type](output, target)
        errors = LOSSES[loss_type](output, target, reduction="none").flatten(1).mean(1)  # (B,)
        return (self.min_snr_weights(t, min_snr) * errors).mean()

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR, (B,): less weight for little noise; Hang et al. 2023, https://arxiv.org/abs/2303.09556."""
        return (gamma * torch.exp(-self.log_snr.gather(-1, t))).clamp(max=1)

    def ddpm_step(self, x: Tensor, t: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        """x_{t-1} from x_t and the predicted noise: the sheet's Eq. 8, with sigma_t^2 = beta_t and z ~ N(0, I)."""
        mean = extract(self.sqrt_recip_alphas, t, x.shape) * (x - extract(self.eps_factor, t, x.shape) * eps)
        return mean + extract(self.sqrt_betas, t, x.shape) * z

    @torch.no_grad()
    def p_sample(self, model, x, t, t_index, classes=None, guidance_scale=0.0, generator=None) -> Tensor:
        """One reverse step x_t -> x_{t-1}: Eq. 8 to the letter. 2.2 d.

        Args:
            x: x_t (B, C, H, W).
            t: (B,) timesteps, all equal to the integer `t_index`; at 0 no noise is added.
            model, classes, guidance_scale: as in `guided_eps`.
            generator: where the noise comes from, see `randn`.
        """
        eps = self.predict_noise(model, x, t, classes, guidance_scale)
        z = randn(x.shape, x.device, generator) if t_index > 0 else torch.zeros_like(x)
        return self.ddpm_step(x, t, eps, z)

    def clamp_eps(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noise in x_t if the x_zero estimate is clamped to [-1, 1]; x_t itself is never clamped."""
        return self.predict_eps(x, t, self.predict_x_zero(x, t, eps).clamp(-1, 1))

    def respace(self, steps: int | None) -> Diffusion:
        """The same process on a subsequence of `steps` timesteps (`subsample_timesteps`); None takes all.

        Nichol and Dhariwal 2021, Eq. 19.
        """
        if steps is None or steps == self.timesteps:
            return self
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"sampling steps must lie within 1 .. {self.timesteps} (the timesteps), got {steps}")
        timesteps = subsample_timesteps(self.timesteps, steps)
        alphas_bar = torch.tensor(self.alphas_bar_exact, dtype=torch.float64)[timesteps]
        betas = 1 - alphas_bar / F.pad(alphas_bar[:-1], (1, 0), value=1.0)
        thinned = Diffusion(steps, lambda _: betas, self.img_size, self.device)
        thinned.model_timesteps = self.model_timesteps[timesteps.to(self.device)]
        return thinned

    def until(self, count: int) -> Diffusion:
        """The process up to `count` noising steps, for samples that start in the middle of it."""
        part = copy.copy(self)
        part.timesteps = int((self.model_timesteps < count).sum())
        if part.timesteps < 1:
            raise ValueError(f"none of the {self.timesteps} sampling steps lies within the first {count} timesteps")
        return part

    @torch.no_grad()
    def sample_trajectory(
        self,
        model,
        image_size: int,
        batch_size: int = 16,
        channels: int = 3,
        *,
        classes: Tensor | Sequence[int] | None = None,
        guidance_scale: float = 0.0,
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        generator: NoiseSource = None,
        clamp: bool = True,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        start_image: Tensor | None = None,
        start_fraction: float = 1.0,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Algorithm 2 of Ho et al. 2020, step by step: yields (t, x_t, x_zero estimate), last (-1, sample, sample).

        One batch is alive at a time, see `thin_trajectory`. The model is called in eval mode; its own mode is restored.

        Args:
            model, classes, guidance_scale: as in `guided_eps`.
            image_size: height and width in pixels; any that the model accepts.
            sampler: a name of `SAMPLERS`.
            steps: length of the subsequence of timesteps, by default all T. Each is one network call; for "heun" two,
                but for the last.
            eta: stochasticity of "ddim" and "dpmpp_2m": 0 is the ODE, 1 ancestral.
            generator: where the noise comes from, see `randn`.
            clamp: clamp every x_zero estimate to [-1, 1] (`clamp_eps`); without it cosine schedules blow up.
            guidance_interval: fractions of T between which samples are guided, elsewhere w is 0 (Kynkäänniemi et al.
                2024, https://arxiv.org/abs/2404.07724).
            start_image: (C, H, W) in [-1, 1]; all samples start from it with noise (Eq. 4), not from noise alone
                (SDEdit, Meng et al. 2022, https://arxiv.org/abs/2108.01073). None starts from noise.
            start_fraction: of T, how far the start image is noised: the more, the less is left of it.

        Raises:
            ValueError: an argument is out of range.
            FloatingPointError: at the end, where the predicted noise was not finite.
        """
        check_sampling(sampler, eta, guidance_interval)
        if not isinstance(image_size, int):
            raise ValueError(f"image_size is one number, the height and the width in pixels, got {image_size!r}")
        if classes is not None:
            classes = check_classes(classes, batch_size, getattr(model, "null_class", None)).to(self.device)
        process = self.respace(steps)
        timesteps = process.model_timesteps.tolist()
        finite = torch.tensor(True, device=self.device)

        def predict(x: Tensor, index: int) -> Estimate:
            """What the network says of x at number `index` of the subsequence of timesteps."""
            t = torch.full((batch_size,), index, device=self.device, dtype=torch.long)
            fraction = (timesteps[index] + 1) / self.timesteps
            guided = classes is None or guidance_interval[0] <= fraction <= guidance_interval[1]
            with eval_mode(model):
                eps = process.predict_noise(model, x, t, classes, guidance_scale if guided else 0.0)
            finite.logical_and_(eps.isfinite().all())
            if clamp:
                eps = process.clamp_eps(x, t, eps)
            return Estimate(t, eps, process.predict_x_zero(x, t, eps))

        shape = (batch_size, channels, image_size, image_size)
        draw = partial(randn, shape, self.device, generator)
        x_start = draw()
        if start_image is not None:
            check_images(start_image)
            if not 0 < start_fraction <= 1:
                raise ValueError(f"start_fraction is a fraction of T, above 0 and at most 1; got {start_fraction:g}")
            process = process.until(round(start_fraction * self.timesteps))
            t = torch.full((batch_size,), process.timesteps - 1, device=self.device)
            x_start = process.q_sample(start_image.to(self.device).expand(shape), t, x_start)
        options = {"eta": eta} if takes_eta(sampler) else {}
        for index, x, x_zero in SAMPLERS[sampler](process, predict, x_start, draw, **options):
            if index < 0 and not finite:
                advice = "lower --guidance_scale, or try --weights raw"
                raise FloatingPointError(f"sampling diverged (noise not finite): {advice}")
            yield timesteps[index] if index >= 0 else -1, x, x_zero

    def sample(self, model, image_size: int, batch_size: int = 16, channels: int = 3, **sampling) -> Tensor:
        """Draws images (B, C, H, W), about in [-1, 1]; arguments as in `sample_trajectory`. Algorithm 2. 2.2 b."""
        trajectory = self.sample_trajectory(model, image_size, batch_size, channels, **sampling)
        length = (sampling.get("steps") or self.timesteps) + 1
        for _, x, _ in tqdm(trajectory, "sampling", length, leave=False, disable=None):  # noqa: B007
            pass
        return x


@contextmanager
def eval_mode(model) -> Iterator[None]:
    """Puts a model into eval mode, without label dropping and dropout, and restores the mode it had."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def subsample_timesteps(timesteps: int, steps: int) -> Tensor:
    """`steps` of the timesteps 0 .. T-1: increasing, T-1 included, denser near 0 where detail forms."""
    subsequence = (timesteps - 1) * torch.linspace(0, 1, steps, dtype=torch.float64) ** SPACING
    subsequence[-1] = timesteps - 1  # of a single step, too
    return torch.maximum(subsequence.round().long(), torch.arange(steps))  # where they would coincide, one by one


def evenly_spaced(length: int, count: int) -> list[int]:
    """`count` indices spread over 0 .. length - 1, both ends among them; all where there are fewer."""
    return torch.linspace(0, length - 1, min(count, length)).round().long().tolist()


def thin_trajectory(trajectory, length: int, frames: int) -> list[tuple[int, Tensor, Tensor]]:
    """About `frames` evenly spaced entries of a trajectory of `length` entries, both ends among them, on the CPU."""
    wanted = evenly_spaced(length, frames)
    return [(t, x.cpu(), x_zero.cpu()) for i, (t, x, x_zero) in enumerate(trajectory) if i in wanted]
