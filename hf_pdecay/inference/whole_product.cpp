// Product of many rows of activations with int8 values under a bitmask: y = x Wᵀ + b, for bitmask_linear.py.
//
//   - x is taken in 16 bits, with one scale for each row, kRows rows at a time and transposed: a vector is a column.
//   - Of a block of W, a list says which columns have a value. Two columns are interleaved, and meet their two values in
//     one instruction, in sums of 32 bits: so the work is that of the values alone, wherever they stand.
//   - Each block of x is small enough for the first cache, and meets many rows of W there.
//
// It follows bitmask_product.cpp.

#if defined(__AVX2__)
#define HF_PDECAY_WHOLE

namespace {
namespace whole {

using bitmask::count_bits;
using bitmask::kBlock;
using bitmask::kWord;
using bitmask::Packed;

constexpr int kColumns = kBlock * kWord;  // of a block; sums of so many products cannot overflow
constexpr int kLines = 64;                // rows of W that a block of x meets while it is in the first cache
constexpr int64_t kMostValues = 1 << 17;  // in the lists of a part of W: they stay in the second cache

#if defined(__AVX512BW__)
struct Vector {
  typedef __m512i Type;
  typedef __m512 Floats;
  static Type load(const char* p) { return _mm512_loadu_si512(p); }
  static Type zero() { return _mm512_setzero_si512(); }
  static Type pair(const int16_t* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
  }
  static Type low(Type a, Type b) { return _mm512_unpacklo_epi16(a, b); }
  static Type high(Type a, Type b) { return _mm512_unpackhi_epi16(a, b); }
  static Type add(Type a, Type b) { return _mm512_add_epi32(a, b); }
  static Type multiply(Type sum, Type a, Type b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return add(sum, _mm512_madd_epi16(a, b));
#endif
  }
  static Floats scaled(Type sum, float scale) { return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale)); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
};
#else
struct Vector {
  typedef __m256i Type;
  typedef __m256 Floats;
  static Type load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Type zero() { return _mm256_setzero_si256(); }
  static Type pair(const int16_t* p) {
    int32_t two;
    std::memcpy(&two, p, 4);
    return _mm256_set1_epi32(two);
  }
  static Type low(Type a, Type b) { return _mm256_unpacklo_epi16(a, b); }
  static Type high(Type a, Type b) { return _mm256_unpackhi_epi16(a, b); }
  static Type add(Type a, Type b) { return _mm256_add_epi32(a, b); }
  static Type multiply(Type sum, Type a, Type b) { return add(sum, _mm256_madd_epi16(a, b)); }
  static Floats scaled(Type sum, float scale) { return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale)); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
};
#endif

constexpr int kHalf = sizeof(Vector::Type) / sizeof(float);  // sums in a vector
constexpr int kRows = 2 * kHalf;                             // rows of x in a block: numbers of 16 bits in a vector

// Rows of x in 16 bits, and their scales; false if a value is NaN or infinite, or all are tiny.
bool to_whole(const float* x, int64_t in, int16_t* to, float* scale) {
  uint32_t greatest = 0;  // the bits of magnitudes have their order, and those of infinity and NaN are the greatest
  for (int64_t j = 0; j < in; j++) greatest = std::max(greatest, to_bits(x[j]) & 0x7fffffffu);
  const float most = from_bits(greatest), inverse = most > 0 ? 32767 / most : 0.0f;
  if (greatest >= 0x7f800000u || !std::isfinite(inverse)) return false;
  *scale = most / 32767;
  for (int64_t j = 0; j < in; j++) to[j] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(x[j] * inverse)));
  return true;
}

// Eight columns of 8 rows, side by side: column after column, kRows numbers apart.
inline void transpose_eight(const int16_t* const* rows, int64_t j, int16_t* to) {
  __m128i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + j));
#pragma GCC unroll 3
  for (int turn = 0; turn < 3; turn++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
      b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = b[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * kRows), a[i]);
}

// A block of kRows rows of x as [in][kRows], in the order in which interleaving leaves them; rows beyond `count` are 0.
bool lay_out(const float* x, int64_t count, int64_t in, int16_t* block, int16_t* scratch, float* scales) {
  for (int64_t i = 0; i < kRows; i++) {
    if (i >= count)
      std::memset(scratch + i * in, 0, sizeof(int16_t) * in);
    else if (!to_whole(x + i * in, in, scratch + i * in, scales + i))
      return false;
  }
  const int16_t* rows[kRows];
  for (int place = 0; place < kRows; place++)
    rows[place] = scratch + (place % 8 / 4 * kHalf + place / 8 * 4 + place % 4) * in;
  int64_t j = 0;
  for (; j + 8 <= in; j += 8)
    for (int place = 0; place < kRows; place += 8) transpose_eight(rows + place, j, block + j * kRows + place);
  for (; j < in; j++)
    for (int place = 0; place < kRows; place++) block[j * kRows + place] = rows[place][j];
  return true;
}

