// Product of rows of activations with a weight whose zeros a bitmask marks: y = x Wᵀ + b, for bitmask_linear.py.
//
//   - A bit for each weight says whether it is there; those that are lie packed, row by row. The time for a few rows of x
//     is that of reading both from memory.
//   - A vector of packed values is spread over the places of its bits by one instruction (vpexpand), or by a table of
//     shuffles where there is none, and then meets the rows of x.
//   - int8 values have a scale for each block of 64, 128 or 256 columns. They meet x in 16 bits, as two unsigned bytes, in sums of
//     32 bits (vpdpbusd): the error is that of the weights alone. Processors without that instruction multiply them by x
//     in float32.
//   - For many rows of x, blocks of rows of W are made dense, small enough for the caches, for torch's own product.
//
// It follows values.cpp.

namespace {
namespace bitmask {

constexpr int kWord = 64;  // weights of a word of the mask
constexpr int kBlock = 4;  // words of the largest block of int8 values: sums of 32 bits cannot overflow

struct Packed {
  const uint64_t* masks;  // [out][words]; null if no value is zero: then each row has 64 * words values
  const int64_t* starts;  // [out]: where the values of each row begin
  const void* values;     // 64 bytes beyond the last can be read
  const float* scales;    // [out][blocks], of int8 values
  const float* shifts;    // [out]: 32768 times the sum of a row, of int8 values
  const float* bias;      // [out], or null
  int64_t out, in, words;
  int64_t block;  // words that share a scale

  const float* scales_of(int64_t row) const { return scales + row * ((words + block - 1) / block); }
};

inline int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

#if defined(__AVX512F__)

struct Lanes {
  static constexpr int kWidth = 16;
  typedef __m512 Vector;
  static Vector zero() { return _mm512_setzero_ps(); }
  template <Kind kind>
  static Vector expand(const void* p, uint32_t bits) {
    const __mmask16 mask = static_cast<__mmask16>(bits);
    if constexpr (kind == kFloat32) {
      return _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(p));
    } else if constexpr (kind == kInt8) {
      const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
      return _mm512_maskz_expand_ps(mask, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    } else {
      const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(p));
      if constexpr (kind == kFloat16) return _mm512_maskz_expand_ps(mask, _mm512_cvtph_ps(halves));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
      return _mm512_castsi512_ps(_mm512_maskz_expand_epi32(mask, wide));
    }
  }
  static Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* y, Vector v) { _mm512_storeu_ps(y, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector times(Vector a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
  static float sum(Vector v) { return _mm512_reduce_add_ps(v); }
};

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// For each mask of 8 places the value that goes to each; a negative number where none does.
struct Table {
  alignas(64) int8_t places[256][8];
  constexpr Table() : places() {
    for (int mask = 0; mask < 256; mask++)
      for (int place = 0, next = 0; place < 8; place++) places[mask][place] = mask >> place & 1 ? next++ : -1;
  }
};
constexpr Table kTable;

struct Lanes {
  static constexpr int kWidth = 8;
  typedef __m256 Vector;
  static Vector zero() { return _mm256_setzero_ps(); }
  template <Kind kind>
  static Vector expand(const void* p, uint32_t bits) {
    Vector v;
    if constexpr (kind == kFloat32) v = _mm256_loadu_ps(static_cast<const float*>(p));
    if constexpr (kind == kInt8)
      v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
    if constexpr (kind == kFloat16) v = _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    if constexpr (kind == kBfloat16) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
      v = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    const void* line = kTable.places[bits];
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(line)));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v, places), zero(), _mm256_castsi256_ps(places));
  }
  static Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* y, Vector v) { _mm256_storeu_ps(y, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector times(Vector a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
  static float sum(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#elif defined(__aarch64__)

// For each mask of 4 places the bytes of the value that goes to each; 255, which gives zero, where none does.
struct Table {
  alignas(64) uint8_t places[16][16];
  constexpr Table() : places() {
    for (int mask = 0; mask < 16; mask++)
      for (int place = 0, next = 0; place < 4; place++) {
        const bool there = mask >> place & 1;
        for (int byte = 0; byte < 4; byte++)
          places[mask][4 * place + byte] = static_cast<uint8_t>(there ? 4 * next + byte : 255);
        next += there;
      }
  }
};
constexpr Table kTable;

struct Lanes {
  static constexpr int kWidth = 4;
  typedef float32x4_t Vector;
  static Vector zero() { return vdupq_n_f32(0); }
  template <Kind kind>
  static Vector expand(const void* p, uint32_t bits) {
    Vector v;
    if constexpr (kind == kFloat32) v = vld1q_f32(static_cast<const float*>(p));
    if constexpr (kind == kBfloat16)
      v = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(p)), 16));
    if constexpr (kind == kFloat16) v = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p))));
    if constexpr (kind == kInt8) {
      uint32_t four;
      std::memcpy(&four, p, 4);
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
      v = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), vld1q_u8(kTable.places[bits])));
  }
  static Vector load(const float* x) { return vld1q_f32(x); }
  static void store(float* y, Vector v) { vst1q_f32(y, v); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector times(Vector a, float b) { return vmulq_n_f32(a, b); }
  static float sum(Vector v) { return vaddvq_f32(v); }
};

