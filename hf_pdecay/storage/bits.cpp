// Values that a bitmask places, for bits.py. Numbers are little-endian, and values are copied bit by bit.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kWord = 64;

// Calls `take` with the index of each bit that is 1, in order.
template <typename Function>
inline void for_bits(const uint8_t* bits, int64_t count, const Function& take) {
  for (int64_t begin = 0; begin < count; begin += kWord) {
    uint64_t word = 0;
    std::memcpy(&word, bits + begin / 8, std::min<int64_t>(8, (count - begin + 7) / 8));
    for (; word; word &= word - 1) take(begin + __builtin_ctzll(word));
  }
}

template <typename Value>
void expand(const uint8_t* bits, const char* values, int64_t count, Value* dense) {
  for_bits(bits, count, [&](int64_t place) {
    std::memcpy(dense + place, values, sizeof(Value));  // which may not be aligned
    values += sizeof(Value);
  });
}

// Rows begin with whole words in both masks. The columns' bits and values lie close enough for the second cache.
template <typename Value>
void transpose(const uint8_t* masks, const char* values, int64_t rows, int64_t columns, uint8_t* masks_out,
               Value* values_out) {
  const int64_t width = (columns + kWord - 1) / kWord * 8, width_out = (rows + kWord - 1) / kWord * 8;
  std::vector<int64_t> following(columns + 1, 0);  // of each column, where its next value goes
  for (int64_t row = 0; row < rows; row++)
    for_bits(masks + row * width, columns, [&](int64_t column) {
      masks_out[column * width_out + row / 8] |= static_cast<uint8_t>(1 << row % 8);
      following[column + 1]++;
    });
  for (int64_t column = 0; column < columns; column++) following[column + 1] += following[column];
  for (int64_t row = 0; row < rows; row++)
    for_bits(masks + row * width, columns, [&](int64_t column) {
      std::memcpy(values_out + following[column]++, values, sizeof(Value));
      values += sizeof(Value);
    });
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

// Writes values of `size` bytes to the places of `count` elements whose bit is 1.
void hf_pdecay_expand(int size, const uint8_t* bits, const char* values, int64_t count, void* dense) {
  for_size(size, [&](auto* none) { expand(bits, values, count, static_cast<decltype(none)>(dense)); });
}

// Writes the masks, which are 0 before, and the values of the transpose of a matrix.
void hf_pdecay_transpose_bits(int size, const uint8_t* masks, const char* values, int64_t rows, int64_t columns,
                              uint8_t* masks_out, void* values_out) {
  for_size(size, [&](auto* none) {
    transpose(masks, values, rows, columns, masks_out, static_cast<decltype(none)>(values_out));
  });
}

}  // extern "C"
