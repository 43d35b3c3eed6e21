// Words that every file here uses: element types, cells, panels, and the table of routines that an instruction set gives.
//
// A *cell* is the 32-bit unit that all inner loops multiply: one float, or two bfloat16 neighbours along the axis that
// is summed over (so that one instruction multiplies both). A *panel* is 64 columns of the right operand. Packed, it is
// cells [steps, 64]: the layout that fused multiply-adds, bfloat16 pair products and AMX tiles all read as it is.
#pragma once

#include <cstdint>
#include <cstring>

namespace moejax {

constexpr int64_t kPanel = 64;

enum class Type { kF32, kBf16, kMxfp4 };

// Asks for memory to come into the second-level cache.
inline void Fetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

inline float WidenOne(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Adds (or, where `add` is false, writes) a[rows, steps] times b[steps, 64] into c[rows, 64]. Strides are bytes for a
// and b, floats for c.
using Tile = void (*)(int64_t rows, int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                      float* c, int64_t c_stride, bool add);

// The same for whole panels of a b that is not packed: [steps, columns] in floats, or in rows of bfloat16 of which pairs
// make a step. It always adds. Made for few rows of a, whose speed is that of reading b: it walks along b's rows.
using Stream = void (*)(int64_t rows, int64_t steps, int64_t columns, const char* a, int64_t a_stride, const char* b,
                        int64_t b_stride, float* c, int64_t c_stride);

// The same as Tile where b is [outputs, steps], each output's cells side by side.
using Dots = void (*)(int64_t rows, int64_t outputs, int64_t steps, const char* a, int64_t a_stride, const char* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add);

// The most rows that a Stream or Dots takes.
constexpr int64_t kFewRows = 8;

// What one instruction set does. A null `tile_pairs` means that bfloat16 is widened to floats; then `dots_pairs` and
// `interleave` are null too. A null `stream_bf16` means that such rows are packed first.
struct Isa {
  const char* name;
  int64_t tile_rows;        // the most rows that one call of tile_f32 takes
  int64_t tile_rows_pairs;  // and of tile_pairs
  Tile tile_f32;
  Tile tile_pairs;
  Stream stream_f32;
  Stream stream_bf16;       // steps are pairs of rows where there is tile_pairs, else rows
  Dots dots_f32;
  Dots dots_pairs;
  // dst[c * dst_stride + r] = src[r][c], in cells; src_stride is bytes.
  void (*transpose)(const char* src, int64_t src_stride, int64_t rows, int64_t columns, uint32_t* dst,
                    int64_t dst_stride);
  // dst[i] = the pair (first[i], second[i]).
  void (*interleave)(const uint16_t* first, const uint16_t* second, int64_t n, uint32_t* dst);
  void (*widen)(const uint16_t* src, int64_t n, float* dst);
  void (*narrow)(const float* src, int64_t n, uint16_t* dst);
  // Of attention, see softmax.h.
  float (*mask)(float* scores, int64_t n, float scale, const int32_t* places, int32_t first, int32_t last,
                const int32_t* segments, int32_t segment);
  float (*powers)(float* scores, int64_t n, float largest);
  void (*slopes)(float* slopes, const float* powers, int64_t n, float shared, float scale);
  void (*fade_add)(float* sums, const float* more, int64_t n, float factor);
  // gate[i] = silu(gate[i]) * up[i], in whole vectors.
  void (*silu_multiply)(float* gate, const float* up, int64_t n);
  // `count` blocks of 32 four-bit values, 16 bytes each, to bfloat16.
  void (*unpack_mxfp4)(const uint8_t* blocks, const uint8_t* scales, int64_t count, uint16_t* dst);
};

}  // namespace moejax
