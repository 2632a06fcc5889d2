// The divisors of weights, and of norms of units. Compiled together with weights.cpp.

namespace {

constexpr int kBlock = 64;  // elements whose divisors are computed together: they stay in registers and L1
constexpr int kPrefetch = 4 * kBlock;  // how far ahead of a block memory is asked for

// 1 / factor = 1 + α λ_p |w|^-x for every p, as s / (s + α λ_p) with s = |w|^x and x = 2 - p.
template <class T>
struct Power {
  T x, alpha_lambda, at_zero;  // at_zero: the divisor of a weight of 0
  bool drawn;                  // whether near 0 all are above 1, and that of 0 is infinite
  T c[7];                      // -x log2(m) for m in [1, 2], plus log2(α λ_p)
};

// log2(m) on [1, 2] within 1.9e-6, a minimax fit.
constexpr double kLog2[7] = {-3.04004001, 6.11296199, -5.34198721, 3.28652693, -1.26691731, 0.27514851, -0.02569106};

// 2^r on [-1/2, 1/2] within 2.7e-6.
constexpr float kExp2[5] = {1.0f, 0.6931210160255432f, 0.2402186542749405f, 0.055922023952007294f,
                            0.009685706347227097f};

// `tiny` is the least α λ_p that is felt: with less `decays` becomes false and all divisors would be 1.
template <class T>
Power<T> power_of(double p_norm, double alpha_lambda, bool keep_zeros, double tiny, bool* decays) {
  const double x = 2 - p_norm, infinity = std::numeric_limits<double>::infinity();
  *decays = alpha_lambda >= tiny;
  Power<T> power;
  power.x = static_cast<T>(x);
  power.alpha_lambda = static_cast<T>(alpha_lambda);
  power.at_zero = static_cast<T>(p_norm < 2 || keep_zeros ? infinity : p_norm == 2 ? 1 + alpha_lambda : 1.0);
  // A weight that a step leaves below the least normal number was below 2^-102 before it, by the spacing of numbers.
  power.drawn = x > 0 && std::log2(alpha_lambda) + 102 * x > -22;
  for (int k = 0; k < 7; ++k) power.c[k] = static_cast<T>(-x * kLog2[k]);
  power.c[0] = static_cast<T>(-x * kLog2[0] + (*decays ? std::log2(alpha_lambda) : 0.0));
  return power;
}

#if HF_PDECAY_LANES
// The divisors of 16 weights. The processor takes exponents and mantissas apart, and puts them together, by instructions
// that no compiler makes of the loops below and that need no limits.
inline __m512 divisors_16(__m512 w, const Power<float>& s) {
  const __m512 m = _mm512_getmant_ps(w, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  __m512 y = _mm512_set1_ps(s.c[6]);
  for (int k = 5; k >= 0; --k) y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(s.c[k]));
  y = _mm512_fnmadd_ps(_mm512_set1_ps(s.x), _mm512_getexp_ps(w), y);
  const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT);  // y less the nearest integer; 0 where y is infinite
  __m512 z = _mm512_set1_ps(kExp2[4]);
  for (int k = 3; k >= 0; --k) z = _mm512_fmadd_ps(z, r, _mm512_set1_ps(kExp2[k]));
  const __m512 divisor = _mm512_add_ps(_mm512_scalef_ps(z, _mm512_sub_ps(y, r)), _mm512_set1_ps(1.0f));
  if (s.drawn) return divisor;
  const __mmask16 zero = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_mask_blend_ps(zero, divisor, _mm512_set1_ps(s.at_zero));
}

template <class P>
inline void divisors(const P* __restrict p, int n, const Power<float>& s, float* __restrict divisor) {
  for (int i = 0; i < n; i += 16) _mm512_storeu_ps(divisor + i, divisors_16(load_16(p + i, n - i), s));
}
#else
// log2(α λ_p |w|^-x) of a magnitude, whose exponent is read from its bits. Finite also for 0.
inline float log_ratio(float magnitude, const Power<float>& s) {
  // Subnormal numbers have no exponent of their own: 2^24 times larger they do.
  const bool subnormal = magnitude < 1.17549435e-38f;
  const int32_t bits = bit_cast<int32_t>(magnitude * (subnormal ? 16777216.0f : 1.0f));
  const float exponent = static_cast<float>((bits - ((subnormal ? 151 : 127) << 23)) >> 23);
  const float m = bit_cast<float>((bits & 0x7fffff) | 0x3f800000);
  float y = s.c[6];
  y = fma(y, m, s.c[5]);
  y = fma(y, m, s.c[4]);
  y = fma(y, m, s.c[3]);
  y = fma(y, m, s.c[2]);
  y = fma(y, m, s.c[1]);
  y = fma(y, m, s.c[0]);
  return fma(-s.x, exponent, y);
}

// 2^y, for y below -126 too, where 1 + 2^y is 1, and infinity from 128 on.
inline float exp2_of(float y) {
  y = y > -126.0f ? y : -126.0f;
  y = y < 128.0f ? y : 128.0f;
  const float shifted = y + 12582912.0f;  // 1.5 · 2^23: the nearest integer is in the last bits
  const float r = y - (shifted - 12582912.0f);
  float z = kExp2[4];
  z = fma(z, r, kExp2[3]);
  z = fma(z, r, kExp2[2]);
  z = fma(z, r, kExp2[1]);
  z = fma(z, r, kExp2[0]);
  return bit_cast<float>(bit_cast<int32_t>(z) + (bit_cast<int32_t>(shifted) << 23));
}

// The divisors of a block of weights. Short loops, each with few constants, run faster than one long one.
template <class P>
inline void divisors(const P* __restrict p, int n, const Power<float> s, float* __restrict divisor) {
#pragma omp simd
  for (int i = 0; i < n; ++i) divisor[i] = log_ratio(std::fabs(load(p[i])), s);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float ratio = 1.0f + exp2_of(divisor[i]);
    divisor[i] = load(p[i]) == 0.0f ? s.at_zero : ratio;
  }
}
#endif

inline void divisors(const double* p, int n, const Power<double>& s, double* divisor) {
  for (int i = 0; i < n; ++i) {
    const double magnitude = std::fabs(p[i]);
    divisor[i] = magnitude == 0 ? s.at_zero : 1 + s.alpha_lambda * std::pow(magnitude, -s.x);
  }
}

}  // namespace
