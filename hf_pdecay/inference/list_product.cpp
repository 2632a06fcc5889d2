// Product of many rows of activations with values under a bitmask: y = x Wᵀ + b, for bitmask_linear.py.
//
//   - Rows of x are taken kRows at a time and transposed, so that two vectors, or one of 16 bits, are a column.
//   - Of a block of W, a list says which columns have a value. So the work is that of the values alone, wherever they
//     stand. In 16 bits (whole numbers with one scale for each row of x, or bfloat16), two columns are interleaved, and
//     meet their two values in one instruction, in sums of 32 bits.
//   - Each block of x is small enough for the first cache, and meets many rows of W there.
//
// It follows bitmask_product.cpp.

#if defined(__AVX2__)  // which has instructions for pairs of whole numbers
#define HF_PDECAY_LISTS

namespace {
namespace lists {

using bitmask::count_bits;
using bitmask::kBlock;
using bitmask::kWord;
using bitmask::Packed;

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
  static Floats floats(Type a) { return _mm512_cvtepi32_ps(a); }
  static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
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
  static Floats floats(Type a) { return _mm256_cvtepi32_ps(a); }
  static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
};
#endif

constexpr int kHalf = sizeof(Vector::Type) / sizeof(float);  // sums in a vector
constexpr int kRows = 2 * kHalf;                             // rows of x in a block: numbers of 16 bits in a vector

// The bits of the greatest magnitude: magnitudes have the order of their bits, and infinity and NaN are the greatest.
inline uint32_t greatest_of(const float* x, int64_t in) {
  uint32_t greatest = 0;
  for (int64_t j = 0; j < in; j++) greatest = std::max(greatest, to_bits(x[j]) & 0x7fffffffu);
  return greatest;
}

constexpr uint32_t kInfinity = 0x7f800000u;

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

// Columns of 16 bits.
template <typename Form>
struct Interleaved {
  typedef int16_t Cell;  // of a block of x and of a list
  static constexpr int kColumns = kBlock * kWord;

  template <typename Sum>
  __attribute__((always_inline)) static void meet_two(const char* x, const uint16_t* places, const Cell* values,
                                                      Sum* sums) {
    const Vector::Type two = Vector::pair(values);
    const Vector::Type a = Vector::load(x + places[0]), b = Vector::load(x + places[1]);
    sums[0] = Form::multiply(sums[0], Vector::low(a, b), two);
    sums[1] = Form::multiply(sums[1], Vector::high(a, b), two);
  }

  // A block of kRows rows of x as [in][kRows], in the order in which interleaving leaves them; rows beyond `count` are
  // 0. Returns false if the form cannot take a row.
  template <typename Number>
  static bool lay_out(const Number* x, int64_t count, int64_t in, Cell* block, Cell* scratch, float* scales) {
    for (int64_t i = 0; i < kRows; i++) {
      if (i >= count)
        std::memset(scratch + i * in, 0, sizeof(Cell) * in);
      else if (!Form::take(x + i * in, in, scratch + i * in, scales + i))
        return false;
    }
    const Cell* rows[kRows];
    for (int place = 0; place < kRows; place++)
      rows[place] = scratch + (place % 8 / 4 * kHalf + place / 8 * 4 + place % 4) * in;
    int64_t j = 0;
    for (; j + 8 <= in; j += 8)
      for (int place = 0; place < kRows; place += 8) transpose_eight(rows + place, j, block + j * kRows + place);
    for (; j < in; j++)
      for (int place = 0; place < kRows; place++) block[j * kRows + place] = rows[place][j];
    return true;
  }
};

// int8 values, and x in whole numbers: sums of 256 products cannot overflow.
struct Whole : Interleaved<Whole> {
  static constexpr Kind kKind = kInt8;
  typedef float Number;  // of x and y
  typedef Vector::Type Sum;
  static Sum zero() { return Vector::zero(); }
  static Sum add(Sum a, Sum b) { return Vector::add(a, b); }
  static Sum multiply(Sum sum, Vector::Type a, Vector::Type b) { return Vector::multiply(sum, a, b); }
  static Vector::Floats floats(Sum sum, const float* scale) {
    return Vector::times(Vector::floats(sum), Vector::all(*scale));
  }

