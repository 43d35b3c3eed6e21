// The gradients of attention, by blocks of queries and keys: probabilities are computed again from the scores and from
// what the forward pass kept, the logarithm of each query's sum of powers.
//
// Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", algorithm 4.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"

namespace moejax {

// `forward` holds the operands, and the results as they were.
struct AttentionGradient {
  Attention forward;
  const char* dout;     // as forward.out
  char *dq, *dk, *dv;   // as the operands
};

struct GradientScratches {
  Scratch q, dout, dq, scores, slopes, narrow, products, dk, dv, line;
  Scratches blocks;
  std::vector<float> shared;
};

// All queries of a row of the batch, with the heads of one key: nobody else adds to the gradients of its keys.
class AttentionGradientTask {
 public:
  AttentionGradientTask(const Isa& isa, const AttentionGradient& gradient, int64_t task, GradientScratches& scratches)
      : isa_(isa), g_(gradient), a_(gradient.forward), s_(scratches), row_(task / a_.groups), group_(task % a_.groups),
        rows_(a_.queries * a_.Shared()), size_(SizeOf(a_.type)) {}

  void Run() {
    q_ = Gathered(s_.q, a_.q, a_.width);
    dout_ = Gathered(s_.dout, g_.dout, a_.value_width);
    FindShared();
    dq_ = Zeros(s_.dq, rows_ * a_.width);
    for (int64_t from = 0; from < a_.keys; from += kScoredKeys) KeyBlock(from, std::min(from + kScoredKeys, a_.keys));
    for (int64_t r = 0; r < rows_; ++r) Write(dq_ + r * a_.width, a_.width, g_.dq + At(r) * a_.width * size_);
  }

 private:
  int64_t Query(int64_t r) const { return row_ * a_.queries + r / a_.Shared(); }
  int64_t At(int64_t r) const { return Query(r) * a_.heads + group_ * a_.Shared() + r % a_.Shared(); }

  static float* Zeros(Scratch& scratch, int64_t n) {
    float* zeros = reinterpret_cast<float*>(scratch.Cells(n));
    std::fill_n(zeros, n, 0.0f);
    return zeros;
  }

  // The heads of this key side by side, a query after the other.
  char* Gathered(Scratch& scratch, const char* from, int64_t width) {
    int64_t bytes = width * size_;
    char* to = reinterpret_cast<char*>(scratch.Cells(rows_ * bytes / 4 + 1));
    for (int64_t r = 0; r < rows_; ++r) std::memcpy(to + r * bytes, from + At(r) * bytes, bytes);
    return to;
  }

  const float* Wide(const char* from, int64_t n, float* line) const {
    if (a_.type == Type::kF32) return reinterpret_cast<const float*>(from);
    isa_.widen(reinterpret_cast<const uint16_t*>(from), n, line);
    return line;
  }

  void Write(const float* from, int64_t n, char* to) const {
    if (a_.type == Type::kF32)
      std::memcpy(to, from, 4 * n);
    else
      isa_.narrow(from, n, reinterpret_cast<uint16_t*>(to));
  }

  // What all scores of a query have in common: its output times the output's gradient.
  void FindShared() {
    s_.shared.resize(rows_);
    int64_t width = a_.value_width, bytes = width * size_;
    float* lines = reinterpret_cast<float*>(s_.line.Cells(2 * width));
    for (int64_t r = 0; r < rows_; ++r) {
      const float* out = Wide(a_.out + At(r) * bytes, width, lines);
      const float* dout = Wide(dout_ + r * bytes, width, lines + width);
      float sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += out[i] * dout[i];
      s_.shared[r] = sum;
    }
  }

  void KeyBlock(int64_t from, int64_t past) {
    int64_t n = past - from, each = std::max<int64_t>(1, kScoredRows / a_.Shared()) * a_.Shared();
    dk_ = Zeros(s_.dk, n * a_.width);
    dv_ = Zeros(s_.dv, n * a_.value_width);
    for (int64_t first = 0; first < rows_; first += each) {
      int64_t rows = std::min(each, rows_ - first), begin = from, end = past;
      if (Seen(first, rows, begin, end)) Pair(first, rows, from, begin, end);
    }
    int64_t key = (row_ * a_.groups + group_) * a_.keys + from;
    Write(dk_, n * a_.width, g_.dk + key * a_.width * size_);
    Write(dv_, n * a_.value_width, g_.dv + key * a_.value_width * size_);
  }

