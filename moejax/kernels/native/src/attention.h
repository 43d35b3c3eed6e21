// Attention by blocks of queries and keys with a running softmax, on a cache as it lies in memory: of the keys, only
// those between the first and the last that a block's queries see are read.
//
// Source: Dao et al. 2022, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness".
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "block.h"

namespace moejax {

constexpr int64_t kScoredRows = 128;  // rows (queries times the heads that share a key) scored at once
constexpr int64_t kScoredKeys = 256;
constexpr float kLow = -1e30f;        // below every score

// Operands as the handler gets them; shapes are those of the Python function.
struct Attention {
  const char *q, *k, *v;
  Type type;
  int64_t batch, queries, heads, groups, keys, width, value_width;
  const float* sinks;             // [heads] or null
  const int32_t *first, *last;    // [batch, queries]: the places that a query sees
  const int32_t* query_segments;  // [batch, queries] or null
  const int32_t* places;          // [batch, keys], -1 for no key
  const int32_t* key_segments;    // [batch, keys] or null
  float scale;
  char* out;
  float* logs;

  int64_t Shared() const { return heads / groups; }
};

// Narrows [from, past) to the keys between the first and the last whose places are within [lowest, highest]; whether
// there is one.
inline bool SeenKeys(const int32_t* places, int32_t lowest, int32_t highest, int64_t& from, int64_t& past) {
  auto hidden = [&](int64_t t) { return places[t] < std::max(lowest, 0) || places[t] > highest; };
  while (from < past && hidden(from)) ++from;
  while (past > from && hidden(past - 1)) --past;
  return from < past;
}

// Queries [first, past) of a row of the batch with the heads of one key.
struct AttentionTask {
  int64_t row, group, first, past;
};

struct AttentionScratches {
  Scratch q, scores, narrow, products, sums;
  Scratches blocks;
  std::vector<float> largest, total;
};

class AttentionBlock {
 public:
  AttentionBlock(const Isa& isa, const Attention& a, AttentionTask task, AttentionScratches& scratches)
      : isa_(isa), a_(a), task_(task), s_(scratches), rows_((task.past - task.first) * a.Shared()) {}

  void Run() {
    GatherQueries();
    Begin();
    for (int64_t key = 0; key < a_.keys; key += kScoredKeys) {
      int64_t from = key, past = std::min(key + kScoredKeys, a_.keys);
      if (SeenKeys(a_.places + task_.row * a_.keys, lowest_, highest_, from, past)) TakeIn(from, past);
    }
    WriteOut();
  }

 private:
  int64_t Query(int64_t r) const { return task_.row * a_.queries + task_.first + r / a_.Shared(); }
  int64_t Head(int64_t r) const { return task_.group * a_.Shared() + r % a_.Shared(); }

  void GatherQueries() {
    int64_t bytes = a_.width * SizeOf(a_.type);
    q_ = reinterpret_cast<char*>(s_.q.Cells(rows_ * bytes / 4 + 1));
    for (int64_t r = 0; r < rows_; ++r) std::memcpy(q_ + r * bytes, a_.q + (Query(r) * a_.heads + Head(r)) * bytes, bytes);
  }

  void Begin() {
    s_.largest.assign(rows_, kLow);
    s_.total.assign(rows_, 0.0f);
    sums_ = reinterpret_cast<float*>(s_.sums.Cells(rows_ * a_.value_width));
    std::fill_n(sums_, rows_ * a_.value_width, 0.0f);
    if (a_.sinks)
      for (int64_t r = 0; r < rows_; ++r) s_.largest[r] = a_.sinks[Head(r)], s_.total[r] = 1;
    lowest_ = INT32_MAX, highest_ = -1;
    for (int64_t i = Query(0); i < Query(0) + task_.past - task_.first; ++i) {
      lowest_ = std::min(lowest_, a_.first[i]);
      highest_ = std::max(highest_, a_.last[i]);
    }
  }

