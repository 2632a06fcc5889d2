// Values of a sparse weight in memory, for sparse_product.cpp and bitmask_product.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif

namespace {

enum Kind : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

template <Kind kind>
constexpr int bytes_of = kind == kFloat32 ? 4 : kind == kInt8 ? 1 : 2;

__attribute__((always_inline)) inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

__attribute__((always_inline)) inline float from_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return from_bits(sign | rest << 13) * 0x1p112f;  // the exponents' biases are 127 and 15; subnormals come out right
}

template <Kind kind>
__attribute__((always_inline)) inline float value_at(const void* values, int64_t k) {
  if constexpr (kind == kFloat32) return static_cast<const float*>(values)[k];
  if constexpr (kind == kBfloat16) return from_bits(uint32_t{static_cast<const uint16_t*>(values)[k]} << 16);
  if constexpr (kind == kInt8) return static_cast<const int8_t*>(values)[k];
  if constexpr (kind == kFloat16) return from_half(static_cast<const uint16_t*>(values)[k]);
}

// Calls a function with a constant, so that it is compiled for each kind.
template <typename Function>
inline void for_kind(int kind, const Function& function) {
  if (kind == kFloat32) function(std::integral_constant<Kind, kFloat32>{});
  if (kind == kBfloat16) function(std::integral_constant<Kind, kBfloat16>{});
  if (kind == kFloat16) function(std::integral_constant<Kind, kFloat16>{});
  if (kind == kInt8) function(std::integral_constant<Kind, kInt8>{});
}

}  // namespace
