// The diffusion process of ex2_diffusion.py and the samplers of ex2/samplers.py in JavaScript, under the same names.
//
// Equations are the exercise sheet's. Images are Float32Arrays in [-1, 1], tables are arrays of ordinary numbers. Code
// t is the paper's t - 1. Everything is for one image: a picture of many is as many calls.

/** A new image whose every number is f(i). */
function image(length, f) {
  const numbers = new Float32Array(length);
  for (let i = 0; i < length; i++) numbers[i] = f(i);
  return numbers;
}

/** `count` numbers from first to last, both among them. */
const linspace = (first, last, count) =>
  Array.from({ length: count }, (_, i) => (count === 1 ? first : first + ((last - first) * i) / (count - 1)));

/** Betas (T,) by the names of --schedule. Linear and sigmoid are rescaled by 1000/T. */
const SCHEDULES = {
  linear: (T) => linspace((1e-4 * 1000) / T, (0.02 * 1000) / T, T),
  cosine: (T, s = 0.008) => {
    const f = linspace(0, 1, T + 1).map((u) => Math.cos((((u + s) / (1 + s)) * Math.PI) / 2) ** 2);
    return f.slice(1).map((value, t) => Math.min(0.999, 1 - value / f[t]));
  },
  sigmoid: (T, s_limit = 6) => {
    const [beta_start, beta_end] = [(1e-4 * 1000) / T, (0.02 * 1000) / T];
    const rise = linspace(0, T, T).map((t) => 1 / (1 + Math.exp(s_limit - ((2 * t) / T) * s_limit)));
    return rise.map((value) => beta_start + value * (beta_end - beta_start)); // Eq. 10
  },
};

/** Classifier-free guidance, Eq. 11: (1 + w) eps(x, t, c) - w eps(x, t). label: c, or null for none. */
function guided_eps(model, x, t, label, guidance_scale) {
  if (label === null || model.null_class === null) return model.forward(x, t);
  if (guidance_scale === 0) return model.forward(x, t, label);
  const eps_null = model.forward(x, t, model.null_class);
  if (guidance_scale === -1) return eps_null;
  const eps_class = model.forward(x, t, label);
  return image(x.length, (i) => (1 + guidance_scale) * eps_class[i] - guidance_scale * eps_null[i]);
}

/** A forward process q with fixed betas, and the reverse process p that a noise-predicting model drives. */
class Diffusion {
  /** betas (T,); model_timesteps (T,): the t that the model is given, of a subsequence of another process. */
  constructor(betas, model_timesteps = betas.map((_, t) => t)) {
    [this.timesteps, this.model_timesteps, this.betas] = [betas.length, model_timesteps, betas];
    const alphas = betas.map((beta) => 1 - beta);
    let product = 1;
    this.alphas_bar = alphas.map((alpha) => (product *= alpha));
    this.alphas_bar_prev = [1, ...this.alphas_bar.slice(0, -1)]; // before step 0 there is no noise
    // Eq. 4: x_t = sqrt_alphas_bar * x_zero + sqrt_one_minus_alphas_bar * eps
    this.sqrt_alphas_bar = this.alphas_bar.map(Math.sqrt);
    this.sqrt_one_minus_alphas_bar = this.alphas_bar.map((alpha_bar) => Math.sqrt(1 - alpha_bar));
    // Eq. 8: x_{t-1} = sqrt_recip_alphas * (x_t - eps_factor * eps) + sqrt_betas * z
    this.sqrt_recip_alphas = alphas.map((alpha) => 1 / Math.sqrt(alpha));
    this.eps_factor = betas.map((beta, t) => beta / this.sqrt_one_minus_alphas_bar[t]);
    this.sqrt_betas = betas.map(Math.sqrt);
    this.posterior_variance = betas.map((beta, t) => (beta * (1 - this.alphas_bar_prev[t])) / (1 - this.alphas_bar[t]));
  }

  /** x_t ~ q(x_t | x_zero), Eqs. 4 and 5. */
  q_sample(x_zero, t, noise) {
    return image(
      x_zero.length,
      (i) => this.sqrt_alphas_bar[t] * x_zero[i] + this.sqrt_one_minus_alphas_bar[t] * noise[i],
    );
  }

  /** Eq. 4 solved for x_zero: the image that `eps` turned into `x_t`. */
  predict_x_zero(x_t, t, eps) {
    return image(x_t.length, (i) => (x_t[i] - this.sqrt_one_minus_alphas_bar[t] * eps[i]) / this.sqrt_alphas_bar[t]);
  }

  /** Eq. 4 solved for eps: the noise between `x_zero` and `x_t`. */
  predict_eps(x_t, t, x_zero) {
    return image(x_t.length, (i) => (x_t[i] - this.sqrt_alphas_bar[t] * x_zero[i]) / this.sqrt_one_minus_alphas_bar[t]);
  }