  // A row of x, and its scale; false if a value is not finite, or all are tiny.
  static bool take(const float* x, int64_t in, int16_t* to, float* scale) {
    const uint32_t greatest = greatest_of(x, in);
    const float most = from_bits(greatest), inverse = most > 0 ? 32767 / most : 0.0f;
    if (greatest >= kInfinity || !std::isfinite(inverse)) return false;
    *scale = most / 32767;
    for (int64_t j = 0; j < in; j++) to[j] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(x[j] * inverse)));
    return true;
  }

#ifdef __AVX512VBMI2__
  // 64 values in 16 bits.
  static void widen(const void* from, int16_t* to) {
    const __m512i whole = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_cvtepi8_epi16(_mm512_castsi512_si256(whole)));
    _mm512_storeu_si512(to + 32, _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(whole, 1)));
  }
#endif

  static void put(float* y, const float* results, int64_t number) { std::memcpy(y, results, sizeof(float) * number); }
};

#ifdef HF_PDECAY_PAIRS
// bfloat16 values, and x and y of bfloat16.
struct Brain : Interleaved<Brain> {
  static constexpr Kind kKind = kBfloat16;
  typedef uint16_t Number;
  typedef __m512 Sum;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum multiply(Sum sum, Vector::Type a, Vector::Type b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Vector::Floats floats(Sum sum, const float*) { return sum; }

  static bool take(const uint16_t* x, int64_t in, int16_t* to, float* scale) {
    uint16_t greatest = 0;
    for (int64_t j = 0; j < in; j++) greatest = std::max<uint16_t>(greatest, x[j] & 0x7fff);
    *scale = 1;
    std::memcpy(to, x, sizeof(uint16_t) * in);
    return greatest < kInfinity >> 16;
  }

  static void widen(const void* from, int16_t* to) { std::memcpy(to, from, sizeof(int16_t) * kWord); }

  static void put(uint16_t* y, const float* results, int64_t number) {
    for (int64_t j = 0; j < number; j++) y[j] = bitmask::to_bfloat16(results[j]);
  }
};
#endif

// Values of 32 or 16 bits, and x in float32.
template <Kind kind>
struct Single {
  static constexpr Kind kKind = kind;
  typedef float Number;
  typedef float Cell;
  typedef Vector::Floats Sum;
  static constexpr int kColumns = kBlock * kWord / 2;
  static Sum zero() { return Vector::all(0); }
  static Sum add(Sum a, Sum b) { return Vector::add(a, b); }
  static Vector::Floats floats(Sum sum, const float*) { return sum; }

  __attribute__((always_inline)) static void meet_two(const char* x, const uint16_t* places, const Cell* values,
                                                      Sum* sums) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
      const float* column = reinterpret_cast<const float*>(x + places[k]);
      const Vector::Floats value = Vector::all(values[k]);
      sums[0] = Vector::fma(Vector::load(column), value, sums[0]);
      sums[1] = Vector::fma(Vector::load(column + kHalf), value, sums[1]);
    }
  }

  static bool lay_out(const Number* x, int64_t count, int64_t in, Cell* block, Cell*, float* scales) {
    for (int64_t i = 0; i < count; i++)
      if (greatest_of(x + i * in, in) >= kInfinity) return false;
    std::fill(scales, scales + kRows, 1.0f);
    csr::transpose(x, count, in, kRows, block);
    return true;
  }

#ifdef __AVX512VBMI2__
  static void widen(const void* from, Cell* to) {
#pragma GCC unroll 4
    for (int place = 0; place < kWord; place += 16) {
      const char* here = static_cast<const char*>(from) + place * bytes_of<kind>;
      _mm512_storeu_ps(to + place, bitmask::Lanes::expand<kind>(here, 0xffff));
    }
  }
#endif

  static void put(float* y, const float* results, int64_t number) { std::memcpy(y, results, sizeof(float) * number); }
};

// Words of a block of columns.
template <typename Form>
inline int64_t words_of(const Packed& w) {
  return Form::kKind == kInt8 ? w.block : Form::kColumns / kWord;
}

// The values of some rows of W, block by block: where their columns of x begin in its block, in bytes, and themselves.
template <typename Form>
struct Lists {
  std::vector<uint16_t> places;
  std::vector<typename Form::Cell> values;
  std::vector<int32_t> starts;  // [rows][blocks], and the end

