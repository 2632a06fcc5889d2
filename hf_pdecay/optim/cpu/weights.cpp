// Weights as they are stored, and random bits to round them by; what follows is compiled together with it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address)
#endif

namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Fused where there is an instruction for it, as in torch's kernels; without one it would be a call.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float fma(float a, float b, float c) { return a * b + c; }
inline double fma(double a, double b, double c) { return a * b + c; }
#endif

// --- what tensors are stored as

// Types of their own, and yet plain numbers to the compiler, which vectorises no structs.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }
inline float load(float16 x) {
  const uint32_t bits = static_cast<uint32_t>(x), magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  // Moving the exponent by a multiplication normalises subnormal numbers on the way.
  const float small = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t special = (magnitude << 13) | 0x7f800000u;                              // infinities and NaN
  return bit_cast<float>((magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(small)) | sign);
}

// Store with stochastic rounding: `noise` below the last kept bit is added and the rest cut off, see rounding.py. Or to
// the nearest, as torch does for weights that do not decay.
// `nearest` has all bits or none: a choice by a mask needs no branch, which would keep a loop from being vectorised.
inline void store(float& to, float x, uint32_t, uint32_t) { to = x; }
inline void store(double& to, double x, uint32_t, uint32_t) { to = x; }
inline void store(bfloat16& to, float x, uint32_t noise, uint32_t nearest) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t added = (nearest & (0x7fffu + ((bits >> 16) & 1u))) | (~nearest & noise & 0xffffu);
  const uint32_t most = 0x7f7fffffu + (nearest & 1u);  // at random a finite number stays one, else it may be infinite
  const uint32_t rounded = std::min(magnitude + added, most);
  const uint32_t kept = magnitude > 0x7f800000u ? 0x7fc00000u : rounded;           // a NaN stays one
  const uint32_t sign = (nearest != 0 || kept >= 0x10000u) ? bits & 0x80000000u : 0;  // at random no -0
  to = static_cast<bfloat16>((kept | sign) >> 16);
}
inline void store(float16& to, float x, uint32_t noise, uint32_t nearest) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const float unit = 16777216.0f;  // subnormal numbers are multiples of 2^-24
  const uint32_t below = (nearest & 0x1000u) | (~nearest & noise & 0x1fffu);
  const float uniform = static_cast<float>(static_cast<int32_t>(below)) * (1.0f / 8192.0f);
  const float a = bit_cast<float>(std::min(magnitude, 0x38800000u));
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(a * unit + uniform));
  const uint32_t added = (nearest & (0xfffu + ((bits >> 13) & 1u))) | (~nearest & noise & 0x1fffu);
  const uint32_t normal = std::min((magnitude + added - 0x38000000u) >> 13, 0x7bffu + (nearest & 1u));
  const uint32_t kept = magnitude > 0x7f800000u ? 0x7e00u : magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t sign = (nearest != 0 || kept != 0) ? (bits >> 16) & 0x8000u : 0;
  to = static_cast<float16>(kept | sign);
}

// --- 32 random bits for each element of each step, see rounding.py

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  return x ^ (x >> 15);
}

inline uint32_t noise_at(uint32_t element, uint32_t a, uint32_t b) {
  uint32_t x = element + a;
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x += b;
  x *= 0xd35a2d97u;
  return x ^ (x >> 15);
}

enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kEightBit = 4 };

}  // namespace