#else

struct Lanes {
  static constexpr int kWidth = 1;
  typedef float Vector;
  static Vector zero() { return 0; }
  template <Kind kind>
  static Vector expand(const void* p, uint32_t bits) {
    return bits ? value_at<kind>(p, 0) : 0.0f;
  }
  static Vector load(const float* x) { return *x; }
  static void store(float* y, Vector v) { *y = v; }
  static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  static Vector add(Vector a, Vector b) { return a + b; }
  static Vector times(Vector a, float b) { return a * b; }
  static float sum(Vector v) { return v; }
};

#endif

// Spreads the vectors of a row of W one after the other.
template <Kind kind>
class Row {
 public:
  Row() = default;
  Row(const Packed& w, int64_t row)
      : masks_(w.masks ? w.masks + row * w.words : nullptr),
        values_(static_cast<const char*>(w.values) + w.starts[row] * bytes_of<kind>),
        scales_(kind == kInt8 ? w.scales_of(row) : nullptr),
        block_(w.block) {}

  void begin(int64_t word) {
    mask_ = masks_ ? masks_[word] : ~uint64_t{0};
    if constexpr (kind == kInt8) scale_ = scales_[word / block_];
  }
  typename Lanes::Vector vector(int place) const {
    constexpr uint32_t kBits = (1u << Lanes::kWidth) - 1;
    const int before = place ? count_bits(mask_ << (kWord - place)) : 0;
    const uint32_t bits = static_cast<uint32_t>(mask_ >> place) & kBits;
    const typename Lanes::Vector v = Lanes::expand<kind>(values_ + before * bytes_of<kind>, bits);
    if constexpr (kind == kInt8) return Lanes::times(v, scale_);
    return v;
  }
  void end() { values_ += count_bits(mask_) * bytes_of<kind>; }

  uint64_t mask() const { return mask_; }
  const char* values() const { return values_; }

 private:
  const uint64_t* masks_;
  const char* values_;
  const float* scales_;
  int64_t block_ = 1;
  uint64_t mask_ = 0;
  float scale_ = 1;
};

// Rows of W and of x that meet in registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kOut = 2, kMost = 4;
#else
constexpr int kOut = 4, kMost = 6;
#endif

// Each tile says in which form it takes x, and multiplies kRows rows of it, up to kWidth, by kHeight rows of W.
template <Kind kind>
struct Floats {
  typedef float Number;
  static constexpr int kHeight = kOut, kWidth = kMost;
  static int64_t stride(const Packed& w) { return w.words * kWord; }

  static bool lay_out(const Packed& w, const float* x, float* to, float*) {
    std::memcpy(to, x, sizeof(float) * w.in);
    std::memset(to + w.in, 0, sizeof(float) * (stride(w) - w.in));
    return true;
  }

