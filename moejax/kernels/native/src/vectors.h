// The routines of one instruction set, written with the compiler's own vectors. No include guard: each instruction set
// includes this in its namespace and under its target, with MOEJAX_LANES (floats in a vector), MOEJAX_VECTORS (vectors
// in one row of a tile), MOEJAX_ROWS (rows of a tile) and MOEJAX_SPLATS (cells of a that a stream holds) chosen so that
// all of them stay in registers.

constexpr int kLanes = MOEJAX_LANES;
constexpr int kVectors = MOEJAX_VECTORS;
constexpr int kRows = MOEJAX_ROWS;
constexpr int kSplats = MOEJAX_SPLATS;

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

template <int R, class Multiply>
void TileOf(int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c, int64_t c_stride,
            bool add) {
  for (int64_t column = 0; column < kPanel; column += kVectors * kLanes) {
    Vec sum[R][kVectors] = {};
    const char* columns = b + 4 * column;
    for (int64_t k = 0; k < steps; ++k) {
      Vec right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = Load(columns + k * b_stride + v * sizeof(Vec));
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
template <class Multiply, int R = kRows>
void Tiles(int64_t rows, int64_t steps, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c,
           int64_t c_stride, bool add) {
  if (rows == R) return TileOf<R, Multiply>(steps, a, a_stride, b, b_stride, c, c_stride, add);
  if constexpr (R > 1) Tiles<Multiply, R - 1>(rows, steps, a, a_stride, b, b_stride, c, c_stride, add);
}

// How a step's cells are read where b is not packed: so many columns, each of so many bytes, of so many rows of b.
struct FloatRows {
  static MOEJAX_INLINE void Read(const char* b, int64_t, int64_t column, Vec* cells) {
    cells[0] = Load(b + 4 * column);
  }
  static constexpr int kRows = 1, kColumns = kLanes, kBytes = 4;
};

// How many rows of b are taken at once, and how many further on they are asked for: by itself the processor fetches ahead
// up to the end of a row's page and not beyond. So they arrive about as fast as a plain sum over memory reads them; with
// two rows at once, or without asking, at half to two thirds of that.
constexpr int kRowsAtOnce = 8, kRowsAhead = 16;

// S steps at once: the sums are read and written once for S rows of b.
template <int R, int S, class Multiply, class Reader>
void StreamSteps(int64_t columns, const char* a, int64_t a_stride, const char* b, int64_t b_stride, float* c,
                 int64_t c_stride) {
  constexpr bool kHeld = R * S <= kSplats;
  Vec left[kHeld ? R : 1][S];
  if constexpr (kHeld)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) left[r][s] = Splat(a + r * a_stride + 4 * s);
  constexpr int kVecs = Reader::kColumns / kLanes;
  constexpr int kLineColumns = 64 / Reader::kBytes;
  for (int64_t column = 0; column < columns; column += Reader::kColumns) {
    if (Reader::kColumns >= kLineColumns || column % kLineColumns == 0)
#pragma GCC unroll 16
      for (int row = 0; row < S * Reader::kRows; ++row)
        __builtin_prefetch(b + (row + kRowsAhead) * b_stride + column * Reader::kBytes, 0, 2);
    Vec right[S][kVecs];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) Reader::Read(b + s * Reader::kRows * b_stride, b_stride, column, right[s]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec sum[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) sum[v] = Load(c + r * c_stride + column + v * kLanes);
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) {
        Vec factor = kHeld ? left[kHeld ? r : 0][s] : Splat(a + r * a_stride + 4 * s);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) sum[v] = Multiply::MultiplyAdd(sum[v], factor, right[s][v]);
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) Store(c + r * c_stride + column + v * kLanes, sum[v]);
    }
  }
}

template <class Multiply, class Reader, int R = kFewRows>
void StreamRows(int64_t rows, int64_t steps, int64_t columns, const char* a, int64_t a_stride, const char* b,
                int64_t b_stride, float* c, int64_t c_stride) {
  if constexpr (R > 1) {
    if (rows < R)
      return StreamRows<Multiply, Reader, R - 1>(rows, steps, columns, a, a_stride, b, b_stride, c, c_stride);
  }
  constexpr int kAtOnce = kRowsAtOnce / Reader::kRows;
  const int64_t row_bytes = Reader::kRows * b_stride;
  int64_t k = 0;
  for (; k + kAtOnce <= steps; k += kAtOnce)
    StreamSteps<R, kAtOnce, Multiply, Reader>(columns, a + 4 * k, a_stride, b + k * row_bytes, b_stride, c, c_stride);
  for (; k < steps; ++k)
    StreamSteps<R, 1, Multiply, Reader>(columns, a + 4 * k, a_stride, b + k * row_bytes, b_stride, c, c_stride);
}

// Asks for n cache lines of b, whose rows of `width` bytes are taken one after the other, to come into the second-level
// cache. Left to itself a processor fetches ahead within a page at most, and slower the more rows it sees side by side.
class Ahead {
 public:
  MOEJAX_INLINE Ahead(const char* b, int64_t b_stride, int64_t width)
      : at_(b), end_(b + width), skip_(b_stride - width), b_stride_(b_stride) {}

  template <int n>
  MOEJAX_INLINE void Fetch() {
#pragma GCC unroll 16
    for (int line = 0; line < n; ++line) __builtin_prefetch(at_ + 64 * line, 0, 2);
    at_ += 64 * n;
    if (at_ < end_) return;
    at_ += skip_;
    end_ += b_stride_;
  }

 private:
  const char *at_, *end_;
  int64_t skip_, b_stride_;
};

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
  Ahead ahead(b + 2 * O * b_stride, b_stride, 4 * steps);  // the block after the next
  for (; k + kLanes <= steps; k += kLanes) {
    if (4 * k % 64 == 0) ahead.Fetch<O>();
    DotStep<R, O, Multiply, true>(a + 4 * k, a_stride, b + 4 * k, b_stride, kLanes, sum);
  }
  if (k < steps) DotStep<R, O, Multiply, false>(a + 4 * k, a_stride, b + 4 * k, b_stride, steps - k, sum);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      float* to = c + r * c_stride + o;
      *to = (add ? *to : 0.0f) + Sum(sum[r][o]);
    }
}

// Outputs in blocks that leave the sums of up to 16 products in registers, then one at a time.
template <class Multiply, int R = kFewRows>
void DotRows(int64_t rows, int64_t outputs, int64_t steps, const char* a, int64_t a_stride, const char* b,
             int64_t b_stride, float* c, int64_t c_stride, bool add) {
  if constexpr (R > 1) {
    if (rows < R) return DotRows<Multiply, R - 1>(rows, outputs, steps, a, a_stride, b, b_stride, c, c_stride, add);
  }
  constexpr int kAtOnce = R > 4 ? 2 : 4;
  int64_t o = 0;
  for (; o + kAtOnce <= outputs; o += kAtOnce)
    DotsOf<R, kAtOnce, Multiply>(steps, a, a_stride, b + o * b_stride, b_stride, c + o, c_stride, add);
  for (; o < outputs; ++o) DotsOf<R, 1, Multiply>(steps, a, a_stride, b + o * b_stride, b_stride, c + o, c_stride, add);
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
