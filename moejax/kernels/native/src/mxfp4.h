// MXFP4 to bfloat16, one block of 32 values at a time: ELEMENTS[code] * 2**(scale - 127), as quantization/mxfp4.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cells.h"

namespace moejax {

constexpr int64_t kBlock = 32;
constexpr int64_t kBlockBytes = 16;

// The bfloat16 bits of the sixteen codes under scale 127, the power zero.
constexpr uint16_t kElementBits[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                       0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

// Under these scales every value is zero or a normal bfloat16, so that a scale is an addition to the exponent's bits.
constexpr uint8_t kLeastPlainScale = 2, kLargestPlainScale = 252;

inline uint16_t ElementBits(int code, uint8_t scale) {
  uint16_t bits = kElementBits[code];
  if ((code & 7) == 0) return bits;
  if (scale >= kLeastPlainScale && scale <= kLargestPlainScale) return bits + ((scale - 127) << 7);
  // In double, whose range holds them all: the threads that call this may flush subnormal floats to zero.
  double magnitude = std::ldexp(static_cast<double>(WidenOne(bits & 0x7FFF)), scale - 127);
  uint16_t sign = bits & 0x8000;
  if (magnitude >= 0x1p128) return sign | 0x7F80;
  if (magnitude >= 0x1p-126) return bits + ((scale - 127) << 7);
  return sign | static_cast<uint16_t>(magnitude * 0x1p133);  // a subnormal bfloat16 counts units of 2**-133
}

inline void UnpackBlock(const uint8_t* block, uint8_t scale, uint16_t* dst) {
  for (int i = 0; i < kBlockBytes; ++i) {
    dst[2 * i] = ElementBits(block[i] & 15, scale);
    dst[2 * i + 1] = ElementBits(block[i] >> 4, scale);
  }
}

inline void UnpackMxfp4(const uint8_t* blocks, const uint8_t* scales, int64_t count, uint16_t* dst) {
  for (int64_t i = 0; i < count; ++i) UnpackBlock(blocks + i * kBlockBytes, scales[i], dst + i * kBlock);
}

}  // namespace moejax