  template <int kRows>
  static void multiply(const Packed& w, const int64_t* rows, const float* x, const float*, float results[][kMost]) {
    typename Lanes::Vector sums[kHeight][kRows];
    Row<kind> of[kHeight];
    for (int o = 0; o < kHeight; o++) {
      of[o] = Row<kind>(w, rows[o]);
      for (int i = 0; i < kRows; i++) sums[o][i] = Lanes::zero();
    }
    for (int64_t word = 0; word < w.words; word++) {
      for (int o = 0; o < kHeight; o++) of[o].begin(word);
#pragma GCC unroll 4
      for (int place = 0; place < kWord; place += Lanes::kWidth) {
        typename Lanes::Vector v[kHeight];
#pragma GCC unroll 4
        for (int o = 0; o < kHeight; o++) v[o] = of[o].vector(place);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
          const typename Lanes::Vector columns = Lanes::load(x + i * stride(w) + word * kWord + place);
#pragma GCC unroll 4
          for (int o = 0; o < kHeight; o++) sums[o][i] = Lanes::fma(v[o], columns, sums[o][i]);
        }
      }
      for (int o = 0; o < kHeight; o++) of[o].end();
    }
    for (int o = 0; o < kHeight; o++)
      for (int i = 0; i < kRows; i++) results[o][i] = Lanes::sum(sums[o][i]);
  }
};

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
#define HF_PDECAY_WORDS

// bfloat16, 32 at a time: of each 32 columns of x, those of even number come first.
template <>
struct Floats<kBfloat16> {
  typedef float Number;
  static constexpr int kHeight = kOut, kWidth = kMost;
  static int64_t stride(const Packed& w) { return w.words * kWord; }

  static bool lay_out(const Packed& w, const float* x, float* to, float*) {
    int64_t j = 0;
    for (; j + 32 <= w.in; j += 32)
      for (int k = 0; k < 16; k++) {
        to[j + k] = x[j + 2 * k];
        to[j + 16 + k] = x[j + 2 * k + 1];
      }
    std::memset(to + j, 0, sizeof(float) * (stride(w) - j));
    for (int64_t k = j; k < w.in; k++) to[j + (k - j) / 2 + (k % 2 ? 16 : 0)] = x[k];
    return true;
  }

  template <int kRows>
  static void multiply(const Packed& w, const int64_t* rows, const float* x, const float*, float results[][kMost]) {
    __m512 sums[kHeight][kRows];
    Row<kBfloat16> of[kHeight];
    for (int o = 0; o < kHeight; o++) {
      of[o] = Row<kBfloat16>(w, rows[o]);
      for (int i = 0; i < kRows; i++) sums[o][i] = _mm512_setzero_ps();
    }
    const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int64_t word = 0; word < w.words; word++) {
      for (int o = 0; o < kHeight; o++) of[o].begin(word);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512 even[kHeight], odd[kHeight];
#pragma GCC unroll 4
        for (int o = 0; o < kHeight; o++) {
          const char* values = of[o].values() + 2 * half * count_bits(of[o].mask() & 0xffffffffu);
          const __mmask32 mask = static_cast<__mmask32>(of[o].mask() >> 32 * half);
          const __m512i v = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
          even[o] = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
          odd[o] = _mm512_castsi512_ps(_mm512_and_si512(v, high));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
          const float* columns = x + i * stride(w) + word * kWord + 32 * half;
          const __m512 of_even = _mm512_loadu_ps(columns), of_odd = _mm512_loadu_ps(columns + 16);
#pragma GCC unroll 4
          for (int o = 0; o < kHeight; o++)
            sums[o][i] = _mm512_fmadd_ps(odd[o], of_odd, _mm512_fmadd_ps(even[o], of_even, sums[o][i]));
        }
      }
      for (int o = 0; o < kHeight; o++) of[o].end();
    }
    for (int o = 0; o < kHeight; o++)
      for (int i = 0; i < kRows; i++) results[o][i] = _mm512_reduce_add_ps(sums[o][i]);
  }
};
#endif

#if defined(HF_PDECAY_WORDS) && defined(__AVX512BF16__)
#define HF_PDECAY_PAIRS

// bfloat16 values for an x that bfloat16 holds: pairs of products go into sums of float32.
struct Pairs {
  typedef uint16_t Number;
  static constexpr int kHeight = kOut, kWidth = kMost;
  static int64_t stride(const Packed& w) { return w.words * kWord; }

  static bool lay_out(const Packed& w, const float* x, uint16_t* to, float*) {
    for (int64_t j = 0; j < w.in; j++) to[j] = static_cast<uint16_t>(to_bits(x[j]) >> 16);
    std::memset(to + w.in, 0, sizeof(uint16_t) * (stride(w) - w.in));
    return true;
  }

