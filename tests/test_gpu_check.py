"""The check of a GPU, as far as a CPU can run it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the check itself is run")


@pytest.mark.parametrize("name", ["losses", "speed of tiny", "kernels", "sampling"])
def test_every_part_gives_a_table(name, tmp_path):
    args = SimpleNamespace(skeleton=None, data_dir=None, part_file=str(tmp_path / "part"))
    rows = gpu_check.parts(args)[name](args)
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    if name == "losses":
        assert rows[0]["largest difference of a loss, relative"] == 0  # on a CPU both ways are the same
    if name.startswith("speed"):
        assert rows[0]["images/s"] > 0


def test_a_part_that_fails_or_takes_too_long_has_its_row(tmp_path, monkeypatch):
    """The rows that it had written stay."""
    script, out = tmp_path / "part.py", tmp_path / "check.json"
    script.write_text("import sys; open(sys.argv[-1], 'w').write('[{\"images/s\": 7}]'); sys.exit(3)")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    failed = {"images/s": None, "note": "failed with exit code 3, see check.log"}
    assert gpu_check.run_part("speed", [], out, 60) == [{"images/s": 7, "note": ""}, failed]
    assert gpu_check.run_part("speed", [], out, 0.001)[-1]["note"] == "stopped after 0 s"
