"""How fast is the live page? A network call in Chromium and in torch, and the matrix product, on one thread each.

    python benchmarks/live.py --checkpoint results/quick     beside the live.html that `export` wrote there

Needs Chromium and playwright (requirements-extras.txt). What is compared is timed in turns: medians (and minima).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ex2.settings.build import restore_model  # noqa: E402
from ex2.settings.config import config_of  # noqa: E402
from ex2.training.checkpoint import load_checkpoint  # noqa: E402

ROUNDS, CALLS = 20, 10
PRODUCT = (64, 576, 256)  # of a 3x3 convolution of 64 channels at 16 pixels
BUILD = """([config, text, [K, M, N]]) => {
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    window.model = build_unet(config, decode_weights(config.weights, bytes), true);
    window.x = new Float32Array(config.channels * config.image_size ** 2).map(() => Math.random() - 0.5);
    window.label = config.null_class === null ? undefined : 0;
    for (const simd of [true, false]) {
        const kernel = new Kernel(2 ** 24, simd);
        const [w, x, y] = [K * M, M * N, K * N].map(size => kernel.floats(size).fill(0.5));
        window[simd ? "product" : "plain"] = () => kernel.product(w, x, y, K, M, N);
    }
    window.time = (call, count) => {
        const start = performance.now();
        for (let i = 0; i < count; i++) call();
        return (performance.now() - start) / count;
    };
}"""


def parse_page(path: Path) -> tuple[dict, str, list[str]]:
    """(settings, weights in base64, scripts) of a live page."""
    page = path.read_text("utf-8")
    scripts = dict(re.findall(r'<script id="(\w+)"[^>]*>(.*?)</script>', page, re.S))
    found = [re.search(rf'id="{name}">(.*?)</script>', page, re.S).group(1) for name in ("config", "bytes")]
    return json.loads(found[0]), found[1], [scripts[name] for name in ("kernel", "weights", "unet")]


@torch.no_grad()
def time_torch(model, inputs) -> float:
    """Milliseconds of a network call for one image."""
    start = time.perf_counter()
    for _ in range(CALLS):
        model(*inputs)
    return (time.perf_counter() - start) / CALLS * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    folder = Path(parser.parse_args().checkpoint)
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(folder)
    model = restore_model(checkpoint, config_of(checkpoint, {}), "cpu")
    settings, weights, scripts = parse_page(folder / "live.html")
    classes = () if model.null_class is None else (torch.zeros(1, dtype=torch.long),)
    side = settings["image_size"]
    inputs = (torch.randn(1, model.channels, side, side), torch.tensor([500]), *classes)
    calls = {
        "network, Chromium": f"time(() => model.forward(x, 500, label), {CALLS})",
        "product, WebAssembly": f"time(product, {10 * CALLS})",
        "product, JavaScript": "time(plain, 2)",
    }
    times = {name: [] for name in ("network, torch", *calls)}
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).new_page()
        for script in scripts:
            page.add_script_tag(content=script)
        page.evaluate(BUILD, [settings, weights, PRODUCT])
        for _ in range(ROUNDS):
            times["network, torch"].append(time_torch(model, inputs))
            for name, code in calls.items():
                times[name].append(page.evaluate(code))
    operations = 2 * PRODUCT[0] * PRODUCT[1] * PRODUCT[2]
    for name, values in times.items():
        median, least = statistics.median(values), min(values)
        rate = f", {operations / median / 1e6:.1f} ({operations / least / 1e6:.1f}) GFLOP/s"
        print(f"{name}: {median:.2f} ({least:.2f}) ms{rate if 'product' in name else ''}")


if __name__ == "__main__":
    main()