  template <int kRows>
  static void multiply(const Packed& w, const int64_t* rows, const uint16_t* x, const float*, float results[][kMost]) {
    __m512 sums[kHeight][kRows];
    Row<kBfloat16> of[kHeight];
    for (int o = 0; o < kHeight; o++) {
      of[o] = Row<kBfloat16>(w, rows[o]);
      for (int i = 0; i < kRows; i++) sums[o][i] = _mm512_setzero_ps();
    }
    for (int64_t word = 0; word < w.words; word++) {
      for (int o = 0; o < kHeight; o++) of[o].begin(word);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        __m512bh v[kHeight];
#pragma GCC unroll 4
        for (int o = 0; o < kHeight; o++) {
          const char* values = of[o].values() + 2 * half * count_bits(of[o].mask() & 0xffffffffu);
          const __mmask32 mask = static_cast<__mmask32>(of[o].mask() >> 32 * half);
          v[o] = (__m512bh)_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
          const __m512bh columns = (__m512bh)_mm512_loadu_si512(x + i * stride(w) + word * kWord + 32 * half);
#pragma GCC unroll 4
          for (int o = 0; o < kHeight; o++) sums[o][i] = _mm512_dpbf16_ps(sums[o][i], v[o], columns);
        }
      }
      for (int o = 0; o < kHeight; o++) of[o].end();
    }
    for (int o = 0; o < kHeight; o++)
      for (int i = 0; i < kRows; i++) results[o][i] = _mm512_reduce_add_ps(sums[o][i]);
  }
};
#endif

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define HF_PDECAY_BYTES

// int8: x in 16 bits is 256 * (high - 128) + low; of each 64 columns the high bytes come first.
template <int kTall, int kWide, bool kMasked>
struct Bytes {
  typedef uint8_t Number;
  static constexpr int kHeight = kTall, kWidth = kWide;
  static int64_t stride(const Packed& w) { return 2 * w.words * kWord; }

  // Returns false if a value of x is NaN or infinite, or all are tiny: 16 bits cannot say so.
  static bool lay_out(const Packed& w, const float* x, uint8_t* to, float* scale) {
    uint32_t greatest = 0;  // the bits of magnitudes have their order, and those of infinity and NaN are the greatest
    for (int64_t j = 0; j < w.in; j++) greatest = std::max(greatest, to_bits(x[j]) & 0x7fffffffu);
    const float most = from_bits(greatest), inverse = most > 0 ? 32767 / most : 0.0f;
    if (greatest >= 0x7f800000u || !std::isfinite(inverse)) return false;
    *scale = most / 32767;
    std::memset(to, 0, stride(w));
    for (int64_t j = 0; j < w.in; j += kWord) {
      const int64_t count = std::min<int64_t>(kWord, w.in - j);
      for (int64_t k = 0; k < count; k++) {
        const int32_t whole = static_cast<int32_t>(std::nearbyint(x[j + k] * inverse)) + 32768;
        to[2 * j + k] = static_cast<uint8_t>(whole >> 8);
        to[2 * j + kWord + k] = static_cast<uint8_t>(whole);
      }
    }
    return true;
  }

  template <int kRows>
  static void multiply(const Packed& w, const int64_t* rows, const uint8_t* x, const float* x_scales,
                       float results[][kMost]) {
    __m512 sums[kHeight][kRows];
    const uint64_t* masks[kHeight];
    const char* values[kHeight];
    const float* scales[kHeight];
    for (int o = 0; o < kHeight; o++) {
      masks[o] = kMasked ? w.masks + rows[o] * w.words : nullptr;
      values[o] = static_cast<const char*>(w.values) + w.starts[rows[o]];
      scales[o] = w.scales_of(rows[o]);
      for (int i = 0; i < kRows; i++) sums[o][i] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < w.words; first += w.block) {
      const int64_t last = std::min<int64_t>(first + w.block, w.words);
      __m512i high[kHeight][kRows], low[kHeight][kRows];
      for (int o = 0; o < kHeight; o++)
        for (int i = 0; i < kRows; i++) high[o][i] = low[o][i] = _mm512_setzero_si512();
      for (int64_t word = first; word < last; word++) {
        __m512i v[kHeight];
#pragma GCC unroll 4
        for (int o = 0; o < kHeight; o++) {
          v[o] = _mm512_loadu_si512(values[o]);
          if constexpr (kMasked) {
            const uint64_t mask = masks[o][word];
            v[o] = _mm512_maskz_expand_epi8(mask, v[o]);
            values[o] += count_bits(mask);
          } else {
            values[o] += kWord;
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
          const uint8_t* columns = x + i * stride(w) + 2 * word * kWord;
          const __m512i of_high = _mm512_loadu_si512(columns), of_low = _mm512_loadu_si512(columns + kWord);
#pragma GCC unroll 4
          for (int o = 0; o < kHeight; o++) {
            high[o][i] = _mm512_dpbusd_epi32(high[o][i], of_high, v[o]);
            low[o][i] = _mm512_dpbusd_epi32(low[o][i], of_low, v[o]);
          }
        }
      }
#pragma GCC unroll 4
      for (int o = 0; o < kHeight; o++) {
        const __m512 scale = _mm512_set1_ps(*scales[o]++);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[o][i], 8), low[o][i]);
          sums[o][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[o][i]);
        }
      }
    }
    for (int o = 0; o < kHeight; o++)
      for (int i = 0; i < kRows; i++)
        results[o][i] = (_mm512_reduce_add_ps(sums[o][i]) - w.shifts[rows[o]]) * x_scales[i];
  }
};
#endif