  void TakeIn(int64_t from, int64_t past) {
    int64_t n = past - from, stride = (n + 15) / 16 * 16;  // whole vectors of any instruction set
    int64_t row = (task_.row * a_.groups + task_.group) * a_.keys + from, size = SizeOf(a_.type);
    float* scores = reinterpret_cast<float*>(s_.scores.Cells(rows_ * stride));
    Right keys{a_.k + row * a_.width * size, nullptr, a_.type, a_.width * size, 0, true};
    Right values{a_.v + row * a_.value_width * size, nullptr, a_.type, a_.value_width * size, 0, false};
    if (rows_ <= kFewRows) {  // they wait for memory, and what they read is short: all of it is asked for at once
      Fetch(keys.data, n * keys.stride);
      Fetch(values.data, n * values.stride);
    }
    Product({q_, a_.type, a_.width * size, false}, keys, n, a_.width, scores, stride);

    std::vector<float>& shrunk = shrunk_;
    shrunk.resize(rows_);
    for (int64_t r = 0; r < rows_; ++r) shrunk[r] = TakeRow(r, scores + r * stride, n, stride, from);

    float* products = reinterpret_cast<float*>(s_.products.Cells(rows_ * a_.value_width));
    Product(Probabilities(scores, n, stride), values, a_.value_width, n, products, a_.value_width);
    for (int64_t r = 0; r < rows_; ++r)
      isa_.fade_add(sums_ + r * a_.value_width, products + r * a_.value_width, a_.value_width, shrunk[r]);
  }

  // One row's scores become powers; by how much what was summed before shrinks.
  float TakeRow(int64_t r, float* scores, int64_t n, int64_t stride, int64_t from) {
    int64_t key = task_.row * a_.keys + from, query = Query(r);
    const int32_t* segments = a_.key_segments ? a_.key_segments + key : nullptr;
    float most = isa_.mask(scores, n, a_.scale, a_.places + key, a_.first[query], a_.last[query], segments,
                           segments ? a_.query_segments[query] : 0);
    for (int64_t t = n; t < stride; ++t) scores[t] = -INFINITY;
    float largest = std::max(s_.largest[r], most), shrunk = std::exp(s_.largest[r] - largest);
    s_.total[r] = s_.total[r] * shrunk + isa_.powers(scores, stride, largest);
    s_.largest[r] = largest;
    return shrunk;
  }

  Left Probabilities(const float* scores, int64_t n, int64_t stride) {
    if (a_.type == Type::kF32) return {reinterpret_cast<const char*>(scores), Type::kF32, 4 * stride, false};
    uint16_t* narrow = reinterpret_cast<uint16_t*>(s_.narrow.Cells(rows_ * stride / 2));
    isa_.narrow(scores, rows_ * stride, narrow);
    return {reinterpret_cast<const char*>(narrow), Type::kBf16, 2 * stride, false};
  }

  void Product(Left left, Right right, int64_t columns, int64_t depth, float* out, int64_t stride) {
    Block block{left, right, rows_, columns, depth, reinterpret_cast<char*>(out), Type::kF32, 4 * stride};
    MultiplyBlock(isa_, block, s_.blocks);
  }

  void WriteOut() {
    for (int64_t r = 0; r < rows_; ++r) {
      float total = s_.total[r] > 0 ? s_.total[r] : 1;  // of those that see nothing
      float* sums = sums_ + r * a_.value_width;
      for (int64_t i = 0; i < a_.value_width; ++i) sums[i] /= total;
      int64_t at = Query(r) * a_.heads + Head(r);
      char* to = a_.out + at * a_.value_width * SizeOf(a_.type);
      if (a_.type == Type::kF32)
        std::memcpy(to, sums, 4 * a_.value_width);
      else
        isa_.narrow(sums, a_.value_width, reinterpret_cast<uint16_t*>(to));
      a_.logs[at] = s_.largest[r] + std::log(total);
    }
  }

  const Isa& isa_;
  const Attention& a_;
  AttentionTask task_;
  AttentionScratches& s_;
  int64_t rows_;
  char* q_;
  float* sums_;
  int32_t lowest_, highest_;
  std::vector<float> shrunk_;
};

// Queries in blocks, for each row of the batch and each key head.
inline std::vector<AttentionTask> AttentionTasks(const Attention& a) {
  int64_t each = std::max<int64_t>(1, kScoredRows / a.Shared());
  std::vector<AttentionTask> tasks;
  for (int64_t row = 0; row < a.batch; ++row)
    for (int64_t group = 0; group < a.groups; ++group)
      for (int64_t first = 0; first < a.queries; first += each)
        tasks.push_back({row, group, first, std::min(first + each, a.queries)});
  return tasks;
}

}  // namespace moejax
