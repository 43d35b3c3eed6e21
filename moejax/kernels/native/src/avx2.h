// AVX2 with FMA: sixteen registers of eight floats, so a tile is 6 rows of 2 vectors.
#pragma once

#include <immintrin.h>

#include "cells.h"
#include "mxfp4.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace moejax::avx2 {

#define MOEJAX_LANES 8
#define MOEJAX_VECTORS 2
#define MOEJAX_ROWS 6
#define MOEJAX_SPLATS 8
#include "vectors.h"
#include "softmax.h"
#include "common_isa.h"
#undef MOEJAX_LANES
#undef MOEJAX_VECTORS
#undef MOEJAX_ROWS
#undef MOEJAX_SPLATS

// Eight floats made of eight bfloat16.
struct WidenedRows {
  static MOEJAX_INLINE void Read(const char* b, int64_t, int64_t column, Vec* cells) {
    __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 2 * column));
    cells[0] = (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
  }
  static constexpr int kRows = 1, kColumns = kLanes, kBytes = 2;
};

inline void Transpose8(const char* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(src + i * src_stride));
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    float* low = reinterpret_cast<float*>(dst + i * dst_stride);
    float* high = reinterpret_cast<float*>(dst + (i + 4) * dst_stride);
    _mm256_storeu_ps(low, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(high, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

inline void TransposeBlocks(const char* src, int64_t src_stride, int64_t rows, int64_t columns, uint32_t* dst,
                            int64_t dst_stride) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8)
      Transpose8(src + r * src_stride + 4 * c, src_stride, dst + c * dst_stride + r, dst_stride);
    Transpose(src + r * src_stride + 4 * c, src_stride, 8, columns - c, dst + c * dst_stride + r, dst_stride);
  }
  Transpose(src + r * src_stride, src_stride, rows - r, columns, dst + r, dst_stride);
}

constexpr Isa MakeIsa() {
  Isa isa = CommonIsa("avx2");
  isa.stream_bf16 = StreamRows<Floats, WidenedRows>;
  isa.transpose = TransposeBlocks;
  return isa;
}
constexpr Isa kIsa = MakeIsa();

}  // namespace moejax::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