// Multiplies all rows of x, laid out in scratch; returns false, having written nothing, if a tile cannot take them.
template <typename Tile>
bool multiply_all(const Packed& w, const float* x, int64_t count, float* y, void* scratch, int threads) {
  typedef typename Tile::Number Number;
  const int64_t stride = Tile::stride(w);
  const bool alone = threads == 1 || w.out * w.in * count < (1 << 16);
  Number* laid_out = static_cast<Number*>(scratch);
  const int64_t room = (count + kMost - 1) / kMost * kMost;
  std::vector<float> x_scales(room, 0.0f);
  bool taken = true;
#pragma omp parallel for num_threads(threads) schedule(static) if (!alone && count > 1)
  for (int64_t i = 0; i < count; i++)
    if (!Tile::lay_out(w, x + i * w.in, laid_out + i * stride, &x_scales[i])) {
#pragma omp atomic write
      taken = false;
    }
  if (!taken) return false;
  std::memset(laid_out + count * stride, 0, sizeof(Number) * (room - count) * stride);
  const int64_t parts = std::min<int64_t>(w.out, 8 * threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (!alone)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = w.out * part / parts, end = w.out * (part + 1) / parts;
    const int64_t lines = (end - begin + Tile::kHeight - 1) / Tile::kHeight;
    for (int64_t line = 0; line < lines; line++) {
      // Rows of W that lie far apart. Each continues where the one before it ended, so the processor reads ahead of all.
      // If a part has no more rows, the last row is computed again.
      int64_t rows[Tile::kHeight];
      for (int o = 0; o < Tile::kHeight; o++) rows[o] = std::min(begin + o * lines + line, end - 1);
      for (int64_t first = 0; first < count; first += kMost) {
        const int64_t here = std::min<int64_t>(kMost, count - first);
        const Number* block = laid_out + first * stride;
        float results[Tile::kHeight][kMost];
        const float* scales = &x_scales[first];
        if (here == 1)
          Tile::template multiply<1>(w, rows, block, scales, results);
        else if (here == 2)
          Tile::template multiply<std::min(2, Tile::kWidth)>(w, rows, block, scales, results);
        else if (here <= 4)
          Tile::template multiply<std::min(4, Tile::kWidth)>(w, rows, block, scales, results);
        else
          Tile::template multiply<Tile::kWidth>(w, rows, block, scales, results);
        for (int o = 0; o < Tile::kHeight; o++)
          for (int64_t i = 0; i < here; i++)
            y[(first + i) * w.out + rows[o]] = results[o][i] + (w.bias ? w.bias[rows[o]] : 0.0f);
      }
    }
  }
  return true;
}

