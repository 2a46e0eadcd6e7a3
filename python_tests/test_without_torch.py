"""The compiled kernels on plain arrays: what can be tested on a Python that has no torch.

python_versions.sh runs this file there; here it shows that the extension itself needs none.
"""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

D, KEYS, SPAN, SHIFT = 32, 100, (10, 40), 57


class Array:
    """What the extension asks of a tensor, around a numpy array."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, values):
        self.values = values
        self.shape = values.shape
        self.dtype = f"torch.{values.dtype}"

    def data_ptr(self):
        return self.values.ctypes.data

    def stride(self):
        return tuple(step // self.values.itemsize for step in self.values.strides)


@pytest.fixture
def extension():
    return importlib.import_module("lookagain_ext._C")


def turned(rows, inv_freq, shift):
    first, second = np.split(rows, 2, axis=-1)
    cos, sin = np.cos(shift * inv_freq), np.sin(shift * inv_freq)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_decode_with_a_reinjection(extension, kind):
    draw = np.random.default_rng(0)
    query, key, value = (
        draw.standard_normal(shape).astype(kind)
        for shape in ((1, 6, 1, D), (1, 2, KEYS, D), (1, 2, KEYS, D))
    )
    inv_freq = (100.0 ** -(np.arange(D // 2) / (D // 2))).astype(np.float32)
    numbers = [np.array(x, dtype=np.int32) for x in ([[SPAN]], [[SHIFT]], [[0]])]
    spans, shift, start = map(Array, numbers)
    out = np.empty_like(query)
    extension.routed_attention(
        *map(Array, (query, key, value, out)),
        *(None,) * 5,
        spans,
        Array(inv_freq),
        shift,
        start,
        None,
        None,
        D**-0.5,
        1,
    )
    query, key, value = (x[0].astype(np.float64) for x in (query, key, value))
    seen = slice(SPAN[0], sum(SPAN))
    key = np.concatenate([key, turned(key[:, seen], inv_freq.astype(np.float64), SHIFT)], axis=1)
    value = np.concatenate([value, value[:, seen]], axis=1)
    for head in range(6):
        weights = np.exp(key[head // 3] @ query[head, 0] * D**-0.5)
        expected = weights @ value[head // 3] / weights.sum()
        tolerance = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-12}[kind]
        np.testing.assert_allclose(out[0, head, 0], expected, rtol=tolerance, atol=tolerance)


def test_the_extension_loads_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import lookagain_ext, lookagain_ext._C as c; "
    code += "print(c.build_info()['version'] == lookagain_ext.__version__)"
    # Not from here, where the source tree, without the extension, would be found first.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "True\n", run.stderr
