// One block of a product, on one thread: c[rows, columns] = a[rows, depth] b[depth, columns], whatever the operands'
// types and orders. Everything is brought into cells (see cells.h) a slice of the depth at a time, so that the slices
// stay in the caches; what is cells already is read in place.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cells.h"
#include "mxfp4.h"

namespace moejax {

// The left operand at its first row. Strides are bytes.
struct Left {
  const char* data;
  Type type;
  int64_t stride;       // from one row to the next; with depth_first from one step of the depth to the next
  bool depth_first;     // [depth, rows] in memory rather than [rows, depth]
};

// The right operand at its first column.
struct Right {
  const char* data;
  const uint8_t* scales;  // kMxfp4 only: [columns, depth / 32]
  Type type;
  int64_t stride;       // from one step of the depth to the next; with columns_first from one column to the next
  int64_t scale_stride;
  bool columns_first;   // [columns, depth] in memory rather than [depth, columns]
};

struct Block {
  Left left;
  Right right;
  int64_t rows, columns, depth;
  char* out;
  Type out_type;
  int64_t out_stride;  // bytes
};

// Memory of one thread that is kept from block to block.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  // At least n cells, aligned to a cache line; what they held before is lost when there were fewer.
  uint32_t* Cells(int64_t n) {
    if (n > size_) {
      std::free(data_);
      int64_t bytes = (4 * n + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, bytes);
      size_ = bytes / 4;
    }
    return static_cast<uint32_t*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

struct Scratches {
  Scratch left, right, pieces, sums;
};

// From one row of a block's sums to the next: a cache line more than whole panels, since rows a power of two apart would
// fall on the same few lines of the cache.
inline int64_t SumsStride(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel + 16; }

inline int64_t SizeOf(Type type) { return type == Type::kF32 ? 4 : 2; }

// Writes a block's columns from sums whose rows are so many floats apart.
inline void WriteSums(const Isa& isa, const Block& block, const float* sums, int64_t stride) {
  for (int64_t r = 0; r < block.rows; ++r) {
    char* to = block.out + r * block.out_stride;
    if (block.out_type == Type::kF32)
      std::memcpy(to, sums + r * stride, 4 * block.columns);
    else
      isa.narrow(sums + r * stride, block.columns, reinterpret_cast<uint16_t*>(to));
  }
}

class BlockProduct {
 public:
  // The sums go to `sums`, [rows, SumsStride(columns)].
  BlockProduct(const Isa& isa, const Block& block, Scratches& scratches, float* sums)
      : isa_(isa), block_(block), scratches_(scratches), sums_(sums), sums_stride_(SumsStride(block.columns)) {
    pairs_ = isa.tile_pairs != nullptr && block.left.type == Type::kBf16;
    per_cell_ = pairs_ ? 2 : 1;
    steps_ = (block.depth + per_cell_ - 1) / per_cell_;
    few_ = block.rows <= kFewRows;
  }

  void Compute() {
    if (steps_ == 0 || few_) std::fill_n(sums_, block_.rows * sums_stride_, 0.0f);
    int64_t slice = std::max<int64_t>(Slice(), 1);
    for (int64_t step = 0; step < steps_; step += slice) {
      Span span{step, std::min(slice, steps_ - step)};
      Operand left = LeftCells(span);
      for (int64_t column = Streamed(left, span); column < block_.columns; column += kPanel) Panel(left, span, column);
    }
  }

 private:
  struct Operand {
    const char* data;
    int64_t stride;  // bytes
  };
  struct Span {
    int64_t step, count;  // of cells
  };

  // Steps of the depth that are done at once. Few rows: all of them, unless columns have to be unpacked first. Many: so
  // few that the rows of the next panel, fetched ahead, all find room in the second-level cache even where they lie a
  // power of two apart and compete for the same few of its lines.
  int64_t Slice() const {
    if (!few_) return 128 / per_cell_;
    return !block_.right.columns_first || InPlace(block_.right.type) ? steps_ : 1024;
  }

  int64_t Element(Span span) const { return span.step * per_cell_; }
  int64_t Elements(Span span) const { return std::min(span.count * per_cell_, block_.depth - Element(span)); }

  // Whether an operand [n, depth] of this type is cells as it lies in memory.
  bool InPlace(Type type) const { return type == Type::kF32 || (type == Type::kBf16 && pairs_ && block_.depth % 2 == 0); }

  Operand LeftCells(Span span) {
    const Left& left = block_.left;
    if (!left.depth_first && InPlace(left.type))
      return {left.data + Element(span) * SizeOf(left.type), left.stride};
    uint32_t* cells = scratches_.left.Cells(block_.rows * span.count);
    if (left.depth_first) {
      const char* from = left.data + Element(span) * left.stride;
      Operand steps = StepCells(from, left.type, left.stride, Elements(span), block_.rows, block_.rows, true);
      isa_.transpose(steps.data, steps.stride, span.count, block_.rows, cells, span.count);
    } else {
      for (int64_t r = 0; r < block_.rows; ++r)
        RowCells(left.data + r * left.stride + Element(span) * SizeOf(left.type), left.type, Elements(span),
                 cells + r * span.count);
    }
    return {reinterpret_cast<const char*>(cells), 4 * span.count};
  }

  // n elements along the depth become cells; a pair without a second half gets a zero.
  void RowCells(const char* from, Type type, int64_t n, uint32_t* cells) {
    if (!pairs_ && type == Type::kBf16)
      return isa_.widen(reinterpret_cast<const uint16_t*>(from), n, reinterpret_cast<float*>(cells));
    if (n % per_cell_) cells[n / 2] = 0;
    std::memcpy(cells, from, n * SizeOf(type));
  }

  // `depth` rows of `columns` elements become steps of cells, each `width` cells wide, zeros behind its columns. With
  // `may_stay` the result is the operand itself where that is cells already.
  Operand StepCells(const char* from, Type type, int64_t stride, int64_t depth, int64_t columns, int64_t width,
                    bool may_stay) {
    if (may_stay && type == Type::kF32) return {from, stride};
    int64_t steps = (depth + per_cell_ - 1) / per_cell_;
    uint32_t* cells = scratches_.pieces.Cells(steps * width);
    for (int64_t k = 0; k < steps; ++k) {
      uint32_t* to = cells + k * width;
      const char* row = from + k * per_cell_ * stride;
      if (type == Type::kF32) {
        std::memcpy(to, row, 4 * columns);
      } else if (!pairs_) {
        isa_.widen(reinterpret_cast<const uint16_t*>(row), columns, reinterpret_cast<float*>(to));
      } else if (2 * k + 1 < depth) {
        isa_.interleave(reinterpret_cast<const uint16_t*>(row), reinterpret_cast<const uint16_t*>(row + stride),
                        columns, to);
      } else {
        for (int64_t c = 0; c < columns; ++c) to[c] = reinterpret_cast<const uint16_t*>(row)[c];
      }
      std::fill(to + columns, to + width, 0);
    }
    return {reinterpret_cast<const char*>(cells), 4 * width};
  }

  // The right operand [columns, depth] as cells in that order.
  Operand ColumnCells(Span span, int64_t column, int64_t columns) {
    const Right& right = block_.right;
    const char* from = right.data + column * right.stride;
    if (right.type == Type::kMxfp4) return UnpackedCells(span, column, columns);
    from += Element(span) * SizeOf(right.type);
    if (InPlace(right.type)) return {from, right.stride};
    uint32_t* cells = scratches_.pieces.Cells(columns * span.count);
    for (int64_t c = 0; c < columns; ++c)
      RowCells(from + c * right.stride, right.type, Elements(span), cells + c * span.count);
    return {reinterpret_cast<const char*>(cells), 4 * span.count};
  }

  Operand UnpackedCells(Span span, int64_t column, int64_t columns) {
    const Right& right = block_.right;
    int64_t first = Element(span) / kBlock, count = Elements(span) / kBlock;
    uint32_t* cells = scratches_.pieces.Cells((columns + 1) * span.count);
    uint16_t* narrow = reinterpret_cast<uint16_t*>(cells + columns * span.count);  // one column before it is widened
    for (int64_t c = 0; c < columns; ++c) {
      const char* blocks = right.data + (column + c) * right.stride + first * kBlockBytes;
      const uint8_t* scales = right.scales + (column + c) * right.scale_stride + first;
      uint32_t* to = cells + c * span.count;
      uint16_t* unpacked = pairs_ ? reinterpret_cast<uint16_t*>(to) : narrow;
      isa_.unpack_mxfp4(reinterpret_cast<const uint8_t*>(blocks), scales, count, unpacked);
      if (!pairs_) isa_.widen(narrow, count * kBlock, reinterpret_cast<float*>(to));
    }
    return {reinterpret_cast<const char*>(cells), 4 * span.count};
  }

  // Few rows times whole panels of a right operand that is read where it lies; the number of columns done.
  int64_t Streamed(Operand left, Span span) {
    const Right& right = block_.right;
    Stream stream = right.type == Type::kF32 ? isa_.stream_f32 : isa_.stream_bf16;
    if (!few_ || right.columns_first || !stream || block_.depth % per_cell_) return 0;
    int64_t columns = block_.columns / kPanel * kPanel;
    stream(block_.rows, span.count, columns, left.data, left.stride, right.data + Element(span) * right.stride,
           right.stride, sums_, sums_stride_);
    return columns;
  }

  void Panel(Operand left, Span span, int64_t column) {
    const Right& right = block_.right;
    int64_t columns = std::min(kPanel, block_.columns - column);
    float* sums = sums_ + column;
    bool add = span.step > 0;
    if (right.columns_first) {
      Operand cells = ColumnCells(span, column, columns);
      if (few_) {
        auto dots = pairs_ ? isa_.dots_pairs : isa_.dots_f32;
        return dots(block_.rows, columns, span.count, left.data, left.stride, cells.data, cells.stride, sums,
                    sums_stride_, add);
      }
      uint32_t* packed = scratches_.right.Cells(span.count * kPanel);
      if (columns < kPanel) std::fill_n(packed, span.count * kPanel, 0);
      isa_.transpose(cells.data, cells.stride, columns, span.count, packed, kPanel);
      return Tiles(pairs_ ? isa_.tile_pairs : isa_.tile_f32, left, span.count,
                   {reinterpret_cast<const char*>(packed), 4 * kPanel}, sums, add);
    }
    const char* from = right.data + Element(span) * right.stride + column * SizeOf(right.type);
    Operand cells = StepCells(from, right.type, right.stride, Elements(span), columns, kPanel, false);
    FetchNext(span, column);
    Tiles(pairs_ ? isa_.tile_pairs : isa_.tile_f32, left, span.count, cells, sums, add);
  }

  // Which rows of the right operand the next panel is made of; none after the last.
  void FetchNext(Span span, int64_t column) {
    const Right& right = block_.right;
    int64_t next = column + kPanel, first = Element(span), n = Elements(span);
    if (next >= block_.columns) next = 0, first += n;
    fetch_from_ = right.data + first * right.stride + next * SizeOf(right.type);
    fetch_rows_ = std::min(n, block_.depth - first);
  }

  // Asks for the rows [from, past) of the next panel while this one is multiplied: they lie far apart, where a
  // processor does not fetch ahead by itself.
  void FetchRows(int64_t from, int64_t past) const {
    for (int64_t k = from; k < past; ++k)
      Fetch(fetch_from_ + k * block_.right.stride, kPanel * SizeOf(block_.right.type));
  }

  // The rows in tiles of as equal a height as there are.
  void Tiles(Tile tile, Operand left, int64_t steps, Operand right, float* sums, bool add) {
    int64_t most = tile == isa_.tile_pairs ? isa_.tile_rows_pairs : isa_.tile_rows;
    int64_t tiles = (block_.rows + most - 1) / most;
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t row = block_.rows * i / tiles, past = block_.rows * (i + 1) / tiles;
      FetchRows(fetch_rows_ * i / tiles, fetch_rows_ * (i + 1) / tiles);
      tile(past - row, steps, left.data + row * left.stride, left.stride, right.data, right.stride,
           sums + row * sums_stride_, sums_stride_, add);
    }
  }

  const Isa& isa_;
  const Block& block_;
  Scratches& scratches_;
  bool pairs_, few_;
  int64_t per_cell_, steps_;
  float* sums_;
  int64_t sums_stride_;
  const char* fetch_from_ = nullptr;
  int64_t fetch_rows_ = 0;
};

// A whole block by itself.
inline void MultiplyBlock(const Isa& isa, const Block& block, Scratches& scratches) {
  int64_t stride = SumsStride(block.columns);
  float* sums = reinterpret_cast<float*>(scratches.sums.Cells(block.rows * stride));
  BlockProduct(isa, block, scratches, sums).Compute();
  WriteSums(isa, block, sums, stride);
}

}  // namespace moejax
