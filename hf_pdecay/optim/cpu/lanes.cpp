// 16 numbers at once, in the registers of a processor with AVX-512: loaded and stored as weights.cpp does one by one.
// Compiled together with it.

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define HF_PDECAY_LANES 1
#else
#define HF_PDECAY_LANES 0
#endif

#if HF_PDECAY_LANES
namespace {

inline __mmask16 first_of_16(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); }

// The first n of 16 numbers, and zeros.
inline __m512 load_16(const float* p, int n) {
  return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_of_16(n), p);
}
template <class P>
inline __m256i load_halves(const P* p, int n) {
  if (n >= 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i halves = _mm256_setzero_si256();
  std::memcpy(&halves, p, n * sizeof *p);
  return halves;
}
inline __m512 load_16(const bfloat16* p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p, n)), 16));
}
inline __m512 load_16(const float16* p, int n) { return _mm512_cvtph_ps(load_halves(p, n)); }

inline __m512i all(uint32_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }

template <class P>
inline void store_halves(P* p, int n, __m512i x) {
  const __m256i halves = _mm512_cvtepi32_epi16(x);
  if (n >= 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  } else {
    std::memcpy(p, &halves, n * sizeof *p);
  }
}

// Bits to add below the `kept` ones: at random, or what rounds to the nearest.
inline __m512i rounding(__m512i bits, __m512i noise, int below, uint32_t nearest) {
  const uint32_t mask = (1u << below) - 1;
  if (nearest == 0) return _mm512_and_si512(noise, all(mask));
  return _mm512_add_epi32(all(mask >> 1), _mm512_and_si512(_mm512_srli_epi32(bits, below), all(1)));
}

// See store() in weights.cpp, whose numbers these are.
inline void store_16(float* p, int n, __m512 x, __m512i, uint32_t) {
  if (n >= 16) {
    _mm512_storeu_ps(p, x);
  } else {
    _mm512_mask_storeu_ps(p, first_of_16(n), x);
  }
}
inline void store_16(bfloat16* p, int n, __m512 x, __m512i noise, uint32_t nearest) {
  const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_and_si512(bits, all(0x7fffffffu));
  const __m512i sum = _mm512_add_epi32(magnitude, rounding(bits, noise, 16, nearest));
  const __m512i rounded = _mm512_min_epu32(sum, all(0x7f7fffffu + (nearest & 1u)));
  const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, all(0x7f800000u));
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, all(0x7fc00000u));
  const __mmask16 lives = nearest != 0 ? 0xffff : _mm512_cmpge_epu32_mask(kept, all(0x10000u));  // at random no -0
  const __m512i sign = _mm512_maskz_and_epi32(lives, bits, all(0x80000000u));
  store_halves(p, n, _mm512_srli_epi32(_mm512_or_si512(kept, sign), 16));
}
inline void store_16(float16* p, int n, __m512 x, __m512i noise, uint32_t nearest) {
  const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_and_si512(bits, all(0x7fffffffu));
  const __m512i below = nearest == 0 ? _mm512_and_si512(noise, all(0x1fffu)) : all(0x1000u);
  const __m512 uniform = _mm512_mul_ps(_mm512_cvtepi32_ps(below), _mm512_set1_ps(1.0f / 8192.0f));
  const __m512 small = _mm512_castsi512_ps(_mm512_min_epu32(magnitude, all(0x38800000u)));
  const __m512 units = _mm512_add_ps(_mm512_mul_ps(small, _mm512_set1_ps(16777216.0f)), uniform);
  const __m512i sum = _mm512_add_epi32(magnitude, rounding(bits, noise, 13, nearest));
  const __m512i normal = _mm512_min_epu32(_mm512_srli_epi32(_mm512_sub_epi32(sum, all(0x38000000u)), 13),
                                          all(0x7bffu + (nearest & 1u)));
  const __mmask16 subnormal = _mm512_cmplt_epu32_mask(magnitude, all(0x38800000u));
  const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, all(0x7f800000u));
  __m512i kept = _mm512_mask_mov_epi32(normal, subnormal, _mm512_cvttps_epi32(units));
  kept = _mm512_mask_mov_epi32(kept, nan, all(0x7e00u));
  const __mmask16 lives = nearest != 0 ? 0xffff : _mm512_test_epi32_mask(kept, kept);
  store_halves(p, n, _mm512_or_si512(kept, _mm512_maskz_and_epi32(lives, _mm512_srli_epi32(bits, 16), all(0x8000u))));
}

// The random bits of 16 elements.
inline __m512i noise_16(uint32_t first, uint32_t a, uint32_t b) {
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i x = _mm512_add_epi32(places, all(first + a));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_mullo_epi32(x, all(0x21f0aaadu));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_add_epi32(x, all(b));
  x = _mm512_mullo_epi32(x, all(0xd35a2d97u));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
}

}  // namespace
#endif
