// What a Worker does, so that the page never freezes: it draws samples and posts every step of them.

let [model, diffusion, interval, newest] = [null, null, null, 0];

/** Lets messages in that came meanwhile. */
const next_task = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });

/** A network that counts its calls and the milliseconds they take. */
function measured(network) {
  const calls = { null_class: network.null_class, count: 0, milliseconds: 0 };
  calls.forward = (...given) => {
    const start = performance.now();
    const eps = network.forward(...given);
    calls.count += 1;
    calls.milliseconds += performance.now() - start;
    return eps;
  };
  return calls;
}

/** Goes through the trajectories of a run, a step of each in turn, until a newer run is asked for. */
async function draw_samples(run, jobs, length) {
  [newest, model.count, model.milliseconds] = [run, 0, 0];
  const trajectories = jobs.map(({ cell, seed, ...settings }) => [
    cell,
    sample_trajectory(diffusion, model, { ...settings, guidance_interval: interval }, noise_of(seed, length)),
  ]);
  while (trajectories.length) {
    for (const [cell, trajectory] of [...trajectories]) {
      const { value: step, done } = trajectory.next();
      if (done)
        trajectories.splice(
          trajectories.findIndex(([other]) => other === cell),
          1,
        );
      else postMessage({ run, cell, step, milliseconds: model.milliseconds / model.count });
      await next_task();
      if (newest !== run) return;
    }
  }
}

self.onmessage = ({ data }) => {
  if (data.bytes) {
    const { config, bytes, simd } = data;
    model = measured(build_unet(config, decode_weights(config.weights, bytes), simd));
    diffusion = new Diffusion(SCHEDULES[config.schedule](config.timesteps));
    interval = config.guidance_interval;
    postMessage({ ready: true });
  } else {
    draw_samples(data.run, data.jobs, data.length);
  }
};