// The values of some rows of W, block by block: where their columns of x begin in its block, in bytes, and themselves.
struct Lists {
  std::vector<uint16_t> places;
  std::vector<int16_t> values;
  std::vector<int32_t> starts;  // [rows][blocks], and the end

  void fill(const Packed& w, int64_t first, int64_t last) {
    const int64_t most = (last - first) * (w.words * kWord + 2 * w.words) + kWord;
    if (static_cast<int64_t>(places.size()) < most) {
      places.resize(most);
      values.resize(most);
    }
    starts.clear();
    int32_t held = 0;
    for (int64_t row = first; row < last; row++) {
      const int8_t* from = static_cast<const int8_t*>(w.values) + w.starts[row];
      for (int64_t word = 0; word < w.words; word++) {
        if (word % kBlock == 0) {
          held = even(held);
          starts.push_back(held);
        }
        const uint64_t mask = w.masks ? w.masks[row * w.words + word] : in_word(w, word);
        const int column = static_cast<int>(word % kBlock) * kWord, number = count_bits(mask);
        add(mask, from, column, held);
        from += w.masks ? number : kWord;
        held += number;
      }
      held = even(held);
    }
    starts.push_back(held);
  }

 private:
  static constexpr int kBytes = kRows * sizeof(int16_t);  // of a column in a block of x

  static uint64_t in_word(const Packed& w, int64_t word) {
    const int64_t left = w.in - word * kWord;
    return left >= kWord ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }

  int32_t even(int32_t held) {
    if (held % 2) places[held] = values[held] = 0;
    return held + held % 2;
  }

  void add(uint64_t mask, const int8_t* from, int column, int32_t held) {
#ifdef __AVX512VBMI2__
    alignas(64) static constexpr struct Numbers {
      uint8_t each[kWord];
      constexpr Numbers() : each() {
        for (int i = 0; i < kWord; i++) each[i] = static_cast<uint8_t>(i);
      }
    } kNumbers;
    const __m512i columns = _mm512_maskz_compress_epi8(mask, _mm512_load_si512(kNumbers.each));
    const __m512i start = _mm512_set1_epi16(static_cast<int16_t>(column));
    const __m512i whole = _mm512_loadu_si512(from);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i narrow = half ? _mm512_extracti64x4_epi64(columns, 1) : _mm512_castsi512_si256(columns);
      const __m256i short_ones = half ? _mm512_extracti64x4_epi64(whole, 1) : _mm512_castsi512_si256(whole);
      const __m512i wide = _mm512_add_epi16(_mm512_cvtepu8_epi16(narrow), start);
      _mm512_storeu_si512(&places[held + 32 * half], _mm512_slli_epi16(wide, 6));
      _mm512_storeu_si512(&values[held + 32 * half], _mm512_cvtepi8_epi16(short_ones));
    }
    static_assert(kBytes == 64, "a column is shifted by 6");
#else
    for (; mask; mask &= mask - 1, held++) {
      places[held] = static_cast<uint16_t>((column + __builtin_ctzll(mask)) * kBytes);
      values[held] = *from++;
    }
#endif
  }
};

// Adds the products of a block's values, an even number of them, with a block of x.
inline void add_products(const uint16_t* places, const int16_t* values, int count, const char* x, float scale,
                         bool is_first, float* y) {
  Vector::Type sums[2] = {Vector::zero(), Vector::zero()}, more[2] = {Vector::zero(), Vector::zero()};
  const auto meet = [&](int k, Vector::Type& low, Vector::Type& high) __attribute__((always_inline)) {
    const Vector::Type two = Vector::pair(values + k);
    const Vector::Type a = Vector::load(x + places[k]), b = Vector::load(x + places[k + 1]);
    low = Vector::multiply(low, Vector::low(a, b), two);
    high = Vector::multiply(high, Vector::high(a, b), two);
  };
  int k = 0;
  for (; k + 4 <= count; k += 4) {
    meet(k, sums[0], sums[1]);
    meet(k + 2, more[0], more[1]);
  }
  if (k < count) meet(k, sums[0], sums[1]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const Vector::Floats sum = Vector::scaled(Vector::add(sums[half], more[half]), scale);
    float* to = y + half * kHalf;
    Vector::store(to, is_first ? sum : Vector::add(sum, Vector::load(to)));
  }
}

