// AVX-512: 32 registers of sixteen floats, so a tile is 6 rows of a whole panel. bfloat16 is widened to floats here;
// avx512_bf16.h multiplies it as it is.
#pragma once

#include <immintrin.h>

#include "cells.h"
#include "mxfp4.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace moejax::avx512 {

#define MOEJAX_LANES 16
#define MOEJAX_VECTORS 4
#define MOEJAX_ROWS 6
#define MOEJAX_SPLATS 16
#include "vectors.h"
#include "softmax.h"
#include "common_isa.h"

// Floats made of a cache line of bfloat16.
struct WidenedRows {
  static MOEJAX_INLINE void Read(const char* b, int64_t, int64_t column, Vec* cells) {
    __m512i narrow = _mm512_loadu_si512(b + 2 * column);
    cells[0] = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(narrow)), 16);
    cells[1] = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(narrow, 1)), 16);
  }
  static constexpr int kRows = 1, kColumns = 32, kBytes = 2;
};

// Cells, then pairs of cells, then quarters of vectors change places, each step among rows twice as far apart.
inline void Transpose16(const char* src, int64_t src_stride, uint32_t* dst, int64_t dst_stride) {
  __m512i row[16], pair[16], quad[16], half[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_si512(src + i * src_stride);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xDD);
    half[i + 8] = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(dst + i * dst_stride, _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88));
    _mm512_storeu_si512(dst + (i + 4) * dst_stride, _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88));
    _mm512_storeu_si512(dst + (i + 8) * dst_stride, _mm512_shuffle_i32x4(half[i], half[i + 8], 0xDD));
    _mm512_storeu_si512(dst + (i + 12) * dst_stride, _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xDD));
  }
}

inline void TransposeBlocks(const char* src, int64_t src_stride, int64_t rows, int64_t columns, uint32_t* dst,
                            int64_t dst_stride) {
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16)
      Transpose16(src + r * src_stride + 4 * c, src_stride, dst + c * dst_stride + r, dst_stride);
    Transpose(src + r * src_stride + 4 * c, src_stride, 16, columns - c, dst + c * dst_stride + r, dst_stride);
  }
  Transpose(src + r * src_stride, src_stride, rows - r, columns, dst + r, dst_stride);
}

// A block's 32 codes are looked up in one table of 32 words, then the scale is added to the exponents of all but zeros.
inline void UnpackBlocks(const uint8_t* blocks, const uint8_t* scales, int64_t count, uint16_t* dst) {
  __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kElementBits)));
  for (int64_t i = 0; i < count; ++i) {
    if (scales[i] < kLeastPlainScale || scales[i] > kLargestPlainScale) {
      UnpackBlock(blocks + i * kBlockBytes, scales[i], dst + i * kBlock);
      continue;
    }
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks + i * kBlockBytes));
    __m256i wide = _mm256_cvtepu8_epi16(bytes);
    __m256i codes = _mm256_or_si256(wide, _mm256_slli_epi16(wide, 4));  // high half of a byte to the next byte
    __m512i index = _mm512_and_si512(_mm512_cvtepu8_epi16(codes), _mm512_set1_epi16(15));
    __m512i bits = _mm512_permutexvar_epi16(index, table);
    __mmask32 nonzero = _mm512_test_epi16_mask(index, _mm512_set1_epi16(7));
    __m512i power = _mm512_set1_epi16(static_cast<short>((scales[i] - 127) << 7));
    _mm512_storeu_si512(dst + i * kBlock, _mm512_mask_add_epi16(bits, nonzero, bits, power));
  }
}

constexpr Isa MakeIsa() {
  Isa isa = CommonIsa("avx512");
  isa.stream_bf16 = StreamRows<Floats, WidenedRows>;
  isa.transpose = TransposeBlocks;
  isa.unpack_mxfp4 = UnpackBlocks;
  return isa;
}
constexpr Isa kIsa = MakeIsa();

}  // namespace moejax::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
