"""The JavaScript of the live page in V8, without a browser: numbers go in and out as arrays."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

LIVE = Path(__file__).resolve().parents[1] / "ex2" / "live"
INSTALL = "pip install -r requirements-tests.txt"
mini_racer = pytest.importorskip("py_mini_racer", reason=f"{INSTALL}: mini-racer runs the JavaScript")


class Engine:
    """V8 with scripts of the live page."""

    def __init__(self, *scripts):
        self.context = mini_racer.MiniRacer()
        for name in scripts:
            self.context.eval((LIVE / f"{name}.js").read_text("utf-8") + "\n;undefined")

    def run(self, code):
        """Runs a line; its value comes back by way of JSON."""
        return json.loads(self.context.eval(f"JSON.stringify({code})"))

    def put(self, name, array):
        """Makes a global Float32Array of a tensor or an array."""
        flat = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
        buffer = self.context.eval(f"var {name}_buffer = new ArrayBuffer({flat.nbytes}); {name}_buffer")
        buffer[:] = flat.tobytes()
        self.context.eval(f"var {name} = new Float32Array({name}_buffer); undefined")

    def put_bytes(self, name, text):
        """Makes a global Uint8Array of what is written in base64."""
        content = base64.b64decode(text)
        buffer = self.context.eval(f"var {name}_buffer = new ArrayBuffer({len(content)}); {name}_buffer")
        buffer[:] = content
        self.context.eval(f"var {name} = new Uint8Array({name}_buffer); undefined")

    def floats(self, code):
        """A Float32Array that a line gives."""
        buffer = self.context.eval(f"(({code})).slice().buffer")
        return np.frombuffer(bytes(buffer), np.float32)

    def put_state(self, name, model):
        """Makes a global state_dict: name -> {data, shape}."""
        self.context.eval(f"var {name} = {{}}; undefined")
        for i, (key, value) in enumerate(model.state_dict().items()):
            self.put(f"{name}_{i}", value.detach())
            entry = f"{{data: {name}_{i}, shape: {json.dumps(list(value.shape))}}}"
            self.context.eval(f"{name}[{json.dumps(key)}] = {entry}; undefined")