  /** The mean of x_{t-1} by the predicted noise: the first term of Eq. 8. */
  ddpm_mean(x, t, eps) {
    return image(x.length, (i) => this.sqrt_recip_alphas[t] * (x[i] - this.eps_factor[t] * eps[i]));
  }

  /** x_{t-1} from x_t and the predicted noise: Eq. 8, with sigma_t^2 = beta_t and z ~ N(0, I). */
  ddpm_step(x, t, eps, z) {
    const mean = this.ddpm_mean(x, t, eps);
    return image(x.length, (i) => mean[i] + this.sqrt_betas[t] * z[i]);
  }

  /** The same process on a subsequence of `steps` timesteps; Nichol and Dhariwal 2021, Eq. 19. */
  respace(steps) {
    if (steps === this.timesteps) return this;
    const timesteps = subsample_timesteps(this.timesteps, steps);
    const betas = timesteps.map((t, i) => 1 - this.alphas_bar[t] / (i ? this.alphas_bar[timesteps[i - 1]] : 1));
    return new Diffusion(betas, timesteps);
  }

  /** The process up to `count` noising steps of the whole one, for samples that start in the middle of it. */
  until(count) {
    const part = Object.assign(Object.create(Diffusion.prototype), this);
    part.timesteps = Math.max(1, this.model_timesteps.filter((t) => t + 1 <= count).length);
    return part;
  }
}

/** `steps` of the timesteps 0 .. T-1: increasing, T-1 included, denser near 0 where detail forms. */
function subsample_timesteps(timesteps, steps) {
  const subsequence = linspace(0, 1, steps).map((u) => Math.round((timesteps - 1) * u ** 1.5));
  subsequence[steps - 1] = timesteps - 1; // of a single step, too
  return subsequence.map((t, i) => Math.max(t, i)); // where they would coincide, one by one
}

/** Ancestral sampling, Algorithm 2 of Ho et al. 2020: every step is Eq. 8. */
function* ddpm(process, predict, x, draw) {
  for (let index = process.timesteps - 1; index >= 0; index--) {
    const { eps, x_zero, output } = predict(x, index);
    yield { index, x, x_zero, eps, output };
    x = process.ddpm_step(x, index, eps, index > 0 ? draw() : new Float32Array(x.length));
  }
  yield { index: -1, x, x_zero: x };
}

/** The non-Markovian sampler, deterministic for eta = 0; Song et al. 2021. */
function* ddim(process, predict, x, draw, eta) {
  for (let index = process.timesteps - 1; index >= 0; index--) {
    const { eps, x_zero, output } = predict(x, index);
    yield { index, x, x_zero, eps, output };
    x = ddim_step(process, index, eps, x_zero, draw, eta);
  }
  yield { index: -1, x, x_zero: x };
}

/** DPM-Solver++(2M), second order; Lu et al. 2022, Alg. 2. The first and the last step are of first order. */
function* dpmpp_2m(process, predict, x, draw, eta) {
  let x_zero_before = null;
  for (let index = process.timesteps - 1; index >= 0; index--) {
    let { eps, x_zero, output } = predict(x, index);
    yield { index, x, x_zero, eps, output };
    let mean = x_zero;
    if (index > 0 && x_zero_before !== null) {
      mean = second_order_x_zero(process, index, x_zero, x_zero_before);
      eps = process.predict_eps(x, index, mean);
    }
    x = ddim_step(process, index, eps, mean, draw, eta);
    x_zero_before = x_zero;
  }
  yield { index: -1, x, x_zero: x };
}

/** Heun's method, second order; Karras et al. 2022, Alg. 1. Two network calls a step, but for the last one. */
function* heun(process, predict, x, draw) {
  for (let index = process.timesteps - 1; index >= 0; index--) {
    const { eps, x_zero, output } = predict(x, index);
    yield { index, x, x_zero, eps, output };
    const end = ddim_step(process, index, eps, x_zero, draw, 0);
    x = index > 0 ? heun_step(process, index, x, { eps, x_zero }, predict(end, index - 1)) : end;
  }
  yield { index: -1, x, x_zero: x };
}

/** iPNDM: DDIM's step with the noise of the last four; Zhang and Chen 2023. */
function* ipndm(process, predict, x, draw) {
  let last = [];
  for (let index = process.timesteps - 1; index >= 0; index--) {
    let { eps, x_zero, output } = predict(x, index);
    yield { index, x, x_zero, eps, output };
    last = [eps, ...last.slice(0, 3)];
    if (index > 0) {
      const factors = ADAMS_BASHFORTH[last.length - 1];
      eps = image(x.length, (i) => factors.reduce((sum, factor, k) => sum + factor * last[k][i], 0));
      x_zero = process.predict_x_zero(x, index, eps);
    }
    x = ddim_step(process, index, eps, x_zero, draw, 0);
  }
  yield { index: -1, x, x_zero: x };
}

