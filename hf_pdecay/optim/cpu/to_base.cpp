// The step of weights whose change from a base decays, see bases.py. Compiled together with update.cpp.

namespace {

// The largest divisor by which a change does not decay in a step.
constexpr double kHeld = 1 / (1 - 0x1p-20);

// The number next to `base`, above it if `up` and below it if not.
template <class P>
inline P next_to(P base, bool up) {
  using Bits = std::conditional_t<sizeof(P) == 8, uint64_t, std::conditional_t<sizeof(P) == 4, uint32_t, uint16_t>>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(P) - 1);
  const Bits bits = bit_cast<Bits>(base);
  if (load(base) == 0) return bit_cast<P>(static_cast<Bits>(up ? 1 : sign | 1));
  // The bits of numbers above 0 have the order of the numbers, those of numbers below 0 the opposite one.
  return bit_cast<P>(static_cast<Bits>(((bits & sign) == 0) == up ? bits + 1 : bits - 1));
}

// Stores a weight after the step, given that before decay, its change before the step, the divisor of that, and whether
// it is a zero to keep.
template <class P, class T>
inline void store_to_base(P& p, P base, T result, T before, T divisor, bool kept, uint32_t noise, uint32_t nearest) {
  const T wide = load(base);
  const bool held = divisor <= T(kHeld);
  T change = (result - wide) / divisor;
  change = std::fabs(change) < std::numeric_limits<T>::min() ? T(0) : change;
  P stored;
  store(stored, kept ? T(0) : held ? result : wide + change, noise, nearest);
  // What equals its base gets the bits of it, as zeros have two signs.
  if (load(stored) == wide) stored = held && before != T(0) ? next_to(base, before > T(0)) : base;
  p = stored;
}

// As update(): `before` has the changes before the step, and `divisor` theirs. In lanes those of single weights are
// computed on the way, and neither is read for them.
template <Decay kDecay, class P, class M, class T>
inline void update_to_base(P* __restrict p, const P* __restrict base, const P* __restrict g, M* __restrict m,
                           M* __restrict v, const T* __restrict before, const T* __restrict divisor, int n,
                           uint32_t first, const Scalars<T>& s) {
  constexpr bool kRounds = !std::is_same<P, T>::value || !std::is_same<M, T>::value;
  for (int i = 0; i < n; ++i) {
    const T weight = load(p[i]);
    T exp_avg = load(m[i]), exp_avg_sq = load(v[i]);
    const T result = stepped<std::is_same<M, float16>::value>(weight, load(g[i]), exp_avg, exp_avg_sq, s);
    const uint32_t noise = kRounds ? noise_at(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b) : 0;
    store_to_base(p[i], base[i], result, before[i], divisor[i], s.keep_zeros && weight == T(0), noise, s.nearest);
    store(m[i], exp_avg, noise ^ (noise >> 16), s.nearest);
    store(v[i], exp_avg_sq, noise >> 16, s.nearest);
  }
}

#if HF_PDECAY_LANES
template <Decay kDecay, class P, class M>
inline void update_to_base(P* __restrict p, const P* __restrict base, const P* __restrict g, M* __restrict m,
                           M* __restrict v, const float* __restrict before, const float* __restrict divisor, int n,
                           uint32_t first, const Scalars<float>& s) {
  constexpr bool kRounds = !std::is_same<P, float>::value || !std::is_same<M, float>::value;
  const __m512 zero = _mm512_setzero_ps(), limit = _mm512_set1_ps(static_cast<float>(kHeld));
  const __m512i exponent = all(0x7f800000u);
  for (int i = 0; i < n; i += 16) {
    const int left = n - i;
    // With a base there are more places to read from than a processor foresees by itself.
    if (kDecay == kElements) {
      PREFETCH(p + i + kPrefetch);
      PREFETCH(base + i + kPrefetch);
      PREFETCH(g + i + kPrefetch);
      PREFETCH(m + i + kPrefetch);
      PREFETCH(v + i + kPrefetch);
    }
    const __m512 weight = load_16(p + i, left), wide = load_16(base + i, left);
    const __m512 was = _mm512_sub_ps(weight, wide);
    const __m512 by = kDecay == kElements ? divisors_16(was, s) : load_16(divisor + i, left);
    __m512 exp_avg = load_16(m + i, left), exp_avg_sq = load_16(v + i, left);
    __m512 result = stepped_16<std::is_same<M, float16>::value>(weight, load_16(g + i, left), exp_avg, exp_avg_sq, s);
    const __mmask16 held = _mm512_cmp_ps_mask(by, limit, _CMP_LE_OQ);
    const __m512 change = _mm512_div_ps(_mm512_sub_ps(result, wide), by);
    const __mmask16 dead = _mm512_mask_testn_epi32_mask(static_cast<__mmask16>(~held), _mm512_castps_si512(change), exponent);
    result = _mm512_mask_add_ps(result, static_cast<__mmask16>(~held), wide, change);
    result = _mm512_mask_mov_ps(result, dead, wide);
    const __mmask16 kept = s.keep_zeros ? _mm512_cmp_ps_mask(weight, zero, _CMP_EQ_OQ) : __mmask16(0);
    result = _mm512_mask_mov_ps(result, kept, zero);
    const __m512i noise = kRounds ? noise_16(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b) : all(0);
    const __m512i high = _mm512_srli_epi32(noise, 16);
    store_16(p + i, left, result, noise, s.nearest);
    store_16(m + i, left, exp_avg, _mm512_xor_si512(noise, high), s.nearest);
    store_16(v + i, left, exp_avg_sq, high, s.nearest);
    // What is left are changes that were rounded to 0 though they live, and bases of -0 where a 0 is stored.
    const __mmask16 lives = _mm512_mask_cmp_ps_mask(held, was, zero, _CMP_NEQ_OQ);
    const __m512 stored = std::is_same<P, float>::value ? result : load_16(p + i, left);
    const __mmask16 same = _mm512_cmp_ps_mask(stored, wide, _CMP_EQ_OQ);
    const __mmask16 lost = lives & same;
    const __mmask16 minus = _mm512_mask_test_epi32_mask(
        _mm512_mask_cmp_ps_mask(same, wide, zero, _CMP_EQ_OQ), _mm512_castps_si512(wide), all(0x80000000u));
    const unsigned ups = _mm512_cmp_ps_mask(was, zero, _CMP_GT_OQ);
    for (unsigned rest = (lost | minus) & first_of_16(left), k = 0; rest != 0; rest >>= 1, ++k) {
      if (rest & 1) p[i + k] = lost >> k & 1 ? next_to(base[i + k], ups >> k & 1) : base[i + k];
    }
  }
}
#endif

}  // namespace
