"""The maths in csrc/core, compiled for the host and compared with plain Python."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CORE = Path(__file__).parents[1] / "csrc" / "core"
COMPILER = shutil.which("c++") or shutil.which("g++")

PROGRAM = """
#include <cstdio>
#include <initializer_list>

#include "online_softmax.h"
#include "rotation.h"
#include "selection.h"
#include "split.h"
#include "types.h"
#include "visual.h"
using namespace lookagain;

int main() {
  for (int n = 0; n < 4000; ++n) {
    const double angle = (n % 2 ? -1.0 : 1.0) * std::pow(1.0055, n) * 0.37;
    double sine, cosine;
    if (angle > 2e9 || angle < -2e9) break;
    sine_cosine(angle, &sine, &cosine);
    printf("angle %.17g %.17g %.17g\\n", angle, sine, cosine);
  }
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    printf("half %u %.17g %u\\n", bits, to_float(half), from_float<Float16>(to_float(half)).bits);
  }
  for (uint32_t n = 0; n < 20000; ++n) {
    const uint32_t bits = n * 214013u + 2531011u * (n % 7);
    const float x = bits_to_float(bits);
    printf("round %u %u %u\\n", bits, from_float<BFloat16>(x).bits, from_float<Float16>(x).bits);
  }
  for (int n = 0; n <= 40; ++n) {
    for (int k = 0; k <= n; ++k) {
      const double ratio = n == 0 ? 1.0 : static_cast<double>(k) / n;
      printf("count %d %d %d\\n", n, k, static_cast<int>(selection_count(ratio, n)));
    }
  }
  OnlineSoftmax<double> state;
  double sum = 0;
  const double logits[] = {-INFINITY, 3.0, -2.0, 700.0, -INFINITY, 701.5};
  for (double logit : logits) {
    sum = sum * state.raise(logit) + 2 * state.add(logit);
  }
  printf("softmax %.17g %.17g\\n", state.lse(), sum * state.inverse_sum());
  printf("empty %g %g\\n", OnlineSoftmax<float>().lse(), OnlineSoftmax<float>().inverse_sum());
  const int32_t spans[] = {2, 3, 7, 0, 9, 4};
  for_each_visual_run(spans, 3, 4, 11, [](int64_t key, int64_t token, int64_t length) {
    printf("run %d %d %d\\n", (int)key, (int)token, (int)length);
  });
  printf("see %d %d %d\\n", (int)first_query_seeing(7, 10, 5), (int)first_query_seeing(0, 10, 5),
         (int)first_query_seeing(kNever, 10, 5));
  for (int blocks = 1; blocks < 600; ++blocks) {
    for (int keys : {0, 1, 128, 129, 900, 4096, 8192, 32768}) {
      printf("splits %d %d %d\\n", blocks, keys, (int)choose_splits(blocks, 264, keys));
    }
  }
}
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """What the program prints, by the first word of the line."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("core")
    (folder / "core.cpp").write_text(PROGRAM)
    build = [COMPILER, "-std=c++17", "-O2", f"-I{CORE}", "core.cpp", "-o", "core"]
    subprocess.run(build, cwd=folder, check=True)
    text = subprocess.run([folder / "core"], capture_output=True, text=True, check=True).stdout
    lines: dict[str, list[list[float]]] = {}
    for line in text.splitlines():
        name, *values = line.split()
        lines.setdefault(name, []).append([float(value) for value in values])
    return lines


def test_sine_and_cosine(printed: dict[str, list[list[float]]]) -> None:
    assert len(printed["angle"]) > 3000
    for angle, sine, cosine in printed["angle"]:
        assert abs(sine - math.sin(angle)) < 2e-15
        assert abs(cosine - math.cos(angle)) < 2e-15


def test_every_float16(printed: dict[str, list[list[float]]]) -> None:
    bits = torch.arange(0x10000, dtype=torch.int32).to(torch.uint16)
    expected = bits.view(torch.float16).double()
    values = torch.tensor(printed["half"], dtype=torch.float64)
    numbers = ~expected.isnan()
    assert torch.equal(values[:, 1][numbers], expected[numbers])
    assert torch.equal(values[:, 2][numbers], bits.double()[numbers])
    assert values[:, 1][~numbers].isnan().all()


def test_rounding(printed: dict[str, list[list[float]]]) -> None:
    values = torch.tensor(printed["round"], dtype=torch.float64).long()
    x = values[:, 0].to(torch.uint32).view(torch.float32)
    for column, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        rounded = values[:, column].to(torch.uint16).view(dtype)
        assert torch.equal(rounded.isnan(), x.isnan())
        numbers = ~x.isnan()
        assert torch.equal(rounded[numbers], x[numbers].to(dtype))


def test_selection_count(printed: dict[str, list[list[float]]]) -> None:
    for n, k, count in printed["count"]:
        assert count == (k if n else 0)


def test_online_softmax(printed: dict[str, list[list[float]]]) -> None:
    ((lse, mean),) = printed["softmax"]
    assert lse == pytest.approx(701.5 + math.log1p(math.exp(-1.5)), abs=1e-12)
    assert mean == pytest.approx(2, abs=1e-14)
    assert printed["empty"] == [[-math.inf, 0]]


def test_visual_runs(printed: dict[str, list[list[float]]]) -> None:
    assert printed["run"] == [[4, 2, 1], [9, 3, 2]]
    assert printed["see"] == [[2, 0, 5]]


def test_number_of_pieces(printed: dict[str, list[list[float]]]) -> None:
    """Few blocks are cut until the device is full, many are not cut; pieces are never tiny."""
    chosen = {(int(b), int(k)): int(s) for b, k, s in printed["splits"]}
    for (blocks, keys), splits in chosen.items():
        assert 1 <= splits <= max(1, -(-keys // 128))
        if blocks >= 4 * 264:
            assert splits == 1
    # A row and a batch of 32 of a 7B's four key heads: 132 multiprocessors, two blocks each.
    assert chosen[4, 4096] == 32
    assert 60 <= chosen[4, 32768] <= 66
    assert [chosen[128, keys] for keys in (4096, 8192, 32768)] == [2, 2, 2]
