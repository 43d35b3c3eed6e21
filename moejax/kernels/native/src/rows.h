// Moving rows as they are, whatever their type: XLA:CPU widens the whole of a bfloat16 operand to read or write a few.
#pragma once

#include <cstdint>
#include <cstring>

namespace moejax {

// out[i] = table[index[i]] for i in [from, past), zeros where there is no such row.
inline void TakeRows(const char* table, int64_t count, int64_t row_bytes, const int32_t* index, int64_t from,
                     int64_t past, char* out) {
  for (int64_t i = from; i < past; ++i) {
    if (index[i] >= 0 && index[i] < count)
      std::memcpy(out + i * row_bytes, table + index[i] * row_bytes, row_bytes);
    else
      std::memset(out + i * row_bytes, 0, row_bytes);
  }
}

// places[b, g, index[b, s]] = fresh[b, s, g], where there is such a place.
inline void PutRows(char* places, int64_t batch, int64_t groups, int64_t count, int64_t row_bytes, const char* fresh,
                    const int32_t* index, int64_t steps) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t s = 0; s < steps; ++s) {
      int64_t place = index[b * steps + s];
      if (place < 0 || place >= count) continue;
      for (int64_t g = 0; g < groups; ++g)
        std::memcpy(places + ((b * groups + g) * count + place) * row_bytes,
                    fresh + ((b * steps + s) * groups + g) * row_bytes, row_bytes);
    }
}

}  // namespace moejax