#ifdef HF_PDECAY_BYTES
// More rows of W are in flight the fewer rows of x leave room for them in registers.
template <bool kMasked>
bool multiply_bytes(const Packed& w, const float* x, int64_t count, float* y, void* scratch, int threads) {
  if (count == 1) return multiply_all<Bytes<4, 1, kMasked>>(w, x, count, y, scratch, threads);
  if (count <= 4) return multiply_all<Bytes<2, 4, kMasked>>(w, x, count, y, scratch, threads);
  return multiply_all<Bytes<1, kMost, kMasked>>(w, x, count, y, scratch, threads);
}
#endif

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One row of W as `in` dense numbers.
template <Kind kind, Kind to>
void dense_row(const Packed& w, int64_t row, float* scratch, void* y) {
#ifdef HF_PDECAY_WORDS
  if constexpr (kind == to && bytes_of<kind> == 2) {
    const uint64_t* masks = w.masks ? w.masks + row * w.words : nullptr;
    const uint16_t* values = static_cast<const uint16_t*>(w.values) + w.starts[row];
    for (int64_t place = 0; place < w.in; place += 32) {
      const uint32_t mask = masks ? static_cast<uint32_t>(masks[place / kWord] >> place % kWord) : ~uint32_t{0};
      const __m512i v = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
      const uint32_t there = w.in - place >= 32 ? ~uint32_t{0} : (1u << (w.in - place)) - 1;
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(y) + place, there, v);
      values += count_bits(mask);
    }
    return;
  }
#endif
  const bool straight = to == kFloat32 && w.in % kWord == 0;
  float* floats = straight ? static_cast<float*>(y) : scratch;
  Row<kind> of(w, row);
  for (int64_t word = 0; word < w.words; word++) {
    of.begin(word);
#pragma GCC unroll 4
    for (int place = 0; place < kWord; place += Lanes::kWidth)
      Lanes::store(floats + word * kWord + place, of.vector(place));
    of.end();
  }
  if (straight) return;
  if constexpr (to == kFloat32) std::memcpy(y, floats, sizeof(float) * w.in);
  if constexpr (to == kBfloat16)
    for (int64_t j = 0; j < w.in; j++) static_cast<uint16_t*>(y)[j] = to_bfloat16(floats[j]);
}

}  // namespace bitmask
}  // namespace

extern "C" {

// The rows of x that meet together: scratch has room for a multiple of them.
int hf_pdecay_bitmask_rows() { return bitmask::kMost; }

// Results of some rows of x; `pairs`: bfloat16 holds x. Scratch has room for 64 * words floats for each row.
void hf_pdecay_bitmask_product(int kind, const uint64_t* masks, const int64_t* starts, const void* values,
                               const float* scales, const float* shifts, const float* bias, int64_t out, int64_t in,
                               int64_t block, const float* x, [[maybe_unused]] int pairs, int64_t count, float* y, float* scratch, int threads) {
  using namespace bitmask;
  const Packed w{masks, starts, values, scales, shifts, bias, out, in, (in + kWord - 1) / kWord, block};
#ifdef HF_PDECAY_PAIRS
  if (kind == kBfloat16 && pairs) {
    multiply_all<Pairs>(w, x, count, y, scratch, threads);
    return;
  }
#endif
#ifdef HF_PDECAY_BYTES
  if (kind == kInt8 && (masks ? multiply_bytes<true>(w, x, count, y, scratch, threads)
                              : multiply_bytes<false>(w, x, count, y, scratch, threads)))
    return;
#endif
  for_kind(kind, [&](auto of) { multiply_all<Floats<of.value>>(w, x, count, y, scratch, threads); });
}

// Rows first to last of W, dense, in float32 or bfloat16, of int8 values multiplied by their scales; scratch has room for
// threads * words * 64 floats.
void hf_pdecay_bitmask_dense(int kind, int to, const uint64_t* masks, const int64_t* starts, const void* values,
                             const float* scales, int64_t in, int64_t block, int64_t first, int64_t last, void* y, float* scratch,
                             int threads) {
  using namespace bitmask;
  const Packed w{masks, starts, values, scales, nullptr, nullptr, last, in, (in + kWord - 1) / kWord, block};
  for_kind(kind, [&](auto of) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && (last - first) * in > (1 << 15))
    for (int64_t row = first; row < last; row++) {
      float* own = scratch + omp_get_thread_num() * w.words * kWord;
      char* here = static_cast<char*>(y) + (row - first) * in * (to == kFloat32 ? 4 : 2);
      if (to == kFloat32) dense_row<of.value, kFloat32>(w, row, own, here);
      if (to == kBfloat16) dense_row<of.value, kBfloat16>(w, row, own, here);
    }
  });
}

}  // extern "C"
