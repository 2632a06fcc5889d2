// Runs a product of bitmask_product.cpp on a file of its arguments, on a processor that Python does not run on here.
// It follows the sources of the products.
#include <cstdio>

template <typename Number>
std::vector<Number> read(std::FILE* file) {
  int64_t count = 0;
  if (std::fread(&count, sizeof(count), 1, file) != 1) return {};
  std::vector<Number> numbers(count);
  if (std::fread(numbers.data(), sizeof(Number), count, file) != static_cast<size_t>(count)) return {};
  return numbers;
}

int main(int, char** names) {
  std::FILE* file = std::fopen(names[1], "rb");
  const std::vector<int64_t> head = read<int64_t>(file);  // kind, out, in, rows, words of a block
  const auto masks = read<uint64_t>(file);
  const auto starts = read<int64_t>(file);
  const auto values = read<char>(file);
  const auto scales = read<float>(file), shifts = read<float>(file), bias = read<float>(file), x = read<float>(file);
  std::fclose(file);
  const int kind = static_cast<int>(head[0]), threads = 2;
  const int64_t out = head[1], in = head[2], rows = head[3], block = head[4], room = (rows + 7) / 8 * 8 * ((in + 63) / 64 * 64);
  std::vector<float> y(rows * out), scratch(room * hf_pdecay_bitmask_rows()), dense(out * in);
  const uint64_t* bits = masks.empty() ? nullptr : masks.data();
  hf_pdecay_bitmask_product(kind, bits, starts.data(), values.data(), scales.data(), shifts.data(), bias.data(), out, in,
                            block, x.data(), 0, rows, y.data(), scratch.data(), threads);
  hf_pdecay_bitmask_dense(kind, kFloat32, bits, starts.data(), values.data(), scales.data(), in, block, 0, out, dense.data(),
                          scratch.data(), threads);
  std::FILE* results = std::fopen(names[2], "wb");
  std::fwrite(y.data(), sizeof(float), y.size(), results);
  std::fwrite(dense.data(), sizeof(float), dense.size(), results);
  return std::fclose(results);
}