// Writes results [rows of W][kRows] to y: those of the `count` rows of x that are there.
void finish(const Packed& w, int64_t first, int64_t last, float* results, const float* scales, int64_t count, float* y) {
  for (int64_t row = first; row < last; row++)
    for (int half = 0; half < 2; half++) {
      float* here = results + (row - first) * kRows + half * kHalf;
      const Vector::Floats shift = Vector::all(w.bias ? w.bias[row] : 0.0f);
      Vector::store(here, Vector::fma(Vector::load(here), Vector::load(scales + half * kHalf), shift));
    }
  int64_t row = first;
  for (; row + csr::kLane <= last; row += csr::kLane) {
    int64_t i = 0;
    const float* from = results + (row - first) * kRows;
    for (; i + csr::kLane <= count; i += csr::kLane)
      csr::transpose_square(from + i, kRows, csr::kLane, y + i * w.out + row, w.out);
    for (; i < count; i++)
      for (int k = 0; k < csr::kLane; k++) y[i * w.out + row + k] = from[k * kRows + i];
  }
  for (; row < last; row++)
    for (int64_t i = 0; i < count; i++) y[i * w.out + row] = results[(row - first) * kRows + i];
}

bool product(const Packed& w, const float* x, int64_t count, float* y, int16_t* laid_out, int threads) {
  const int64_t groups = (count + kRows - 1) / kRows, blocks = (w.words + kBlock - 1) / kBlock;
  const bool alone = threads == 1 || w.out * w.in * count < (1 << 16);
  std::vector<float> scales(groups * kRows, 0.0f);
  bool taken = true;
#pragma omp parallel num_threads(threads) if (!alone)
  {
    std::vector<int16_t> scratch(kRows * w.in);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * kRows;
      int16_t* block = laid_out + first * w.in;
      if (!lay_out(x + first * w.in, std::min<int64_t>(kRows, count - first), w.in, block, scratch.data(), &scales[first])) {
#pragma omp atomic write
        taken = false;
      }
    }
  }
  if (!taken) return false;
  const int64_t held = w.out > 1 ? w.starts[w.out - 1] / (w.out - 1) : w.in;  // values of a row
  const int64_t wanted = std::min(kMostValues / std::max<int64_t>(held, 1), w.out / (2 * threads));
  const int64_t lines = (std::max<int64_t>(wanted, 1) + csr::kLane - 1) / csr::kLane * csr::kLane;  // of a part
  const int64_t parts = (w.out + lines - 1) / lines;
#pragma omp parallel num_threads(threads) if (!alone)
  {
    Lists lists;
    std::vector<float> results(kLines * kRows);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t first = part * lines, end = std::min(first + lines, w.out);
      lists.fill(w, first, end);
      for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = group * kRows, here = std::min<int64_t>(kRows, count - begin);
        for (int64_t top = first; top < end; top += kLines) {
          const int64_t bottom = std::min<int64_t>(top + kLines, end);
          for (int64_t block = 0; block < blocks; block++) {
            const int16_t* columns = laid_out + begin * w.in + block * kColumns * kRows;
            const int32_t* start = &lists.starts[(top - first) * blocks + block];
            const float* scale = w.scales_of(top) + block;
            for (int64_t row = top; row < bottom; row++, start += blocks, scale += blocks)
              add_products(&lists.places[*start], &lists.values[*start], start[1] - start[0],
                           reinterpret_cast<const char*>(columns), *scale, block == 0, &results[(row - top) * kRows]);
          }
          finish(w, top, bottom, results.data(), &scales[begin], here, y + begin * w.out);
        }
      }
    }
  }
  return true;
}

}  // namespace whole
}  // namespace
#endif

extern "C" {

// The rows of x that are taken together: scratch has room for a multiple of them, `in` numbers of 16 bits each; 0 if
// there is no such product for this processor.
int hf_pdecay_whole_rows() {
#ifdef HF_PDECAY_WHOLE
  return whole::kRows;
#else
  return 0;
#endif
}

// Results of rows of x with int8 values; 0, and nothing written, if 16 bits cannot hold a row of x.
int hf_pdecay_whole_product([[maybe_unused]] const uint64_t* masks, [[maybe_unused]] const int64_t* starts,
                            [[maybe_unused]] const void* values, [[maybe_unused]] const float* scales,
                            [[maybe_unused]] const float* bias, [[maybe_unused]] int64_t out,
                            [[maybe_unused]] int64_t in, [[maybe_unused]] const float* x,
                            [[maybe_unused]] int64_t count, [[maybe_unused]] float* y,
                            [[maybe_unused]] void* scratch, [[maybe_unused]] int threads) {
#ifdef HF_PDECAY_WHOLE
  using namespace bitmask;
  const Packed w{masks, starts, values, scales, nullptr, bias, out, in, (in + kWord - 1) / kWord};
  return whole::product(w, x, count, y, static_cast<int16_t*>(scratch), threads);
#else
  return 0;
#endif
}

}  // extern "C"
