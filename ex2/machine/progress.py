"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LOG_SECONDS = 30  # between two lines of a log


def track(items: Iterable, what: str, total: int) -> Iterator:
    """Yields the `total` items and shows how far they are: by a bar, or by a line every `LOG_SECONDS` in a log."""
    bar = tqdm(items, what, total, leave=False, disable=None)
    shown = time.monotonic()
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and time.monotonic() - shown >= LOG_SECONDS:
            print(f"{what}: {done / total:.0%}", flush=True)
            shown = time.monotonic()
