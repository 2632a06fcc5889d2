// AdamW's step and the division by what divisors.cpp computes, on a run of elements. Compiled together with weights.cpp,
// lanes.cpp and divisors.cpp.

namespace {

enum Decay { kNone, kElements, kUnits, kByFour };

// What the elements of a tensor share.
template <class T>
struct Scalars : Power<T> {
  T beta1, weight1, beta2, weight2, scale2, eps, least, step_size, shrink_l2;
  bool keep_zeros;
  uint32_t nearest;
  uint32_t noise_a, noise_b;
};

#if HF_PDECAY_LANES
template <class T>
constexpr bool kInLanes = std::is_same<T, float>::value;
#else
template <class T>
constexpr bool kInLanes = false;
#endif

// AdamW's step of one weight, which it returns; the moments change in place.
template <bool kHalf, class T>
inline T stepped(T weight, T grad, T& exp_avg, T& exp_avg_sq, const Scalars<T>& s) {
  exp_avg = fma(s.weight1, grad, exp_avg * s.beta1);
  exp_avg_sq = fma(s.weight2 * grad, grad, exp_avg_sq * s.beta2);
  if (kHalf) {
    // The square of a finite gradient may be beyond float16; that of an infinite one is.
    const T most = std::fabs(grad) <= T(65504) ? T(65504) : T(INFINITY);
    exp_avg_sq = exp_avg_sq > most ? most : exp_avg_sq;
  }
  T denominator = fma(std::sqrt(exp_avg_sq), s.scale2, s.eps);
  if (kHalf) denominator = denominator < s.least ? s.least : denominator;
  return fma(weight, s.shrink_l2, -(s.step_size * exp_avg) / denominator);
}

#if HF_PDECAY_LANES
template <bool kHalf>
inline __m512 stepped_16(__m512 weight, __m512 grad, __m512& exp_avg, __m512& exp_avg_sq, const Scalars<float>& s) {
  exp_avg = _mm512_mul_ps(exp_avg, _mm512_set1_ps(s.beta1));
  exp_avg_sq = _mm512_mul_ps(exp_avg_sq, _mm512_set1_ps(s.beta2));
  exp_avg = _mm512_fmadd_ps(_mm512_set1_ps(s.weight1), grad, exp_avg);
  exp_avg_sq = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(s.weight2), grad), grad, exp_avg_sq);
  if (kHalf) {
    const __m512 largest = _mm512_set1_ps(65504.0f), size = _mm512_abs_ps(grad);
    const __mmask16 finite = _mm512_cmp_ps_mask(size, largest, _CMP_LE_OQ);
    const __m512 most = _mm512_mask_blend_ps(finite, _mm512_set1_ps(INFINITY), largest);
    exp_avg_sq = _mm512_min_ps(most, exp_avg_sq);  // if one of two numbers is NaN it takes the second
  }
  __m512 denominator = _mm512_fmadd_ps(_mm512_sqrt_ps(exp_avg_sq), _mm512_set1_ps(s.scale2), _mm512_set1_ps(s.eps));
  if (kHalf) denominator = _mm512_max_ps(_mm512_set1_ps(s.least), denominator);
  const __m512 moved = _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(-s.step_size), exp_avg), denominator);
  return _mm512_fmadd_ps(weight, _mm512_set1_ps(s.shrink_l2), moved);
}
#endif

// Up to kBlock elements. Each is divided by its divisor, if they decay at all; in lanes those of single weights are
// computed on the way, and `divisor` is not read for them.
template <Decay kDecay, class P, class M, class T>
inline void update(P* __restrict p, const P* __restrict g, M* __restrict m, M* __restrict v, const T* __restrict divisor,
                   int n, uint32_t first, const Scalars<T> s) {
  constexpr bool kRounds = !std::is_same<P, T>::value || !std::is_same<M, T>::value;
  constexpr bool kHalf = std::is_same<M, float16>::value;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const T weight = load(p[i]);
    T exp_avg = load(m[i]), exp_avg_sq = load(v[i]);
    T result = stepped<kHalf>(weight, load(g[i]), exp_avg, exp_avg_sq, s);
    if (kDecay != kNone) {
      result = result / divisor[i];
      // A weight that dies through subnormal numbers is 0, at once: processors are slow to multiply those. -0 becomes 0.
      const T least = divisor[i] > T(1) ? std::numeric_limits<T>::min() : T(0);
      result = std::fabs(result) < least ? T(0) : result + T(0);
    } else if (s.keep_zeros) {
      result = weight == T(0) ? T(0) : result;
    }
    const uint32_t noise = kRounds ? noise_at(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b) : 0;
    store(p[i], result, noise, s.nearest);
    store(m[i], exp_avg, noise ^ (noise >> 16), s.nearest);
    store(v[i], exp_avg_sq, noise >> 16, s.nearest);
  }
}

#if HF_PDECAY_LANES
template <Decay kDecay, class P, class M>
inline void update(P* __restrict p, const P* __restrict g, M* __restrict m, M* __restrict v,
                   const float* __restrict divisor, int n, uint32_t first, const Scalars<float> s) {
  constexpr bool kRounds = !std::is_same<P, float>::value || !std::is_same<M, float>::value;
  constexpr bool kHalf = std::is_same<M, float16>::value;
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  const __m512i exponent = all(0x7f800000u);
  for (int i = 0; i < n; i += 16) {
    const int left = n - i;
    const __m512 weight = load_16(p + i, left);
    __m512 exp_avg = load_16(m + i, left), exp_avg_sq = load_16(v + i, left);
    __m512 result = stepped_16<kHalf>(weight, load_16(g + i, left), exp_avg, exp_avg_sq, s);
    if (kDecay != kNone) {
      const __m512 by = kDecay == kElements ? divisors_16(weight, s) : load_16(divisor + i, left);
      result = _mm512_div_ps(result, by);
      if (kDecay == kElements && s.drawn) {
        result = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(_mm512_castps_si512(result), exponent), result);
      } else {
        const __mmask16 shrunk = _mm512_cmp_ps_mask(by, one, _CMP_GT_OQ);
        const __mmask16 dead = _mm512_mask_testn_epi32_mask(shrunk, _mm512_castps_si512(result), exponent);
        result = _mm512_maskz_add_ps(static_cast<__mmask16>(~dead), result, zero);
      }
    } else if (s.keep_zeros) {
      result = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight, zero, _CMP_NEQ_UQ), result);
    }
    const __m512i noise = kRounds ? noise_16(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b) : all(0);
    const __m512i high = _mm512_srli_epi32(noise, 16);
    store_16(p + i, left, result, noise, s.nearest);
    store_16(m + i, left, exp_avg, _mm512_xor_si512(noise, high), s.nearest);
    store_16(v + i, left, exp_avg_sq, high, s.nearest);
  }
}
#endif

}  // namespace
