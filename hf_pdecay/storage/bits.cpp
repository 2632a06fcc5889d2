// Places of values, a bitmask or gaps, and codes of values, for bits.py. Numbers are little-endian, and values are copied bit by bit.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kWord = 64;

inline uint64_t word_at(const uint8_t* bits, int64_t begin, int64_t count) {
  uint64_t word = 0;
  std::memcpy(&word, bits + begin / 8, std::min<int64_t>(8, (count - begin + 7) / 8));
  return word;
}

template <typename Gap, typename Function>
inline void for_gaps(const uint8_t* gaps, int64_t values, int64_t count, const Function& take) {
  int64_t place = -1;
  for (int64_t value = 0; value < values; value++) {
    Gap gap;
    std::memcpy(&gap, gaps + value * sizeof(Gap), sizeof(Gap));
    place += static_cast<int64_t>(gap) + 1;
    if (place >= count) return;  // the file has changed since it was checked
    take(place);
  }
}

// Calls `take` with the place of each of the first `values` values among `count` elements, in order. Gaps have `width`
// bytes; 0 stands for a bitmask, and -1 for all elements.
template <typename Function>
inline void for_places(int width, const uint8_t* places, int64_t values, int64_t count, const Function& take) {
  if (width == 1) return for_gaps<uint8_t>(places, values, count, take);
  if (width == 2) return for_gaps<uint16_t>(places, values, count, take);
  if (width == 4) return for_gaps<uint32_t>(places, values, count, take);
  if (width < 0) {
    for (int64_t place = 0; place < std::min(values, count); place++) take(place);
    return;
  }
  for (int64_t begin = 0; begin < count; begin += kWord)
    for (uint64_t word = word_at(places, begin, count); word; word &= word - 1) {
      const int64_t place = begin + __builtin_ctzll(word);
      if (values-- <= 0 || place >= count) return;
      take(place);
    }
}

// Writes the values of a whole word, all of whose vectors may be read: 64 bytes beyond the last value are there.
template <typename Value>
inline void expand_word(uint64_t word, const char* values, Value* dense) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Value) == 4) {
    for (int part = 0; part < 4; part++) {
      const auto mask = static_cast<__mmask16>(word >> 16 * part);
      _mm512_storeu_si512(dense + 16 * part, _mm512_maskz_expand_epi32(mask, _mm512_loadu_si512(values)));
      values += 4 * __builtin_popcount(mask);
    }
    return;
  }
  if constexpr (sizeof(Value) == 8) {
    for (int part = 0; part < 8; part++) {
      const auto mask = static_cast<__mmask8>(word >> 8 * part);
      _mm512_storeu_si512(dense + 8 * part, _mm512_maskz_expand_epi64(mask, _mm512_loadu_si512(values)));
      values += 8 * __builtin_popcount(mask);
    }
    return;
  }
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
  if constexpr (sizeof(Value) == 2) {
    for (int part = 0; part < 2; part++) {
      const auto mask = static_cast<__mmask32>(word >> 32 * part);
      _mm512_storeu_si512(dense + 32 * part, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
      values += 2 * __builtin_popcount(mask);
    }
    return;
  }
  if constexpr (sizeof(Value) == 1) {
    _mm512_storeu_si512(dense, _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(values)));
    return;
  }
#endif
  for (; word; word &= word - 1) {
    std::memcpy(dense + __builtin_ctzll(word), values, sizeof(Value));  // which may not be aligned
    values += sizeof(Value);
  }
}

template <typename Value>
void expand(int width, const uint8_t* places, const char* values, int64_t number, int64_t count, Value* dense) {
  const char* const end = values + number * sizeof(Value);
  int64_t begin = 0;
  if (width == 0)
    for (; count - begin >= kWord; begin += kWord) {
      const uint64_t word = word_at(places, begin, count);
      if (end - values < static_cast<int64_t>(kWord * sizeof(Value) + 64)) break;
      if (word) expand_word(word, values, dense + begin);
      values += sizeof(Value) * __builtin_popcountll(word);
    }
  for_places(width, places + begin / 8, (end - values) / static_cast<int64_t>(sizeof(Value)), count - begin,
             [&](int64_t place) {
               std::memcpy(dense + begin + place, values, sizeof(Value));
               values += sizeof(Value);
             });
}

