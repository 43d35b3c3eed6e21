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
#include "common_isa.h"
#undef MOEJAX_LANES
#undef MOEJAX_VECTORS
#undef MOEJAX_ROWS
#undef MOEJAX_SPLATS

constexpr Isa kIsa = CommonIsa("portable");

}  // namespace moejax::portable
