// What the page does: it asks the Workers for samples, and shows what they post.
//
// A run is a list of cells, one image each: a row of them for every setting that is compared. `frames[cell]` are the
// steps of its trajectory so far. `position` is the step on the timeline that is shown.

const $ = (id) => document.getElementById(id);
const config = JSON.parse($("config").textContent);
const size = config.image_size;
const channels = config.channels;
const length = channels * size * size;
const diffusion = new Diffusion(SCHEDULES[config.schedule](config.timesteps));
const KINDS = { x: "x<sub>t</sub>", x_zero: "x<sub>0</sub> estimate", output: "predicted noise ε" };
const SPOKEN = { x: "the noisy image x_t", x_zero: "the estimate of x_0", output: "the predicted noise" };
const QUICK = 400; // milliseconds: a run that takes less is finished before a newer one starts
const minus = (text) => String(text).replace("-", "−");

/** A new element with properties or attributes, and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- settings

/** The numbers of steps that the slider offers: those of the run, round ones, all T. */
const own_steps = config.sample_steps ?? Math.min(50, config.timesteps);
const STEPS = [...new Set([2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000, own_steps, config.timesteps])]
  .filter((steps) => steps <= config.timesteps)
  .sort((a, b) => a - b);

const checked = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;

/** Everything that a run depends on, as the form says now. */
function read_settings() {
  const label = checked("label") ?? "none";
  const labels =
    label === "all"
      ? config.class_names.map((_, i) => i)
      : Array($("count").value * 1).fill(label === "none" ? null : label * 1);
  const scale = (id) => ($(id) ? $(id).value * 1 : 0);
  const rows = [{ guidance_scale: scale("scale"), sampler: $("sampler").value }];
  if ($("compare").checked) rows.push({ guidance_scale: scale("scale2"), sampler: $("sampler2").value });
  const start =
    checked("start") === "picture" ? { start_image: painting, start_fraction: $("fraction").value * 1 } : {};
  return { labels, rows, steps: STEPS[$("steps").value], eta: $("eta").value * 1, seed: $("seed").value * 1, start };
}

/** The process of a run, on its subsequence of timesteps and, from a picture, on the part that is gone back. */
function process_of({ steps, start }) {
  const process = diffusion.respace(steps);
  return start.start_image ? process.until(Math.round(start.start_fraction * config.timesteps)) : process;
}

// ---------------------------------------------------------------- runs

let shown = { frames: [], settings: null }; // the run on the screen
let running = null; // the one that is computed: {id, settings, process, frames, left (cells to go), quick}
let waiting = false; // whether settings changed while a quick run was computed
let [position, follows] = [0, true]; // on the timeline; whether it stays at the last step
let milliseconds = 30; // of a network call
let workers = [];

/** Starts a run with the settings of now; one that is nearly done comes first. */
function request() {
  describe_settings();
  if (workers.length === 0) return;
  document.body.dataset.state = "busy";
  if (running?.quick) {
    waiting = true;
    return;
  }
  waiting = false;
  const settings = read_settings();
  const process = process_of(settings);
  const cells = settings.rows.flatMap((row) =>
    settings.labels.map((label, i) => ({ ...row, label, seed: settings.seed * 100 + i })),
  );
  const calls_of = ({ label, guidance_scale }) => (label === null || [0, -1].includes(guidance_scale) ? 1 : 2);
  const calls = cells.reduce((sum, cell) => sum + calls_of(cell), 0);
  const expected = (calls * process.timesteps * milliseconds) / Math.min(workers.length, cells.length);
  const id = (running?.id ?? shown.id ?? 0) + 1;
  const quick = expected < QUICK && shown.settings !== null;
  running = { id, settings, process, frames: cells.map(() => []), left: cells.length, quick };
  if (!running.quick) {
    allow(["save-png", "save-apng", "take"], false);
    show_run(running); // each step as it comes
  }
  const common = { steps: settings.steps, eta: settings.eta, ...settings.start };
  const jobs = cells.map((cell, i) => ({ ...cell, ...common, cell: i }));
  workers.forEach((worker, w) =>
    worker.postMessage({ run: id, length, jobs: jobs.filter((_, i) => i % workers.length === w) }),
  );
}