// A row goes on after a place if the place is before its end.
template <typename Column>
void rows_of(int width, const uint8_t* places, int64_t number, int64_t rows, int64_t columns, int64_t* starts,
             Column* column_of) {
  int64_t row = 0, begin = 0, taken = 0;
  starts[0] = 0;
  for_places(width, places, number, rows * columns, [&](int64_t place) {
    for (; place - begin >= columns; begin += columns) starts[++row] = taken;
    column_of[taken++] = static_cast<Column>(place - begin);
  });
  while (row < rows) starts[++row] = taken;
}

// Values of the transpose are put where its rows go on; these lie close enough for the second cache.
template <typename Column, typename Value>
void columns_of(int width, const uint8_t* places, const char* values, int64_t number, int64_t rows, int64_t columns,
                int64_t* starts, Column* row_of, Value* values_out) {
  std::vector<int64_t> following(columns + 1, 0);  // of each column, where its next value goes
  int64_t begin = 0;
  for_places(width, places, number, rows * columns, [&](int64_t place) {
    while (place - begin >= columns) begin += columns;
    following[place - begin + 1]++;
  });
  for (int64_t column = 0; column < columns; column++) following[column + 1] += following[column];
  std::copy(following.begin(), following.end(), starts);
  int64_t row = 0, left = number;
  begin = 0;
  for_places(width, places, number, rows * columns, [&](int64_t place) {
    for (; place - begin >= columns; begin += columns) row++;
    const int64_t there = following[place - begin]++;
    if (there >= left) return;
    row_of[there] = static_cast<Column>(row);
    std::memcpy(values_out + there, values, sizeof(Value));
    values += sizeof(Value);
  });
}

// The bits of some places, at most a word of them.
inline uint64_t bits_at(const uint8_t* bits, int64_t place, int64_t count) {
  const int64_t bytes = (place % 8 + count + 7) / 8;
  uint64_t word = 0;
  std::memcpy(&word, bits + place / 8, std::min<int64_t>(bytes, 8));
  word >>= place % 8;
  if (bytes > 8) word |= static_cast<uint64_t>(bits[place / 8 + 8]) << (64 - place % 8);
  return count < kWord ? word & ((uint64_t{1} << count) - 1) : word;
}

// Exchanges bit j of word i and bit i of word j: halves of the square first, then halves of these.
inline void transpose_bits(uint64_t* words) {
  uint64_t mask = ~uint64_t{0} >> 32;
  for (int step = 32; step; step >>= 1, mask ^= mask << step)
    for (int i = 0; i < kWord; i = ((i | step) + 1) & ~step) {
      const uint64_t changed = ((words[i] >> step) ^ words[i | step]) & mask;
      words[i] ^= changed << step;
      words[i | step] ^= changed;
    }
}

// A word's rows become dense, in the second cache, and their columns are packed.
template <typename Value>
void turn(const uint8_t* places, const char* values, int64_t number, int64_t rows, int64_t columns, uint64_t* masks,
          Value* values_out) {
  const int64_t words = (rows + kWord - 1) / kWord;
  for (int64_t word = 0; word < words; word++)
    for (int64_t first = 0; first < columns; first += kWord) {
      uint64_t square[kWord] = {};
      const int64_t height = std::min<int64_t>(kWord, rows - word * kWord);
      const int64_t width = std::min<int64_t>(kWord, columns - first);
      for (int64_t i = 0; i < height; i++) square[i] = bits_at(places, (word * kWord + i) * columns + first, width);
      transpose_bits(square);
      for (int64_t j = 0; j < width; j++) masks[(first + j) * words + word] = square[j];
    }
  std::vector<int64_t> following(columns);  // of each column, where its next value goes
  int64_t total = 0;
  for (int64_t column = 0; column < columns; column++) {
    following[column] = total;
    for (int64_t word = 0; word < words; word++) total += __builtin_popcountll(masks[column * words + word]);
  }
  if (total != number) return;  // the file has changed since it was checked
  const char* const end = values + number * sizeof(Value);
  // An odd number of cache lines: a column's elements would else share few places in the cache.
  const int64_t stride = (columns + kWord - 1) / kWord * kWord + 64 / sizeof(Value);
  std::vector<Value> dense(kWord * stride);
  for (int64_t word = 0; word < words; word++) {
    for (int64_t row = word * kWord; row < std::min(rows, (word + 1) * kWord); row++)
      for (int64_t first = 0; first < columns; first += kWord) {
        uint64_t marks = bits_at(places, row * columns + first, std::min<int64_t>(kWord, columns - first));
        const int64_t count = __builtin_popcountll(marks);
        Value* const there = dense.data() + row % kWord * stride + first;
        if (end - values >= static_cast<int64_t>(kWord * sizeof(Value) + 64)) {
          expand_word(marks, values, there);
        } else {
          const char* value = values;
          for (; marks && value < end; marks &= marks - 1, value += sizeof(Value))
            std::memcpy(there + __builtin_ctzll(marks), value, sizeof(Value));
        }
        values += count * sizeof(Value);
      }
    for (int64_t column = 0; column < columns; column++) {
      Value* out = values_out + following[column];
      uint64_t marks = masks[column * words + word];
      following[column] += __builtin_popcountll(marks);
      for (; marks; marks &= marks - 1) *out++ = dense[__builtin_ctzll(marks) * stride + column];
    }
  }
}