  void fill(const Packed& w, int64_t first, int64_t last) {
    const int64_t most = (last - first) * (w.words * kWord + 2 * w.words) + kWord;  // with padding
    if (static_cast<int64_t>(places.size()) < most) {
      places.resize(most);
      values.resize(most);
    }
    starts.clear();
    const int64_t words = words_of<Form>(w);
    int32_t held = 0;
    for (int64_t row = first; row < last; row++) {
      const char* from = static_cast<const char*>(w.values) + w.starts[row] * kSize;
      for (int64_t word = 0; word < w.words; word++) {
        if (word % words == 0) {
          held = even(held);
          starts.push_back(held);
        }
        const uint64_t mask = w.masks ? w.masks[row * w.words + word] : in_word(w, word);
        const int column = static_cast<int>(word % words) * kWord, number = count_bits(mask);
        add(mask, from, column, held);
        from += (w.masks ? number : kWord) * kSize;
        held += number;
      }
      held = even(held);
    }
    starts.push_back(held);
  }

 private:
  static constexpr int kBytes = kRows * sizeof(typename Form::Cell);  // of a column in a block of x
  static_assert(kBytes * (Form::kColumns - 1) < 1 << 16, "16 bits hold where a column begins");
  static constexpr int kSize = bytes_of<Form::kKind>;

  static uint64_t in_word(const Packed& w, int64_t word) {
    const int64_t left = w.in - word * kWord;
    return left >= kWord ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }

  int32_t even(int32_t held) {
    if (held % 2) places[held] = values[held] = 0;
    return held + held % 2;
  }

  void add(uint64_t mask, const char* from, int column, int32_t held) {
#ifdef __AVX512VBMI2__
    alignas(64) static constexpr struct Numbers {
      uint8_t each[kWord];
      constexpr Numbers() : each() {
        for (int i = 0; i < kWord; i++) each[i] = static_cast<uint8_t>(i);
      }
    } kNumbers;
    constexpr int kShift = kBytes == 64 ? 6 : 7;
    static_assert(kBytes == 1 << kShift);
    const __m512i columns = _mm512_maskz_compress_epi8(mask, _mm512_load_si512(kNumbers.each));
    const __m512i start = _mm512_set1_epi16(static_cast<int16_t>(column));
    const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(columns));
    const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(columns, 1));
    _mm512_storeu_si512(&places[held], _mm512_slli_epi16(_mm512_add_epi16(low, start), kShift));
    _mm512_storeu_si512(&places[held + 32], _mm512_slli_epi16(_mm512_add_epi16(high, start), kShift));
    Form::widen(from, &values[held]);
#else
    for (int64_t k = 0; mask; mask &= mask - 1, held++, k++) {
      places[held] = static_cast<uint16_t>((column + __builtin_ctzll(mask)) * kBytes);
      values[held] = static_cast<typename Form::Cell>(value_at<Form::kKind>(from, k));
    }
#endif
  }
};

// Adds the products of a block's values, an even number of them, with a block of x.
template <typename Form>
inline void add_products(const uint16_t* places, const typename Form::Cell* values, int count, const char* x,
                         const float* scale, bool is_first, float* y) {
  typedef typename Form::Sum Sum;
  Sum sums[2] = {Form::zero(), Form::zero()}, more[2] = {Form::zero(), Form::zero()};
  int k = 0;
  for (; k + 4 <= count; k += 4) {
    Form::meet_two(x, places + k, values + k, sums);
    Form::meet_two(x, places + k + 2, values + k + 2, more);
  }
  if (k < count) Form::meet_two(x, places + k, values + k, sums);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const Vector::Floats sum = Form::floats(Form::add(sums[half], more[half]), scale);
    float* to = y + half * kHalf;
    Vector::store(to, is_first ? sum : Vector::add(sum, Vector::load(to)));
  }
}

