// The routines of one instruction set, written with the compiler's own vectors. No include guard: each instruction set
// includes this in its namespace and under its target, with MOEJAX_LANES (floats in a vector), MOEJAX_VECTORS (vectors
// in one row of a tile) and MOEJAX_ROWS (rows of a tile) chosen so that a tile's sums stay in registers.

constexpr int kLanes = MOEJAX_LANES;
constexpr int kVectors = MOEJAX_VECTORS;
constexpr int kRows = MOEJAX_ROWS;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

#define MOEJAX_INLINE inline __attribute__((always_inline))

MOEJAX_INLINE Vec Load(const void* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

MOEJAX_INLINE void Store(void* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// One cell in every lane, by its bits: they may be a pair of bfloat16.
MOEJAX_INLINE Vec Splat(const char* from) {
  uint32_t cell;
  std::memcpy(&cell, from, sizeof cell);
  return (Vec)(cell + Bits{});
}

// The first n cells of a vector, zeros after them.
MOEJAX_INLINE Vec LoadSome(const char* from, int64_t n) {
  Vec v = {};
  std::memcpy(&v, from, 4 * n);
  return v;
}

MOEJAX_INLINE float Sum(Vec v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// How two vectors of cells are multiplied.
struct Floats {
  static MOEJAX_INLINE Vec MultiplyAdd(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

// How a step's vectors of b are read: here cells, packed or floats in place.
struct Cells {
  template <int V>
  static MOEJAX_INLINE void Read(const char* b, int64_t b_stride, int64_t step, Vec (&out)[V]) {
    for (int v = 0; v < V; ++v) out[v] = Load(b + step * b_stride + v * sizeof(Vec));
  }
  static constexpr int kColumnBytes = 4;
};

template <int R, class Multiply, class Reader>
void TileOf(int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c, int64_t c_stride,
            bool add) {
  for (int64_t column = 0; column < kPanel; column += kVectors * kLanes) {
    Vec sum[R][kVectors] = {};
    const char* columns = b + column * Reader::kColumnBytes;
    for (int64_t k = 0; k < steps; ++k) {
      Vec right[kVectors];
      Reader::template Read<kVectors>(columns, b_stride, k, right);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        Vec left = Splat(a + r * a_stride + 4 * k);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Multiply::MultiplyAdd(sum[r][v], left, right[v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * c_stride + column + v * kLanes;
        Store(to, add ? Load(to) + sum[r][v] : sum[r][v]);
      }
  }
}

// Calls the tile that has exactly this many rows.
template <class Multiply, class Reader, int R = kRows>
void TileRows(int64_t rows, int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c,
              int64_t c_stride, bool add) {
  if (rows == R) return TileOf<R, Multiply, Reader>(steps, a, a_stride, b, b_stride, c, c_stride, add);
  if constexpr (R > 1) TileRows<Multiply, Reader, R - 1>(rows, steps, a, a_stride, b, b_stride, c, c_stride, add);
}

template <int R, int O, class Multiply, bool kWhole>
MOEJAX_INLINE void DotStep(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t cells,
                           Vec (&sum)[R][O]) {
  Vec right[O];
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o) right[o] = kWhole ? Load(b + o * b_stride) : LoadSome(b + o * b_stride, cells);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vec left = kWhole ? Load(a + r * a_stride) : LoadSome(a + r * a_stride, cells);
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o) sum[r][o] = Multiply::MultiplyAdd(sum[r][o], left, right[o]);
  }
}

template <int R, int O, class Multiply>
void DotsOf(int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c, int64_t c_stride,
            bool add) {
  Vec sum[R][O] = {};
  int64_t k = 0;
  for (; k + kLanes <= steps; k += kLanes)
    DotStep<R, O, Multiply, true>(a + 4 * k, a_stride, b + 4 * k, b_stride, kLanes, sum);
  if (k < steps) DotStep<R, O, Multiply, false>(a + 4 * k, a_stride, b + 4 * k, b_stride, steps - k, sum);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      float* to = c + r * c_stride + o;
      *to = (add ? *to : 0.0f) + Sum(sum[r][o]);
    }
}

// Calls the block of dots that has exactly this many rows.
template <int O, class Multiply, int R = 4>
void DotRows(int64_t rows, int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c,
             int64_t c_stride, bool add) {
  if (rows == R) return DotsOf<R, O, Multiply>(steps, a, a_stride, b, b_stride, c, c_stride, add);
  if constexpr (R > 1) DotRows<O, Multiply, R - 1>(rows, steps, a, a_stride, b, b_stride, c, c_stride, add);
}

template <class Multiply>
void DotsOfAll(int64_t rows, int64_t outputs, int64_t steps, const char* a, int64_t a_stride, const char* b,
               int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t o = 0; o < outputs;) {
    bool four = o + 4 <= outputs;
    const char* right = b + o * b_stride;
    for (int64_t r = 0; r < rows; r += 4) {
      auto dots = four ? DotRows<4, Multiply> : DotRows<1, Multiply>;
      dots(rows - r < 4 ? rows - r : 4, steps, a + r * a_stride, a_stride, right, b_stride, c + r * c_stride + o,
           c_stride, add);
    }
    o += four ? 4 : 1;
  }
}

inline void Transpose(const char* src, int64_t src_stride, int64_t rows, int64_t columns, uint32_t* dst,
                      int64_t dst_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) std::memcpy(dst + c * dst_stride + r, src + r * src_stride + 4 * c, 4);
}

inline void Widen(const uint16_t* src, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = static_cast<uint32_t>(src[i]) << 16;
    std::memcpy(dst + i, &bits, sizeof bits);
  }
}

// To the nearest, ties to even; a NaN keeps its sign and stays one.
inline void Narrow(const float* src, int64_t n, uint16_t* dst) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    dst[i] = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
  }
}