template <typename Column>
void mark(const int64_t* starts, const Column* column_of, int64_t rows, int64_t width, uint8_t* masks) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t value = starts[row]; value < starts[row + 1]; value++)
      masks[row * width + column_of[value] / 8] |= static_cast<uint8_t>(1 << column_of[value] % 8);
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Rounded to nearest, ties to even, as floats.py does it.
struct Float32 {
  typedef uint32_t Value;
  static Value of(float value) { return bits_of(value); }
};

struct Bfloat16 {
  typedef uint16_t Value;
  static Value of(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<Value>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  typedef uint16_t Value;
  static Value of(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
    uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<Value>(sign | 0x7e00u);
    if (size >= 0x47800000u) return static_cast<Value>(sign | 0x7c00u);  // 65536
    if (size < 0x38800000u) {  // below the normal numbers: the sum has its last digit where that of float16 is
      const uint32_t half = 0x3f000000u;
      float magnitude, one_half;
      std::memcpy(&magnitude, &size, sizeof(magnitude));
      std::memcpy(&one_half, &half, sizeof(one_half));
      return static_cast<Value>(sign | (bits_of(magnitude + one_half) - half));
    }
    size += 0xfff + (size >> 13 & 1);
    return static_cast<Value>(sign | ((size - 0x38000000u) >> 13));
  }
};

// The scale and the offset of each element, in order. Lines are elements whose scales are one, or neighbours.
class Lines {
 public:
  Lines(int64_t inputs, int64_t inner, int64_t block, const float* scales, const float* offsets)
      : inputs_(inputs), inner_(inner), block_(block), scales_(scales), offsets_(offsets) {
    end_ = inner == 1 ? std::min(block, inputs) : inner;
  }
  int64_t end() const { return end_; }
  bool is_alone() const { return inner_ == 1; }
  float value(float level, int64_t place) const {
    const int64_t lane = is_alone() ? 0 : place - begin_;
    const float product = level * scales_[first_ + lane];
    return product + (offsets_ ? offsets_[first_ + lane] : 0.0f);
  }
  void next() {
    begin_ = end_;
    input_ += is_alone() ? std::min(block_, inputs_ - input_) : 1;
    if (input_ == inputs_) {
      input_ = 0;
      first_ += inner_;
    } else if (is_alone() || input_ % block_ == 0) {
      first_ += inner_;
    }
    end_ += is_alone() ? std::min(block_, inputs_ - input_) : inner_;
  }

 private:
  const int64_t inputs_, inner_, block_;
  const float *scales_, *offsets_;
  int64_t begin_ = 0, end_, input_ = 0, first_ = 0;
};

constexpr int kFew = 16;  // symbols whose values are worked out once for a line

template <typename To>
void decode(int width, const uint8_t* places, const uint8_t* symbols, int bits, int64_t number, int64_t count, Lines lines,
            const float* levels, bool at_places, typename To::Value* out) {
  typename To::Value known[kFew] = {};
  const bool few = bits < 8 && lines.is_alone();
  const unsigned mask = (1u << bits) - 1;
  const int shift = bits == 1 ? 3 : bits == 2 ? 2 : bits == 4 ? 1 : 0;
  const auto learn = [&] {
    if (few)
      for (unsigned symbol = 0; symbol <= mask; symbol++) known[symbol] = To::of(lines.value(levels[symbol], 0));
  };
  learn();
  int64_t taken = 0;
  for_places(width, places, number, count, [&](int64_t place) {
    if (place >= lines.end()) {
      while (place >= lines.end()) lines.next();
      learn();
    }
    const unsigned symbol = symbols[taken >> shift] >> (taken & ((1 << shift) - 1)) * bits & mask;
    out[at_places ? place : taken] = few ? known[symbol] : To::of(lines.value(levels[symbol], place));
    taken++;
  });
}

template <typename Value>
void unplane(const uint8_t* planes, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i++) {
    Value value = 0;
    for (size_t plane = 0; plane < sizeof(Value); plane++)
      value |= static_cast<Value>(static_cast<Value>(planes[plane * count + i]) << 8 * plane);
    std::memcpy(out + i * sizeof(Value), &value, sizeof(Value));
  }
}