// Writes results [rows of W][kRows] to y: those of the `count` rows of x that are there.
template <typename Form>
void finish(const Packed& w, int64_t first, int64_t last, float* results, const float* scales, int64_t count,
            typename Form::Number* y) {
  constexpr int kLane = csr::kLane;
  for (int64_t row = first; row < last; row++)
    for (int half = 0; half < 2; half++) {
      float* here = results + (row - first) * kRows + half * kHalf;
      const Vector::Floats shift = Vector::all(w.bias ? w.bias[row] : 0.0f);
      Vector::store(here, Vector::fma(Vector::load(here), Vector::load(scales + half * kHalf), shift));
    }
  float tile[kLane][kLane];
  for (int64_t row = first; row < last; row += kLane) {
    const int64_t rows = std::min<int64_t>(kLane, last - row);
    for (int64_t i = 0; i < count; i += kLane) {
      csr::transpose_square(results + (row - first) * kRows + i, kRows, rows, tile[0], kLane);
      for (int64_t k = 0; k < std::min<int64_t>(kLane, count - i); k++)
        Form::put(y + (i + k) * w.out + row, tile[k], rows);
    }
  }
}

template <typename Form>
bool product(const Packed& w, const typename Form::Number* x, int64_t count, typename Form::Number* y,
             void* scratch, int threads) {
  typedef typename Form::Cell Cell;
  const int64_t words = words_of<Form>(w);
  Cell* laid_out = static_cast<Cell*>(scratch);
  const int64_t groups = (count + kRows - 1) / kRows, blocks = (w.words + words - 1) / words;
  const bool alone = threads == 1 || w.out * w.in * count < (1 << 16);
  std::vector<float> scales(groups * kRows, 0.0f);
  bool taken = true;
#pragma omp parallel num_threads(threads) if (!alone)
  {
    std::vector<Cell> rows(sizeof(Cell) == 2 ? kRows * w.in : 0);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = group * kRows;
      Cell* block = laid_out + first * w.in;
      const int64_t here = std::min<int64_t>(kRows, count - first);
      if (!Form::lay_out(x + first * w.in, here, w.in, block, rows.data(), &scales[first])) {
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
    Lists<Form> lists;
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
            const Cell* columns = laid_out + begin * w.in + block * words * kWord * kRows;
            const int32_t* start = &lists.starts[(top - first) * blocks + block];
            for (int64_t row = top; row < bottom; row++, start += blocks) {
              const float* scale = w.scales ? w.scales_of(row) + block : nullptr;
              add_products<Form>(&lists.places[*start], &lists.values[*start], start[1] - start[0],
                                 reinterpret_cast<const char*>(columns), scale, block == 0,
                                 &results[(row - top) * kRows]);
            }
          }
          finish<Form>(w, top, bottom, results.data(), &scales[begin], here, y + begin * w.out);
        }
      }
    }
  }
  return true;
}

}  // namespace lists
}  // namespace
#endif

extern "C" {

// The rows of x that are taken together: scratch has room for a multiple of them, `in` floats each; 0 if there is no
// such product on this processor. `brain`: x and y are bfloat16.
int hf_pdecay_list_rows([[maybe_unused]] int kind, [[maybe_unused]] int brain) {
#ifdef HF_PDECAY_PAIRS
  if (brain) return kind == kBfloat16 ? lists::kRows : 0;
#endif
#ifdef HF_PDECAY_LISTS
  if (!brain) return lists::kRows;
#endif
  return 0;
}

// Results of rows of x. Returns 0, having written nothing, if a row is not finite, as a NaN times a zero is NaN, or 16
// bits cannot hold it for int8 values.
int hf_pdecay_list_product([[maybe_unused]] int kind, [[maybe_unused]] int brain, const uint64_t* masks,
                           const int64_t* starts, const void* values, const float* scales, const float* bias,
                           int64_t out, int64_t in, int64_t block, [[maybe_unused]] const void* x, [[maybe_unused]] int64_t count,
                           [[maybe_unused]] void* y, [[maybe_unused]] void* scratch, [[maybe_unused]] int threads) {
  using namespace bitmask;
  [[maybe_unused]] const Packed w{masks, starts, values, scales, nullptr, bias, out, in, (in + kWord - 1) / kWord, block};
#ifdef HF_PDECAY_PAIRS
  if (brain)
    return lists::product<lists::Brain>(w, static_cast<const uint16_t*>(x), count, static_cast<uint16_t*>(y), scratch,
                                        threads);
#endif
  bool done = false;
#ifdef HF_PDECAY_LISTS
  for_kind(kind, [&](auto of) {
    typedef std::conditional_t<of.value == kInt8, lists::Whole, lists::Single<of.value>> Form;
    done = lists::product<Form>(w, static_cast<const float*>(x), count, static_cast<float*>(y), scratch, threads);
  });
#endif
  return done;
}

}  // extern "C"