/** Enables or disables controls. */
function allow(ids, ready) {
  for (const id of ids) $(id).disabled = !ready;
}

/** Makes a run the one on the screen. */
function show_run(run) {
  const before = shown.process?.timesteps;
  shown = run;
  if (before !== run.process.timesteps) follows = true;
  $("time").max = run.process.timesteps;
  make_rows();
  show();
}

/** Takes a step of a cell from a Worker. */
function receive({ data }) {
  if (data.run !== running?.id) return; // of a run that was given up
  milliseconds = data.milliseconds || milliseconds;
  running.frames[data.cell].push(data.step);
  allow(["play", "time"], true);
  if (data.step.index < 0) running.left -= 1;
  const done = running.left === 0;
  if (done && running !== shown) show_run(running);
  else if (running === shown) show();
  if (!done) return;
  describe_work();
  allow(["save-png", "save-apng", "take"], true);
  running = null;
  document.body.dataset.state = "idle";
  if (waiting) request();
}

/** Unpacks the weights and starts the Workers: as many as there are cores, one for a large network. */
async function start_workers() {
  const text = atob($("bytes").textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const simd = has_simd();
  const sources = ["kernel", "weights", "unet", "diffusion", "worker"].map((id) => $(id).textContent);
  const address = URL.createObjectURL(new Blob(sources, { type: "text/javascript" }));
  const count = config.parameters < 5e6 ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const started = Array.from({ length: count }, () => {
    const worker = new Worker(address);
    worker.onerror = (error) => {
      $("status").textContent = `The network can't be computed here: ${error.message}`;
    };
    worker.postMessage({ config, bytes, simd });
    return new Promise((resolve) => {
      worker.onmessage = () => {
        worker.onmessage = receive;
        resolve(worker);
      };
    });
  });
  workers = await Promise.all(started);
  $("status").classList.toggle("warning", !simd);
  request();
}

/** How fast it is, and by what. */
function describe_work() {
  const speed = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms a network call`;
  const cores = workers.length === 1 ? "one Worker" : `${workers.length} Workers`;
  $("status").textContent = has_simd()
    ? `${speed}, ${cores}, WebAssembly SIMD`
    : `${speed}, ${cores}. This browser has no WebAssembly SIMD: JavaScript computes the same, much slower.`;
}

// ---------------------------------------------------------------- pictures

/** Columns of a picture of so many images. */
const columns_of = (count) => (count > 9 ? 5 : Math.ceil(Math.sqrt(count)));

/** Draws images (Float32Arrays) side by side, a pixel apart; `range` is white, -range black. */
function draw_images(canvas, images, range = 1) {
  const columns = columns_of(images.length);
  const step = size + (images.length > 1 ? 1 : 0);
  const [width, height] = [columns * step - (step - size), Math.ceil(images.length / columns) * step - (step - size)];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const picture = new ImageData(width, height);
  images.forEach((values, k) => {
    if (!values) return;
    const corner = Math.floor(k / columns) * step * width + (k % columns) * step;
    for (let n = 0; n < size * size; n++) {
      const to = 4 * (corner + Math.floor(n / size) * width + (n % size));
      for (let c = 0; c < 3; c++) {
        picture.data[to + c] = Math.round((values[(channels === 3 ? c : 0) * size * size + n] / range + 1) * 127.5);
      }
      picture.data[to + 3] = 255;
    }
  });
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(picture, 0, 0);
}

/** The step of a cell at a place of the timeline, or its latest one. */
const frame_at = (cell, step = position) => shown.frames[cell]?.[Math.min(step, shown.frames[cell].length - 1)];

/** The cells of a row of the run on the screen. */
const cells_of = (row) => shown.settings.labels.map((_, i) => row * shown.settings.labels.length + i);

/** A row of three pictures for every setting that is compared. */
function make_rows() {
  const name = ({ guidance_scale, sampler }) => `${config.can_guide ? `w = ${minus(guidance_scale)}, ` : ""}${sampler}`;
  const rows = shown.settings.rows;
  const key = JSON.stringify([rows.length, rows.length > 1 ? rows.map(name) : 0]);
  if ($("rows").dataset.key === key) return;
  $("rows").dataset.key = key;
  const picture = (kind, row) => {
    const canvas = make("canvas", { tabIndex: 0, role: "img", "data-kind": kind, "data-row": row });
    return make("figure", {}, canvas, make("figcaption", { innerHTML: `<b>${KINDS[kind]}</b>` }));
  };
  const title = (row) => (rows.length > 1 ? [make("p", { textContent: name(row) })] : []);
  const pictures = (r) => Object.keys(KINDS).map((kind) => picture(kind, r));
  $("rows").replaceChildren(...rows.map((row, r) => make("div", { className: "row" }, ...title(row), ...pictures(r))));
}

/** Draws the step of the timeline. */
function show() {
  const arrived = Math.min(...shown.frames.map((frames) => frames.length)) - 1;
  if (follows) position = Math.max(0, arrived);
  $("time").value = position;
  const frame = frame_at(0);
  if (!frame) return;
  const T = config.timesteps;
  const at = Math.min(position, shown.frames[0].length - 1);
  $("when").textContent =
    frame.t < 0
      ? `t = 0: the sample, after ${at} steps`
      : `t = ${frame.t + 1} of ${T}: before step ${at + 1} of ${shown.process.timesteps}`;
  $("time").setAttribute("aria-valuetext", $("when").textContent);
  for (const canvas of document.querySelectorAll("#rows canvas")) {
    const { kind, row } = canvas.dataset;
    const images = cells_of(row * 1).map((cell) => {
      const found = frame_at(cell);
      return found && (found[kind] ?? frame_at(cell, at - 1)[kind]); // the sample itself has no noise left to predict
    });
    draw_images(canvas, images, kind === "output" ? 3 : 1);
    canvas.setAttribute("aria-label", `${SPOKEN[kind]}, ${what_is_shown()}, ${$("when").textContent}`);
  }
  show_pixel();
}

/** The classes on the screen, in words. */
function what_is_shown() {
  const names = [...new Set(shown.settings.labels)].map((label) =>
    label === null ? "without a class" : config.class_names[label],
  );
  return config.class_names.length ? names.join(", ") : "a sample";
}

// ---------------------------------------------------------------- Eq. 8 at a pixel

const pixel = { row: 0, cell: 0, i: Math.floor(size / 2), j: Math.floor(size / 2) };

/** The numbers of Eq. 8 at the chosen pixel, from the step on the screen to the next one. */
function show_pixel() {
  const cell = Math.min(cells_of(0).length * pixel.row + pixel.cell, shown.frames.length - 1);
  const steps = shown.frames[cell];
  const at = Math.min(position, steps.length - 2);
  if (at < 0) return;
  const [{ index, t, x, x_zero, eps }, next] = [steps[at], steps[at + 1].x];
  const number = (value, digits = 3) => minus(value.toFixed(digits));
  const run = shown.process;
  $("recip").textContent = number(run.sqrt_recip_alphas[index], 4);
  $("noise-factor").textContent = number(run.eps_factor[index], 4);
  $("sigma").textContent = number(run.sqrt_betas[index], 4);
  const mean = run.ddpm_mean(x, index, eps);
  const names = channels === 3 ? ["red", "green", "blue"] : ["grey"];
  const cells = (n) => [x, eps, x_zero, mean, next].map((values) => make("td", { textContent: number(values[n]) }));
  const row = (name, c) =>
    make("tr", {}, make("th", { scope: "row", textContent: name }), ...cells((c * size + pixel.i) * size + pixel.j));
  $("numbers").replaceChildren(...names.map(row));
  const { sampler } = shown.settings.rows[pixel.row] ?? shown.settings.rows[0];
  const own =
    sampler === "ddpm"
      ? "xₜ₋₁ is this mean and σₜ z; in the last step z is 0."
      : `${sampler} takes xₜ₋₁ from the same ε by a step of its own; ddpm takes this one.`;
  const subsequence = run.timesteps < config.timesteps ? " Factors and t − 1 are those of the subsequence of timesteps." : "";
  const noise = "ε is the predicted noise after x₀ was clamped to [−1, 1].";
  $("pixel-note").textContent = `Pixel (${pixel.j}, ${pixel.i}) at t = ${t + 1}. ${noise} ${own}${subsequence}`;
}

/** Chooses the pixel under the pointer. */
function point_at(event) {
  const canvas = event.target.closest("#rows canvas");
  if (!canvas) return;
  const box = canvas.getBoundingClientRect();
  const [x, y] = [
    ((event.clientX - box.left) / box.width) * canvas.width,
    ((event.clientY - box.top) / box.height) * canvas.height,
  ].map(Math.floor);
  const count = cells_of(0).length;
  const step = size + (count > 1 ? 1 : 0);
  const cell = Math.floor(y / step) * columns_of(count) + Math.floor(x / step);
  if (cell >= count || x % step >= size || y % step >= size || x < 0 || y < 0) return;
  Object.assign(pixel, { row: canvas.dataset.row * 1, cell, i: y % step, j: x % step });
  show_pixel();
}

/** (down, right) of an arrow key, or nothing. */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const within = (value) => Math.min(size - 1, Math.max(0, value));

// ---------------------------------------------------------------- files

/** Saves a PNG file under a name that says what it shows. */
function save(blob) {
  const { rows, labels, seed } = shown.settings;
  const label = new Set(labels).size > 1 ? "all" : labels[0] === null ? "" : config.class_names[labels[0]];
  const scale = config.can_guide ? `w=${rows[0].guidance_scale}` : "";
  const parts = [config.name, label, scale, `seed=${seed}`].filter(Boolean);
  const name = parts.join("-").replace(/[^\p{L}\p{N}=._-]+/gu, "_");
  const link = make("a", { download: `${name}.png`, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** All pictures of a kind at a step, the rows below each other, enlarged so that they can be seen. */
function enlarged(kinds, step) {
  const drawn = kinds.map((kind) =>
    shown.settings.rows.map((_, row) => {
      const canvas = make("canvas");
      const images = cells_of(row).map((cell) => frame_at(cell, step)[kind]);
      draw_images(canvas, images);
      return canvas;
    }),
  );
  const { width, height } = drawn[0][0];
  const factor = Math.max(1, Math.round(256 / width));
  const whole = make("canvas", {
    width: factor * (width + 1) * kinds.length - factor,
    height: factor * (height + 1) * drawn[0].length - factor,
  });
  const context = whole.getContext("2d");
  context.imageSmoothingEnabled = false;
  drawn.forEach((rows, k) =>
    rows.forEach((canvas, r) => {
      context.drawImage(canvas, k * factor * (width + 1), r * factor * (height + 1), factor * width, factor * height);
    }),
  );
  return whole;
}

/** Saves all steps so far of x_t and of the x_0 estimate beside it. */
async function save_animation() {
  const last = Math.min(...shown.frames.map((frames) => frames.length)) - 1;
  const frames = Array.from({ length: last + 1 }, (_, step) => {
    const canvas = enlarged(["x", "x_zero"], step);
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  });
  const durations = frames.map((_, step) => (step === last ? 2000 : 100)); // milliseconds
  save(await encode_apng(frames, durations));
}

// ---------------------------------------------------------------- the form

/** Writes the values of the sliders beside them, and shows what belongs to the chosen ones. */
function describe_settings() {
  const chosen = read_settings();
  for (const id of ["scale", "scale2", "eta", "brush"]) if ($(id)) $(`${id}-value`).textContent = minus($(id).value);
  $("steps-value").textContent = chosen.steps === config.timesteps ? `${chosen.steps} (all)` : chosen.steps;
  const stochastic = chosen.rows.some(({ sampler }) => TAKE_ETA.includes(sampler));
  $("eta").disabled = !stochastic;
  $("eta-help").textContent = stochastic
    ? "0: noise alone decides, nothing is drawn on the way. 1: fresh noise at each step."
    : "ddpm draws fresh noise at each step, as in Eq. 8; heun and ipndm draw none.";
  $("count").disabled = checked("label") === "all";
  $("second").hidden = !$("compare").checked;
  const from_picture = checked("start") === "picture";
  $("picture").hidden = !from_picture;
  if (!from_picture) return;
  const run = process_of(chosen);
  const t = run.timesteps - 1;
  $("fraction-value").textContent = `${run.model_timesteps[t] + 1} of ${config.timesteps}`;
  const [signal, noise] = [run.sqrt_alphas_bar[t], run.sqrt_one_minus_alphas_bar[t]].map((value) => value.toFixed(3));
  $("forward").textContent =
    `Eq. 4: xₜ = ${signal} x₀ + ${noise} ε. From there the reverse process goes back, as the chosen class. ` +
    "t is one of the sampler's timesteps: more steps, more choice.";
}

/** Sets a slider to a number of the run, which may lie outside of its range or between its stops. */
function offer(id, value) {
  const slider = $(id);
  [slider.min, slider.max] = [Math.min(slider.min, value), Math.max(slider.max, value)];
  if (((value - slider.min) / slider.step) % 1) slider.step = 0.01;
  slider.value = value;
}

/** Sets the form to the settings of the run, and listens to it. */
function prepare_form() {
  for (const id of ["sampler", "sampler2"]) {
    $(id).append(...Object.keys(SAMPLERS).map((name) => new Option(name)));
    $(id).value = config.sampler;
  }
  if ($("scale")) {
    offer("scale", config.guidance_scale);
    offer("scale2", config.guidance_scale + (config.guidance_scale > 3 ? -2 : 2));
  } else $("sampler2").value = $("sampler").value === "ddpm" ? "ddim" : "ddpm";
  Object.assign($("steps"), { max: STEPS.length - 1, value: STEPS.indexOf(own_steps) });
  offer("eta", config.eta);
  allow(["play", "time", "save-png", "save-apng", "take"], false); // until there is a run

  for (const form of document.forms) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      if (event.target.id === "brush") describe_settings();
      else if (event.target.id !== "file") request();
    });
  }
  $("reseed").addEventListener("click", () => {
    $("seed").value = Math.floor(Math.random() * 1e6);
    request();
  });
  $("save-png").addEventListener("click", () => enlarged(["x"], position).toBlob(save));
  $("save-apng").addEventListener("click", save_animation);
}

/** The slider over the steps, its button, and the pixel under the pointer. */
function prepare_timeline() {
  let timer = null;
  const last = () => shown.frames[0].length - 1;
  const go_to = (step) => {
    position = Math.max(0, Math.min(last(), step));
    follows = position === last();
    show();
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "Play";
  };
  $("time").addEventListener("input", () => {
    pause();
    go_to($("time").value * 1);
  });
  $("play").addEventListener("click", () => {
    if (timer) return pause();
    if (position >= last()) go_to(0);
    $("play").textContent = "Pause";
    timer = setInterval(
      () => {
        if (position >= last()) pause();
        else go_to(position + 1);
      },
      Math.max(30, Math.min(150, 4000 / last())),
    );
  });
  for (const kind of ["pointermove", "pointerdown"]) $("rows").addEventListener(kind, point_at);
  $("rows").addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move) return;
    event.preventDefault();
    [pixel.i, pixel.j] = [within(pixel.i + move[0]), within(pixel.j + move[1])];
    show_pixel();
  });
}

/** The sources of the page, to read. */
function prepare_sources() {
  const [chips, code] = [document.querySelector("#sources .chips"), document.querySelector("#sources pre")];
  for (const id of ["unet", "diffusion", "kernel", "weights", "worker", "page", "painting", "apng"]) {
    const button = make("button", { type: "button", textContent: `${id}.js` });
    button.addEventListener("click", () => {
      code.textContent = $(id).textContent;
    });
    chips.append(button);
  }
}

addEventListener("DOMContentLoaded", () => {
  prepare_form();
  prepare_timeline();
  prepare_painting();
  prepare_dropping();
  prepare_sources();
  describe_settings();
  start_workers();
});