  bool Seen(int64_t first, int64_t rows, int64_t& from, int64_t& past) const {
    int32_t lowest = INT32_MAX, highest = -1;
    for (int64_t i = Query(first); i <= Query(first + rows - 1); ++i) {
      lowest = std::min(lowest, a_.first[i]);
      highest = std::max(highest, a_.last[i]);
    }
    return SeenKeys(a_.places + row_ * a_.keys, lowest, highest, from, past);
  }

  // One block of queries with the keys [begin, end) of the block that starts at `from`.
  void Pair(int64_t first, int64_t rows, int64_t from, int64_t begin, int64_t end) {
    int64_t n = end - begin, stride = (n + 15) / 16 * 16, width = a_.width, values = a_.value_width;
    int64_t key = (row_ * a_.groups + group_) * a_.keys + begin;
    const char *q = q_ + first * width * size_, *dout = dout_ + first * values * size_;
    const char *k = a_.k + key * width * size_, *v = a_.v + key * values * size_;
    float* powers = reinterpret_cast<float*>(s_.scores.Cells(rows * stride));
    float* slopes = reinterpret_cast<float*>(s_.slopes.Cells(rows * stride));
    Product(Rows(q, width), Columns(k, width), rows, n, width, powers, stride);
    for (int64_t r = 0; r < rows; ++r) Powers(first + r, powers + r * stride, n, stride, begin);
    Product(Rows(dout, values), Columns(v, values), rows, n, values, slopes, stride);

    Left narrow = Narrow(powers, rows, stride);
    Added(Turned(narrow), Rows(dout, values), n, values, rows, dv_ + (begin - from) * values);
    for (int64_t r = 0; r < rows; ++r)
      isa_.slopes(slopes + r * stride, powers + r * stride, n, s_.shared[first + r], a_.scale);
    narrow = Narrow(slopes, rows, stride);
    Added(narrow, Rows(k, width), rows, width, n, dq_ + first * width);
    Added(Turned(narrow), Rows(q, width), n, width, rows, dk_ + (begin - from) * width);
  }

  void Powers(int64_t r, float* scores, int64_t n, int64_t stride, int64_t begin) {
    int64_t key = row_ * a_.keys + begin, query = Query(r);
    const int32_t* segments = a_.key_segments ? a_.key_segments + key : nullptr;
    isa_.mask(scores, n, a_.scale, a_.places + key, a_.first[query], a_.last[query], segments,
              segments ? a_.query_segments[query] : 0);
    for (int64_t t = n; t < stride; ++t) scores[t] = -INFINITY;
    isa_.powers(scores, stride, a_.logs[At(r)]);
  }

  Left Rows(const char* data, int64_t width) const { return {data, a_.type, width * size_, false}; }
  Right Columns(const char* data, int64_t width) const { return {data, nullptr, a_.type, width * size_, 0, true}; }
  static Left Turned(Left left) { return {left.data, left.type, left.stride, true}; }

  // Rows of floats in the type of the operands.
  Left Narrow(const float* from, int64_t rows, int64_t stride) {
    if (a_.type == Type::kF32) return {reinterpret_cast<const char*>(from), Type::kF32, 4 * stride, false};
    uint16_t* narrow = reinterpret_cast<uint16_t*>(s_.narrow.Cells(rows * stride / 2));
    isa_.narrow(from, rows * stride, narrow);
    return {reinterpret_cast<const char*>(narrow), Type::kBf16, 2 * stride, false};
  }

  void Product(Left left, Right right, int64_t rows, int64_t columns, int64_t depth, float* out, int64_t stride) {
    Block block{left, right, rows, columns, depth, reinterpret_cast<char*>(out), Type::kF32, 4 * stride};
    MultiplyBlock(isa_, block, s_.blocks);
  }

  void Added(Left left, Left right, int64_t rows, int64_t columns, int64_t depth, float* sums) {
    float* product = reinterpret_cast<float*>(s_.products.Cells(rows * columns));
    Product(left, {right.data, nullptr, right.type, right.stride, 0, false}, rows, columns, depth, product, columns);
    isa_.fade_add(sums, product, rows * columns, 1);
  }

  const Isa& isa_;
  const AttentionGradient& g_;
  const Attention& a_;
  GradientScratches& s_;
  int64_t row_, group_, rows_, size_;
  const char *q_, *dout_;
  float *dq_, *dk_, *dv_;
};

}  // namespace moejax