/** Of order 1 to 4: factors of the estimates, the latest first. */
const ADAMS_BASHFORTH = [
  [1],
  [3 / 2, -1 / 2],
  [23 / 12, -16 / 12, 5 / 12],
  [55 / 24, -59 / 24, 37 / 24, -9 / 24],
];

/** name -> sampler: (process, predict, x, draw, eta) -> generator of {index, x, x_zero, eps, output}. */
const SAMPLERS = { ddpm, ddim, dpmpp_2m, heun, ipndm };
const TAKE_ETA = ["ddim", "dpmpp_2m"];

/** x_{t-1} from the two estimates that make up x_t; Song et al. 2021, Eq. 12. eta: 0 is the ODE, 1 ancestral. */
function ddim_step(process, index, eps, x_zero, draw, eta) {
  const alpha_bar_prev = process.alphas_bar_prev[index];
  const variance = eta ** 2 * process.posterior_variance[index];
  const direction = Math.sqrt(Math.max(0, 1 - alpha_bar_prev - variance));
  const z = eta > 0 && index > 0 ? draw() : new Float32Array(x_zero.length);
  return image(
    x_zero.length,
    (i) => Math.sqrt(alpha_bar_prev) * x_zero[i] + direction * eps[i] + Math.sqrt(variance) * z[i],
  );
}

/** The angle whose cosine and sine are the factors of x_zero and eps in x_t; Salimans and Ho 2022. */
const angle = (process, t) => Math.atan2(process.sqrt_one_minus_alphas_bar[t], process.sqrt_alphas_bar[t]);

/** x_zero in the middle of the next step's angle, extrapolated from its estimates at `index` and at the one before. */
function second_order_x_zero(process, index, x_zero, x_zero_before) {
  const [after, now, before] = [index - 1, index, index + 1].map((t) => angle(process, t));
  const factor = (after - now) / (2 * (now - before));
  return image(x_zero.length, (i) => x_zero[i] + factor * (x_zero[i] - x_zero_before[i]));
}

/** x_{t-1} from x_t by the mean slope of both ends of the step, in the angle. */
function heun_step(process, index, x, now, end) {
  const slope = ({ eps, x_zero }, t, i) =>
    process.sqrt_alphas_bar[t] * eps[i] - process.sqrt_one_minus_alphas_bar[t] * x_zero[i];
  const half = (angle(process, index - 1) - angle(process, index)) / 2;
  return image(x.length, (i) => x[i] + half * (slope(now, index, i) + slope(end, index - 1, i)));
}

/**
 * Algorithm 2 step by step: yields {index, t, x, x_zero, eps, output}, last the sample as {index: -1, t: -1, x, x_zero}.
 *
 * eps is the noise that the step takes, of the clamped x_zero estimate; `output` is what the network said.
 * settings: {label, guidance_scale, guidance_interval, sampler, steps, eta}, and {start_image, start_fraction} to start
 * from an image that is noised to that fraction of T (Eq. 4; Meng et al. 2022). draw: () -> noise like the image.
 */
function* sample_trajectory(diffusion, model, settings, draw) {
  let process = diffusion.respace(settings.steps);
  const [first, last] = settings.guidance_interval;

  function predict(x, index) {
    const fraction = (process.model_timesteps[index] + 1) / diffusion.timesteps;
    const guidance_scale = first <= fraction && fraction <= last ? settings.guidance_scale : 0;
    const output = guided_eps(model, x, process.model_timesteps[index], settings.label, guidance_scale);
    const x_zero = process.predict_x_zero(x, index, output).map((value) => Math.min(1, Math.max(-1, value)));
    return { output, x_zero, eps: process.predict_eps(x, index, x_zero) };
  }

  let x = draw();
  if (settings.start_image) {
    process = process.until(Math.round(settings.start_fraction * diffusion.timesteps));
    x = process.q_sample(settings.start_image, process.timesteps - 1, x);
  }
  for (const step of SAMPLERS[settings.sampler](process, predict, x, draw, settings.eta)) {
    yield { ...step, t: step.index < 0 ? -1 : process.model_timesteps[step.index] };
  }
}

/** Standard normal noise: a function that gives `length` new numbers at every call, the same ones for the same seed. */
function noise_of(seed, length) {
  let state = seed >>> 0;
  const uniform = () => {
    // mulberry32
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()); // Box and Muller
  return () => image(length, normal);
}
