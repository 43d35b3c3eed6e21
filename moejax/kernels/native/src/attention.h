// Attention of few queries over many keys with a running softmax: the keys and values that are seen are read once, where
// they lie in the cache. Scores and sums are floats; powers have the values' type before they are multiplied.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "block.h"

namespace moejax {

constexpr int64_t kKeys = 128;   // scored at once
constexpr int64_t kRanks = 32;   // queries (by heads that share a key) of one task at most
constexpr float kLow = -1e30f;   // below every score; what a sink is where there is none
constexpr float kHidden = -3e38f;  // lower still, so that its power is zero even where all keys are hidden

// The operands as they lie in memory: q [B, S, N, H], k [B, G, T, H], v [B, G, T, Hv], out [B, S, N, Hv], logs [B, S, N].
struct AttentionArrays {
  const char *q, *k, *v;
  const float* sinks;                   // [N]
  const int32_t *first, *last, *places; // [B, S], [B, S], [B, T]
  char* out;
  float* logs;
  Type type;
  int64_t queries, heads, groups, keys, width, value;
  float scale;

  int64_t Sharing() const { return heads / groups; }
};

// Consecutive queries and heads of one key/value head: rank r is query r / Sharing() and head r % Sharing() of its own.
struct AttentionTask {
  int64_t row, group, rank, ranks;
};

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

template <class V, class T>
inline V Load4(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats4 Chosen(Ints4 first, Floats4 a, Floats4 b) { return (Floats4)(((Ints4)a & first) | ((Ints4)b & ~first)); }

// e to the x for x <= 0, to two units in the last place; 0 below -87.
inline Floats4 Power(Floats4 x) {
  Ints4 seen = x > -87.0f;
  x = (Floats4)((Ints4)x & seen);
  Floats4 n = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number, in its low bits
  Ints4 exponent = (Ints4)n << 23;
  n -= 12582912.0f;
  Floats4 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats4 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Floats4)(((Ints4)p + exponent) & seen);
}

struct AttentionScratch {
  Scratches products;
  Scratch q, scores, powers, update, values;
};

class HeadAttention {
 public:
  HeadAttention(const Isa& isa, const AttentionArrays& arrays, const AttentionTask& task, AttentionScratch& scratch)
      : isa_(isa), a_(arrays), task_(task), scratch_(scratch), largest_(task.ranks), total_(task.ranks) {}

  void Run() {
    Begin();
    for (int64_t key = 0; key < a_.keys; key += kKeys) {
      int64_t count = std::min(kKeys, a_.keys - key);
      if (Seen(key, count)) TakeIn(key, count);
    }
    WriteOut();
  }

 private:
  int64_t Query(int64_t rank) const { return task_.row * a_.queries + (task_.rank + rank) / a_.Sharing(); }

  // Where the rank's entries begin in [B, S, N].
  int64_t Entry(int64_t rank) const {
    return Query(rank) * a_.heads + task_.group * a_.Sharing() + (task_.rank + rank) % a_.Sharing();
  }

  // The sinks alone, and the queries side by side.
  void Begin() {
    int64_t bytes = a_.width * SizeOf(a_.type);
    q_ = reinterpret_cast<char*>(scratch_.q.Cells((task_.ranks * bytes + 3) / 4));
    values_ = reinterpret_cast<float*>(scratch_.values.Cells(task_.ranks * a_.value));
    std::fill_n(values_, task_.ranks * a_.value, 0.0f);
    for (int64_t r = 0; r < task_.ranks; ++r) {
      int64_t entry = Entry(r);
      std::memcpy(q_ + r * bytes, a_.q + entry * bytes, bytes);
      largest_[r] = a_.sinks[entry % a_.heads];
      total_[r] = largest_[r] > kLow ? 1.0f : 0.0f;
    }
  }

  // Reads the keys' places; whether some query sees one of them, judged by the ends of the places.
  bool Seen(int64_t key, int64_t count) {
    std::copy_n(a_.places + task_.row * a_.keys + key, count, places_);
    std::fill(places_ + count, places_ + kKeys, -1);
    int32_t lowest = *std::min_element(places_, places_ + count);
    int32_t highest = *std::max_element(places_, places_ + count);
    for (int64_t r = 0; r < task_.ranks; ++r)
      if (a_.first[Query(r)] <= highest && lowest <= a_.last[Query(r)]) return true;
    return false;
  }

