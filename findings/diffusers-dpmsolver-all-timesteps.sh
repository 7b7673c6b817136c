#!/usr/bin/env bash
# diffusers 0.42.1: DPMSolverMultistepScheduler can't visit all of its training timesteps.
#
# With num_inference_steps equal to num_train_timesteps (1000), the default timestep_spacing "linspace" rounds two of the
# 1,001 numbers to the same timestep, 500. The step between them has no width in log-SNR, and the second-order update
# divides by it: every pixel is nan from there on, without a warning. With "leading" all 1000 timesteps are the same one,
# as 1000 // 1001 is the distance between them. 999 steps work. DDPMScheduler and DDIMScheduler visit all 1000.
#
# Seen: linspace, 1000 steps: 999 different timesteps, first number that is not finite at step 500 (t = 500);
#       999 steps: all finite; leading, 1000 steps: a single different timestep.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.14.1 numpy diffusers==0.42.1
"$dir/venv/bin/python" - <<'PY'
import torch
from diffusers import DPMSolverMultistepScheduler


def first_bad(spacing, steps):
    """Number of the first step whose result is not finite; None where all are."""
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    print(spacing, steps, "steps,", len(set(scheduler.timesteps.tolist())), "different timesteps")
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(0.1 * x, t, x).prev_sample
        if not x.isfinite().all():
            return i, int(t)


assert first_bad("linspace", 999) is None, "this has changed"
assert first_bad("linspace", 1000) == (500, 500), "this has changed"
scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="leading")
scheduler.set_timesteps(1000)
print("leading 1000 steps:", set(scheduler.timesteps.tolist()))
assert len(set(scheduler.timesteps.tolist())) == 1, "this has changed"
PY
