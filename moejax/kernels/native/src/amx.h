// AMX: tile registers of 16 rows of 64 bytes, multiplied as bfloat16 pairs. A packed panel is the layout they read.
#pragma once

#if !defined(MOEJAX_EMULATED_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512_bf16.h"

#if defined(MOEJAX_EMULATED_AMX)
#include MOEJAX_EMULATED_AMX
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace moejax::amx {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileSteps = 16;  // cells in the 64 bytes of a tile's row

// As the processor reads it: a palette, then bytes a row and rows of each of eight tiles.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, 4 and 5 left operands, 6 and 7 right operands: two times two products for four loads.
inline void Configure(int64_t upper_rows, int64_t lower_rows) {
  TileConfig config;
  const int64_t rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, kTileSteps, kTileSteps};
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  _tile_loadconfig(&config);
}

// 32 columns of a panel, rows in two tiles of which the lower may be absent.
inline void HalfPanel(bool lower, int64_t upper_rows, int64_t steps, const char* a, int64_t a_stride, const char* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add) {
  float* c_lower = c + upper_rows * c_stride;
  const char* a_lower = a + upper_rows * a_stride;
  if (add) {
    _tile_loadd(0, c, 4 * c_stride);
    _tile_loadd(1, c + 16, 4 * c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  if (lower && add) {
    _tile_loadd(2, c_lower, 4 * c_stride);
    _tile_loadd(3, c_lower + 16, 4 * c_stride);
  } else if (lower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k += kTileSteps) {
    _tile_loadd(6, b + k * b_stride, b_stride);
    _tile_loadd(7, b + k * b_stride + 64, b_stride);
    _tile_loadd(4, a + 4 * k, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!lower) continue;
    _tile_loadd(5, a_lower + 4 * k, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_stride);
  _tile_stored(1, c + 16, 4 * c_stride);
  if (!lower) return;
  _tile_stored(2, c_lower, 4 * c_stride);
  _tile_stored(3, c_lower + 16, 4 * c_stride);
}

// Up to 32 rows. Steps past the last whole tile are left to AVX-512.
inline void TilePairs(int64_t rows, int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                      float* c, int64_t c_stride, bool add) {
  int64_t whole = steps / kTileSteps * kTileSteps;
  if (whole) {
    int64_t upper = rows < kTileRows ? rows : kTileRows;
    bool lower = rows > upper;
    Configure(upper, lower ? rows - upper : upper);
    for (int64_t column = 0; column < kPanel; column += 32)
      HalfPanel(lower, upper, whole, a, a_stride, b + 4 * column, b_stride, c + column, c_stride, add);
    _tile_release();
  }
  if (whole == steps) return;
  constexpr int64_t most = avx512_bf16::kIsa.tile_rows_pairs;
  for (int64_t r = 0; r < rows; r += most)
    avx512_bf16::kIsa.tile_pairs(rows - r < most ? rows - r : most, steps - whole, a + r * a_stride + 4 * whole, a_stride,
                                 b + whole * b_stride, b_stride, c + r * c_stride, c_stride, add || whole);
}

// Asks the system for the tiles' state, once for the process: it is too large to be saved for those who never use it.
inline bool Permitted() {
#if defined(MOEJAX_EMULATED_AMX)
  return true;
#elif defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

constexpr Isa MakeIsa() {
  Isa isa = avx512_bf16::kIsa;
  isa.name = "amx";
  isa.tile_rows_pairs = 2 * kTileRows;
  isa.tile_pairs = TilePairs;
  return isa;
}
constexpr Isa kIsa = MakeIsa();

}  // namespace moejax::amx

#if defined(MOEJAX_EMULATED_AMX)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