  void TakeIn(int64_t key, int64_t count) {
    int64_t item = SizeOf(a_.type), head = (task_.row * a_.groups + task_.group) * a_.keys + key;
    scores_ = reinterpret_cast<float*>(scratch_.scores.Cells(task_.ranks * kKeys));
    std::fill_n(scores_, task_.ranks * kKeys, 0.0f);
    Product({q_, a_.type, a_.width * item, false},
            {a_.k + head * a_.width * item, nullptr, a_.type, a_.width * item, 0, true}, count, a_.width, scores_, kKeys);
    for (int64_t r = 0; r < task_.ranks; ++r) Soften(r);
    float* update = reinterpret_cast<float*>(scratch_.update.Cells(task_.ranks * a_.value));
    Product({Powers(), a_.type, kKeys * item, false},
            {a_.v + head * a_.value * item, nullptr, a_.type, a_.value * item, 0, false}, a_.value, count, update,
            a_.value);
    for (int64_t i = 0; i < task_.ranks * a_.value; ++i) values_[i] += update[i];
  }

  void Product(Left left, Right right, int64_t columns, int64_t depth, float* out, int64_t out_stride) {
    Block block{left, right, task_.ranks, columns, depth, reinterpret_cast<char*>(out), Type::kF32, 4 * out_stride};
    BlockProduct(isa_, block, scratch_.products).Run();
  }

  // One row of scores becomes powers, and what was summed before shrinks to the new largest score.
  void Soften(int64_t rank) {
    float* scores = scores_ + rank * kKeys;
    int32_t first = a_.first[Query(rank)], last = a_.last[Query(rank)];
    Floats4 most = largest_[rank] + Floats4{};
    for (int64_t t = 0; t < kKeys; t += 4) {
      Ints4 place = Load4<Ints4>(places_ + t);
      Floats4 x = Chosen(place >= first & place <= last, Load4<Floats4>(scores + t) * a_.scale, kHidden + Floats4{});
      most = Chosen(x > most, x, most);
      std::memcpy(scores + t, &x, sizeof x);
    }
    float largest = std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
    Floats4 sum = {};
    for (int64_t t = 0; t < kKeys; t += 4) {
      Floats4 x = Power(Load4<Floats4>(scores + t) - largest);
      sum += x;
      std::memcpy(scores + t, &x, sizeof x);
    }
    float shrunk = std::exp(largest_[rank] - largest);
    total_[rank] = total_[rank] * shrunk + (sum[0] + sum[1]) + (sum[2] + sum[3]);
    largest_[rank] = largest;
    for (int64_t h = 0; h < a_.value; ++h) values_[rank * a_.value + h] *= shrunk;
  }

  const char* Powers() {
    if (a_.type == Type::kF32) return reinterpret_cast<const char*>(scores_);
    uint16_t* narrow = reinterpret_cast<uint16_t*>(scratch_.powers.Cells(task_.ranks * kKeys / 2));
    isa_.narrow(scores_, task_.ranks * kKeys, narrow);
    return reinterpret_cast<const char*>(narrow);
  }

  void WriteOut() {
    for (int64_t r = 0; r < task_.ranks; ++r) {
      float total = total_[r] > 0 ? total_[r] : 1.0f;  // of a query that sees nothing
      float* values = values_ + r * a_.value;
      for (int64_t h = 0; h < a_.value; ++h) values[h] /= total;
      char* out = a_.out + Entry(r) * a_.value * SizeOf(a_.type);
      if (a_.type == Type::kF32)
        std::memcpy(out, values, 4 * a_.value);
      else
        isa_.narrow(values, a_.value, reinterpret_cast<uint16_t*>(out));
      a_.logs[Entry(r)] = largest_[r] + std::log(total);
    }
  }

  const Isa& isa_;
  const AttentionArrays& a_;
  const AttentionTask& task_;
  AttentionScratch& scratch_;
  std::vector<float> largest_, total_;
  int32_t places_[kKeys];  // of the keys at hand, -1 after them
  char* q_;
  float *scores_, *values_;
};

}  // namespace moejax
