// How many cores there are to share work among: asked once, since the answer is read from a file each time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>

namespace moejax {

inline int64_t Cores() {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return cores;
}

}  // namespace moejax
