// Which instruction sets this processor has, and which of them pass the check that they compute what portable code does.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "block.h"
#include "portable.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "avx512_bf16.h"
#endif

namespace moejax {

#if defined(__x86_64__)
// Asked of the processor itself: the compilers' own builtins know different names, and some runtimes never fill them in.
enum Register { kEax, kEbx, kEcx, kEdx };

inline bool CpuidBit(int leaf, int subleaf, Register which, int bit) {
  unsigned registers[4] = {};
  if (!__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) return false;
  return registers[which] >> bit & 1;
}

// Whether the system saves these parts of a thread's state: bits of the extended control register 0.
inline bool SystemSaves(unsigned parts) {
  if (!CpuidBit(1, 0, kEcx, 27)) return false;  // the register may not be read
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & parts) == parts;
}

constexpr unsigned kVectorState = 0x6, kAvx512State = 0xE6, kTileState = 0x60000;

inline bool HasAvx2() { return SystemSaves(kVectorState) && CpuidBit(7, 0, kEbx, 5) && CpuidBit(1, 0, kEcx, 12); }

inline bool HasAvx512() {
  bool has = HasAvx2() && SystemSaves(kAvx512State);
  for (int bit : {16, 17, 30, 31}) has = has && CpuidBit(7, 0, kEbx, bit);  // f, dq, bw, vl
  return has;
}

inline bool HasAvx512Bf16() { return HasAvx512() && CpuidBit(7, 1, kEax, 5); }

inline bool HasAmx() {
#if defined(MOEJAX_EMULATED_AMX)
  return HasAvx512Bf16();
#else
  bool has = HasAvx512Bf16() && CpuidBit(7, 0, kEdx, 22) && CpuidBit(7, 0, kEdx, 24);  // bfloat16 and tiles
  return has && SystemSaves(kTileState) && amx::Permitted();
#endif
}
#endif

// Those that the processor has, the best last.
inline std::vector<const Isa*> PresentIsas() {
  std::vector<const Isa*> isas = {&portable::kIsa};
#if defined(__x86_64__)
  if (HasAvx2()) isas.push_back(&avx2::kIsa);
  if (HasAvx512()) isas.push_back(&avx512::kIsa);
  if (HasAvx512Bf16()) isas.push_back(&avx512_bf16::kIsa);
  if (HasAmx()) isas.push_back(&amx::kIsa);
#endif
  return isas;
}

// One block of all sixteen codes under each scale.
inline std::vector<float> UnpackEverything(const Isa& isa) {
  constexpr int64_t kScales = 256;
  std::vector<uint8_t> blocks(kScales * kBlockBytes), scales(kScales);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint8_t>(i % 16 | (15 - i % 16) << 4);
  for (int64_t i = 0; i < kScales; ++i) scales[i] = static_cast<uint8_t>(i);
  std::vector<uint16_t> narrow(kScales * kBlock);
  isa.unpack_mxfp4(blocks.data(), scales.data(), kScales, narrow.data());
  return std::vector<float>(narrow.begin(), narrow.end());  // their bits as numbers, which have to be the same
}

// Products small enough to take no time, odd enough to reach every routine's tails.
inline std::vector<float> CheckProducts(const Isa& isa) {
  constexpr int64_t kDepth = 96, kColumns = 70;
  std::vector<float> results;
  Scratches scratches;
  for (Type type : {Type::kF32, Type::kBf16})
    for (int64_t rows : {3, 37})
      for (int64_t depth : {kDepth, kDepth - 1})
        for (int order = 0; order < 3; ++order) {  // [depth, columns]; [columns, depth]; left [depth, rows]
          std::vector<float> wide[2] = {std::vector<float>(rows * kDepth), std::vector<float>(kDepth * kColumns)};
          std::vector<uint16_t> narrow[2];
          const char* data[2];
          uint32_t state = 1;
          for (int i : {0, 1}) {
            for (float& value : wide[i]) {
              state = state * 1664525 + 1013904223;
              value = static_cast<float>(static_cast<int>(state >> 24) - 128) / 128;  // exact in bfloat16
            }
            narrow[i].resize(wide[i].size());
            portable::kIsa.narrow(wide[i].data(), wide[i].size(), narrow[i].data());
            data[i] = type == Type::kF32 ? reinterpret_cast<const char*>(wide[i].data())
                                         : reinterpret_cast<const char*>(narrow[i].data());
          }
          std::vector<float> out(rows * kColumns);
          Left left{data[0], type, (order == 2 ? rows : depth) * SizeOf(type), order == 2};
          Right right{data[1], nullptr, type, (order == 1 ? depth : kColumns) * SizeOf(type), 0, order == 1};
          Block block{left, right, rows, kColumns, depth, reinterpret_cast<char*>(out.data()), Type::kF32, 4 * kColumns};
          MultiplyBlock(isa, block, scratches);
          results.insert(results.end(), out.begin(), out.end());
        }
  std::vector<float> values = UnpackEverything(isa);
  results.insert(results.end(), values.begin(), values.end());
  return results;
}

inline bool Agrees(const Isa& isa, const std::vector<float>& expected) {
  std::vector<float> results = CheckProducts(isa);
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(results[i] - expected[i]) < 1e-4f)) return false;  // the products' sums are of 96 numbers below one
  return true;
}

struct Choice {
  std::vector<const Isa*> isas;  // the usable ones, the best last
  std::string refused;           // the names of those that failed the check
};

inline Choice& ChosenIsas() {
  static Choice choice = [] {
    Choice chosen;
    std::vector<float> expected = CheckProducts(portable::kIsa);
    for (const Isa* isa : PresentIsas())
      if (Agrees(*isa, expected))
        chosen.isas.push_back(isa);
      else
        chosen.refused += std::string(chosen.refused.empty() ? "" : ", ") + isa->name;
    return chosen;
  }();
  return choice;
}

}  // namespace moejax
