// AVX-512 with products of bfloat16 pairs: two multiplications and two additions in each of sixteen lanes.
#pragma once

#include "avx512.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

namespace moejax::avx512_bf16 {

#include "vectors.h"
#undef MOEJAX_LANES
#undef MOEJAX_VECTORS
#undef MOEJAX_ROWS
#undef MOEJAX_SPLATS

struct Pairs {
  static MOEJAX_INLINE Vec MultiplyAdd(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

// Where in two vectors of 32 words the pairs of their first sixteen columns lie; the others are 16 words further on.
alignas(64) constexpr uint16_t kFirstPairs[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

MOEJAX_INLINE void Interleave32(const void* first, const void* second, Vec& low, Vec& high) {
  __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  __m512i index = _mm512_load_si512(kFirstPairs);
  low = (Vec)_mm512_permutex2var_epi16(a, index, b);
  high = (Vec)_mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b);
}

// Pairs made of a cache line of bfloat16 in each of two rows.
struct PairedRows {
  static MOEJAX_INLINE void Read(const char* b, int64_t b_stride, int64_t column, Vec* cells) {
    Interleave32(b + 2 * column, b + b_stride + 2 * column, cells[0], cells[1]);
  }
  static constexpr int kRows = 2, kColumns = 32, kBytes = 2;
};

inline void Interleave(const uint16_t* first, const uint16_t* second, int64_t n, uint32_t* dst) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Vec low, high;
    Interleave32(first + i, second + i, low, high);
    Store(dst + i, low);
    Store(dst + i + 16, high);
  }
  for (; i < n; ++i) dst[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
}

constexpr Isa MakeIsa() {
  Isa isa = avx512::kIsa;
  isa.name = "avx512_bf16";
  isa.tile_rows_pairs = kRows;
  isa.tile_pairs = Tiles<Pairs>;
  isa.stream_bf16 = StreamRows<Pairs, PairedRows>;
  isa.dots_pairs = DotRows<Pairs>;
  isa.interleave = Interleave;
  return isa;
}
constexpr Isa kIsa = MakeIsa();

}  // namespace moejax::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
