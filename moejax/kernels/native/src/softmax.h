// The softmax of attention's scores, written with the compiler's own vectors: included like vectors.h, after it.

// What attention does to one row of scores besides products.
constexpr float kHidden = -__builtin_inff();

// Scales a row of scores and hides those of keys outside of [first, last] or of another segment; the largest one left.
// The row ends in whole vectors: what follows its n scores is hidden.
inline float Mask(float* scores, int64_t n, float scale, const int32_t* places, int32_t first, int32_t last,
                  const int32_t* segments, int32_t segment) {
  for (int64_t t = 0; t < n; ++t)
    scores[t] = (places[t] >= first) & (places[t] <= last) ? scores[t] * scale : kHidden;
  if (segments)
    for (int64_t t = 0; t < n; ++t) scores[t] = segments[t] == segment ? scores[t] : kHidden;
  int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = n; t < whole; ++t) scores[t] = kHidden;
  Vec largest = Load(scores);
  for (int64_t t = kLanes; t < whole; t += kLanes) {
    Vec more = Load(scores + t);
    largest = more > largest ? more : largest;
  }
  float lane[kLanes], most = kHidden;
  std::memcpy(lane, &largest, sizeof lane);
  for (float value : lane) most = value > most ? value : most;
  return most;
}

// e to the power of x, for x up to 0: two to a whole number times a polynomial, good to the last bit or two.
MOEJAX_INLINE Vec Exponential(Vec x) {
  constexpr float kLowest = -87.0f;  // below it the power is no normal float any more, and counts as zero
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, left in the low bits
  Vec shifted = x * 1.44269504f + kMagic;
  Vec n = shifted - kMagic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Bits power = (Bits)p + ((Bits)shifted << 23);
  return (Vec)(power & ~(Bits)(x <= kLowest));  // what is no number stays so
}

// Scores become exp(score - largest); their sum.
inline float Powers(float* scores, int64_t n, float largest) {
  Vec sum = {};
  for (int64_t t = 0; t < n; t += kLanes) {
    Vec power = Exponential(Load(scores + t) - largest);
    Store(scores + t, power);
    sum += power;
  }
  return Sum(sum);
}

// The gradients of scores from those of the powers that they became: `shared` is what a row's have in common.
inline void Slopes(float* slopes, const float* powers, int64_t n, float shared, float scale) {
  for (int64_t i = 0; i < n; ++i) slopes[i] = powers[i] * (slopes[i] - shared) * scale;
}

// gate * sigmoid(gate) * up, with a power that cannot overflow: of minus the gate's size.
inline void SiluMultiply(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec x = Load(gate + i), zero = {};
    Vec power = Exponential(x > zero ? -x : x);
    Vec weight = (x > zero ? zero + 1.0f : power) / (power + 1.0f);
    Store(gate + i, x * weight * Load(up + i));
  }
}

// sums = sums * factor + more.
inline void FadeAdd(float* sums, const float* more, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) sums[i] = sums[i] * factor + more[i];
}
