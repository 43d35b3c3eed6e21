// AMX's instructions in plain C++, as the processor's manual defines them, so that amx.h can be tested anywhere.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tiles {
  bool configured = false;
  int row_bytes[8], rows[8];
  uint8_t data[8][16][64];
};

inline Tiles& State() {
  static Tiles tiles;
  return tiles;
}

inline void Require(bool condition) {
  if (!condition) std::abort();
}

inline void LoadConfig(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  Require(bytes[0] == 1 && bytes[1] == 0);
  Tiles& tiles = State();
  std::memset(&tiles, 0xCC, sizeof tiles);
  for (int i = 0; i < 8; ++i) {
    tiles.row_bytes[i] = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tiles.rows[i] = bytes[48 + i];
    Require(tiles.row_bytes[i] <= 64 && tiles.rows[i] <= 16);
  }
  tiles.configured = true;
}

inline void Load(int tile, const void* base, int64_t stride) {
  Tiles& tiles = State();
  Require(tiles.configured);
  for (int r = 0; r < tiles.rows[tile]; ++r)
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(base) + r * stride, tiles.row_bytes[tile]);
}

inline void Store(int tile, void* base, int64_t stride) {
  Tiles& tiles = State();
  Require(tiles.configured);
  for (int r = 0; r < tiles.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
}

inline void Zero(int tile) { std::memset(State().data[tile], 0, sizeof State().data[tile]); }

inline float Half(const uint8_t* from) {
  uint32_t bits = static_cast<uint32_t>(from[0]) << 16 | static_cast<uint32_t>(from[1]) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// c[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]
inline void MultiplyAdd(int c, int a, int b) {
  Tiles& tiles = State();
  Require(tiles.configured && tiles.rows[c] == tiles.rows[a] && tiles.row_bytes[a] == 4 * tiles.rows[b] &&
          tiles.row_bytes[b] == tiles.row_bytes[c]);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float sum;
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, sizeof sum);
      for (int k = 0; k < tiles.rows[b]; ++k)
        for (int half = 0; half < 4; half += 2)
          sum += Half(tiles.data[a][m] + 4 * k + half) * Half(tiles.data[b][k] + 4 * n + half);
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, sizeof sum);
    }
}

inline void Release() { State().configured = false; }

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadconfig emulated::LoadConfig
#define _tile_loadd emulated::Load
#define _tile_stored emulated::Store
#define _tile_zero emulated::Zero
#define _tile_dpbf16ps emulated::MultiplyAdd
#define _tile_release emulated::Release
