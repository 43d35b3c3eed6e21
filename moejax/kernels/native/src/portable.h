// Any processor: vectors of four floats, which x86 (SSE2) and aarch64 (NEON) always have.
#pragma once

#include "cells.h"
#include "mxfp4.h"

namespace moejax::portable {

#define MOEJAX_LANES 4
#define MOEJAX_VECTORS 2
#define MOEJAX_ROWS 6
#define MOEJAX_SPLATS 8
#include "vectors.h"
#include "softmax.h"
#undef MOEJAX_LANES
#undef MOEJAX_VECTORS
#undef MOEJAX_ROWS
#undef MOEJAX_SPLATS

constexpr Isa MakeIsa() {
  Isa isa{};
  isa.name = "portable";
  isa.tile_rows = kRows;
  isa.tile_f32 = Tiles<Floats>;
  isa.stream_f32 = StreamRows<Floats, FloatRows>;
  isa.dots_f32 = DotRows<Floats>;
  isa.transpose = Transpose;
  isa.widen = Widen;
  isa.narrow = Narrow;
  isa.mask = Mask;
  isa.powers = Powers;
  isa.fade_add = FadeAdd;
  isa.silu_multiply = SiluMultiply;
  isa.unpack_mxfp4 = UnpackMxfp4;
  return isa;
}
constexpr Isa kIsa = MakeIsa();

}  // namespace moejax::portable