// Calls a function with a null pointer to integers of some bytes.
template <typename Function>
inline void for_size(int size, const Function& function) {
  if (size == 1) function(static_cast<uint8_t*>(nullptr));
  if (size == 2) function(static_cast<uint16_t*>(nullptr));
  if (size == 4) function(static_cast<uint32_t*>(nullptr));
  if (size == 8) function(static_cast<uint64_t*>(nullptr));
}

}  // namespace

extern "C" {

// Writes `number` values of `size` bytes to their places among `count` elements, which are 0 before.
void hf_pdecay_expand(int width, const uint8_t* places, int size, const char* values, int64_t number, int64_t count,
                      void* dense) {
  for_size(size, [&](auto* none) {
    expand(width, places, values, number, count, static_cast<decltype(none)>(dense));
  });
}

// Writes the elements for which there are `number` symbols of some bits, to their places among `count` elements or one
// after the other. The tensor is of shape (outer, inputs, inner), with a scale for each block of inputs.
void hf_pdecay_decode(int width, const uint8_t* places, const uint8_t* symbols, int bits, int64_t number, int64_t count,
                      int64_t inputs, int64_t inner, int64_t block, const float* levels, const float* scales,
                      const float* offsets, int kind, int at_places, void* out) {
  const Lines lines(inputs, inner, block, scales, offsets);
  const auto run = [&](auto to) {
    typedef decltype(to) To;
    decode<To>(width, places, symbols, bits, number, count, lines, levels, at_places, static_cast<typename To::Value*>(out));
  };
  if (kind == 0) run(Float32{});
  if (kind == 1) run(Bfloat16{});
  if (kind == 2) run(Float16{});
}

// Puts the bytes of elements side by side that lie in planes.
void hf_pdecay_unplane(int width, const uint8_t* planes, int64_t count, uint8_t* out) {
  if (width == 2) unplane<uint16_t>(planes, count, out);
  if (width == 4) unplane<uint32_t>(planes, count, out);
  if (width == 8) unplane<uint64_t>(planes, count, out);
}

// Writes where each row of a matrix begins among its values, and their columns, as 2 or 4 bytes.
void hf_pdecay_rows(int width, const uint8_t* places, int64_t number, int64_t rows, int64_t columns, int64_t* starts,
                    int bytes, void* column_of) {
  if (bytes == 2) return rows_of(width, places, number, rows, columns, starts, static_cast<uint16_t*>(column_of));
  rows_of(width, places, number, rows, columns, starts, static_cast<uint32_t*>(column_of));
}

// The same for the transpose, with its values.
void hf_pdecay_columns(int width, const uint8_t* places, int size, const char* values, int64_t number, int64_t rows,
                       int64_t columns, int64_t* starts, int bytes, void* row_of, void* values_out) {
  for_size(size, [&](auto* none) {
    auto* out = static_cast<decltype(none)>(values_out);
    if (bytes == 2)
      columns_of(width, places, values, number, rows, columns, starts, static_cast<uint16_t*>(row_of), out);
    else
      columns_of(width, places, values, number, rows, columns, starts, static_cast<uint32_t*>(row_of), out);
  });
}

// Writes the masks of the transpose of a matrix in a bitmask, whose rows are whole words, and its values.
void hf_pdecay_turn(const uint8_t* places, int size, const char* values, int64_t number, int64_t rows, int64_t columns,
                    uint64_t* masks, void* values_out) {
  for_size(size, [&](auto* none) {
    turn(places, values, number, rows, columns, masks, static_cast<decltype(none)>(values_out));
  });
}

// Sets the bits of the values of each row; a row of bits has `width` bytes, which are 0 before.
void hf_pdecay_mark(const int64_t* starts, int bytes, const void* column_of, int64_t rows, int64_t width,
                    uint8_t* masks) {
  if (bytes == 2) return mark(starts, static_cast<const uint16_t*>(column_of), rows, width, masks);
  mark(starts, static_cast<const uint32_t*>(column_of), rows, width, masks);
}

}  // extern "C"
