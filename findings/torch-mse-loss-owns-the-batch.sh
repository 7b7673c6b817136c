#!/usr/bin/env bash
# torch 2.14.1 (CPU): the scalar that F.mse_loss returns owns the memory of all its inputs' differences.
#
# F.mse_loss, F.smooth_l1_loss and F.soft_margin_loss compute into a buffer of the inputs' size and shrink it to a scalar
# without giving the rest back. `loss.detach()`, kept for a mean over steps, keeps the batch alive; torch.save writes it.
# F.l1_loss, F.huber_loss and (a - b).square().mean() don't. `loss.detach().clone()` or `loss.item()` helps.
#
# Seen, for 64 images of 3x32x32 in float32 (786,432 bytes):
#   mse_loss 786432, smooth_l1_loss 786432, soft_margin_loss 786432, l1_loss 4, huber_loss 4, by hand 4
#   torch.save of three mse losses: 2.4 MB instead of some 2 kB
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.14.1 numpy
"$dir/venv/bin/python" - <<'PY'
import io

import torch
import torch.nn.functional as F

a, b = torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
losses = {
    "mse_loss": F.mse_loss(a, b),
    "smooth_l1_loss": F.smooth_l1_loss(a, b),
    "soft_margin_loss": F.soft_margin_loss(a, b.sign()),
    "l1_loss": F.l1_loss(a, b),
    "huber_loss": F.huber_loss(a, b),
    "by hand": (a - b).square().mean(),
}
found = {name: loss.untyped_storage().nbytes() for name, loss in losses.items()}
print(found)
assert all(loss.shape == () for loss in losses.values())
assert list(found.values()) == [a.nbytes] * 3 + [4] * 3, "this has changed"
buffer = io.BytesIO()
torch.save([F.mse_loss(a, b).detach() for _ in range(3)], buffer)
print("torch.save of three mse losses:", buffer.tell(), "bytes")
assert buffer.tell() > 3 * a.nbytes, "this has changed"
PY
