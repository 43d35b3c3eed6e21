"""The AMX path, whose instructions are emulated: no machine that runs these tests is sure to have them."""

import subprocess

import pytest

from moejax.kernels.native import build, library

PROGRAM = """
#include <cstdio>
#include <vector>
#include "isas.h"
using namespace moejax;

int main() {
  if (!Agrees(amx::kIsa, CheckProducts(portable::kIsa))) return std::puts("the check at loading fails"), 1;
  for (int64_t rows : {1, 9, 15, 16, 17, 31, 32, 33, 70})
    for (int64_t depth : {1, 30, 32, 34, 64, 600}) {
      constexpr int64_t kColumns = 100;
      std::vector<uint16_t> a(rows * depth), b(depth * kColumns);
      uint32_t state = 7;
      for (auto* values : {&a, &b})
        for (uint16_t& value : *values) value = 0x3F00 + ((state = state * 1664525 + 1013904223) >> 25);
      std::vector<float> results[2];
      const Isa* isas[2] = {&amx::kIsa, &portable::kIsa};
      for (int i : {0, 1}) {
        results[i].resize(rows * kColumns);
        Scratches scratches;
        Left left{reinterpret_cast<const char*>(a.data()), Type::kBf16, 2 * depth, false};
        Right right{reinterpret_cast<const char*>(b.data()), nullptr, Type::kBf16, 2 * kColumns, 0, false};
        Block block{left, right, rows, kColumns, depth, reinterpret_cast<char*>(results[i].data()), Type::kF32,
                    4 * kColumns};
        MultiplyBlock(*isas[i], block, scratches);
      }
      for (size_t i = 0; i < results[0].size(); ++i)
        if (!(std::fabs(results[0][i] - results[1][i]) <= 1e-5f * results[1][i]))
          return std::printf("rows %ld depth %ld: %g, not %g\\n", rows, depth, results[0][i], results[1][i]), 1;
    }
  std::puts("agrees");
}
"""


def test_emulated_amx_agrees_with_portable_code(tmp_path, request):
    if "avx512_bf16" not in library.instruction_sets():
        pytest.skip("this processor has no avx512_bf16, which processors with AMX have and the path uses for tails")
    source, program = tmp_path / "amx.cc", tmp_path / "amx"
    source.write_text(PROGRAM)
    emulation = request.path.parent / "amx_emulated.h"
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-w", f'-DMOEJAX_EMULATED_AMX="{emulation}"']
    command = [*build._compiler(), *flags, f"-I{build.SOURCES}", str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    assert subprocess.run([str(program)], capture_output=True, text=True).stdout == "agrees\n"
