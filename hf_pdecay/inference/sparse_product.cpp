// Product of rows of activations with a sparse weight: y = x Wᵀ + b, for sparse_linear.py.
//
//   - W is in compressed sparse rows (CSR): of each row the values that are not zero, and their columns.
//   - Rows of x are taken kMost at a time, transposed, so that a value of W meets as many activations as vectors hold,
//     which lie side by side. Several values are in flight at once: a single sum would wait for its own last addition.
//   - Threads take blocks of rows of x, which stay in their caches, where there are many; else they share ranges of rows
//     of W that hold about as many values each.
//
// It follows values.cpp.

namespace {
namespace csr {

#ifdef __AVX512F__
constexpr int kLane = 16;
#else
constexpr int kLane = 8;
#endif
constexpr int kMost = 4 * kLane;  // rows of x in a block
constexpr int kTile = 16;         // rows of W whose results are written together

typedef float Vector __attribute__((vector_size(4 * kLane), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(4 * kLane)));

// The transpose of a square block of a matrix with `rows` rows; the others are zero. It works line by line, because the
// first cache holds only a few lines of a matrix whose lines lie a multiple of 4 KiB apart, as they often do.
inline void transpose_square(const float* from, int64_t from_stride, int64_t rows, float* to, int64_t to_stride) {
  Vector row[kLane];
#pragma GCC unroll 16
  for (int i = 0; i < kLane; i++)
    row[i] = i < rows ? *reinterpret_cast<const Vector*>(from + i * from_stride) : Vector{};
#if defined(__GNUC__) && !defined(__clang__)
  // Swap the parts beside the diagonal: single numbers, then pairs, and so on.
#pragma GCC unroll 4
  for (int size = 1; size < kLane; size *= 2) {
    Places low, high;
#pragma GCC unroll 16
    for (int k = 0; k < kLane; k++) {
      low[k] = k & size ? k - size + kLane : k;
      high[k] = k & size ? k + kLane : k + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLane; i++) {
      if (i & size) continue;
      const Vector a = row[i], b = row[i + size];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + size] = __builtin_shuffle(a, b, high);
    }
  }
#else
  for (int i = 0; i < kLane; i++)
    for (int j = 0; j < i; j++) {
      const float kept = row[i][j];
      row[i][j] = row[j][i];
      row[j][i] = kept;
    }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kLane; i++) *reinterpret_cast<Vector*>(to + i * to_stride) = row[i];
}

struct Weight {
  const int32_t* starts;  // [out + 1]
  const void* columns;    // [values], of 16 or 32 bits
  const void* values;
  const float* bias;  // [out], or null
  int64_t out, in;

  float shift(int64_t row) const { return bias ? bias[row] : 0.0f; }
};

// Results of rows first to last of W for `count` rows of x, which lie in `block` as [in][kVectors * kLane].
template <Kind kind, typename Column, int kVectors, int kFlight>
void many_rows(const Weight& w, const float* block, int64_t first, int64_t last, float* y, int64_t count) {
  constexpr int kWidth = kVectors * kLane;
  const Column* columns = static_cast<const Column*>(w.columns);
  float tile[kTile][kWidth];
  for (int64_t row = first; row < last; row += kTile) {
    const int64_t rows = std::min<int64_t>(kTile, last - row);
    for (int64_t i = 0; i < rows; i++) {
      Vector sum[kFlight][kVectors];
      for (int f = 0; f < kFlight; f++)
        for (int v = 0; v < kVectors; v++) sum[f][v] = Vector{};
      int64_t k = w.starts[row + i];
      const int64_t end = w.starts[row + i + 1];
      for (; k + kFlight <= end; k += kFlight)
#pragma GCC unroll 8
        for (int f = 0; f < kFlight; f++) {
          const Vector* x = reinterpret_cast<const Vector*>(block + int64_t{columns[k + f]} * kWidth);
          const float value = value_at<kind>(w.values, k + f);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; v++) sum[f][v] += value * x[v];
        }
      for (; k < end; k++) {
        const Vector* x = reinterpret_cast<const Vector*>(block + int64_t{columns[k]} * kWidth);
        for (int v = 0; v < kVectors; v++) sum[0][v] += value_at<kind>(w.values, k) * x[v];
      }
      for (int f = 1; f < kFlight; f++)
        for (int v = 0; v < kVectors; v++) sum[0][v] += sum[f][v];
      for (int v = 0; v < kVectors; v++) sum[0][v] += w.shift(row + i);
      std::memcpy(tile[i], sum[0], sizeof(float) * kWidth);
    }
    int64_t j = 0;
    if (rows == kTile)
      for (; j + kLane <= count; j += kLane)
        for (int i = 0; i < kTile; i += kLane)
          transpose_square(&tile[i][j], kWidth, kLane, y + j * w.out + row + i, w.out);
    for (; j < count; j++)
      for (int64_t i = 0; i < rows; i++) y[j * w.out + row + i] = tile[i][j];
  }
}

// The same for one row of x. Left to itself GCC would gather into vectors, which is slower.
template <Kind kind, typename Column>
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize", "no-tree-slp-vectorize"), noinline))
#endif
void one_row(const Weight& w, const float* x, int64_t first, int64_t last, float* y) {
  const Column* columns = static_cast<const Column*>(w.columns);
  for (int64_t row = first; row < last; row++) {
    float sum[8] = {};
    int64_t k = w.starts[row];
    const int64_t end = w.starts[row + 1];
    for (; k + 8 <= end; k += 8)
#pragma GCC unroll 8
      for (int f = 0; f < 8; f++) sum[f] += value_at<kind>(w.values, k + f) * x[columns[k + f]];
    for (; k < end; k++) sum[0] += value_at<kind>(w.values, k) * x[columns[k]];
    const float all = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    y[row] = all + w.shift(row);
  }
}

// Rows of x as [in][width]; rows that are not there are zeros.
void transpose(const float* x, int64_t count, int64_t in, int64_t width, float* block) {
  for (int64_t row = 0; row < width; row += kLane) {
    const int64_t rows = std::min<int64_t>(kLane, std::max<int64_t>(0, count - row));
    int64_t column = 0;
    for (; column + kLane <= in; column += kLane)
      transpose_square(x + row * in + column, in, rows, block + column * width + row, width);
    for (; column < in; column++)
      for (int64_t j = 0; j < kLane; j++)
        block[column * width + row + j] = j < rows ? x[(row + j) * in + column] : 0.0f;
  }
}

template <Kind kind, typename Column>
void product(const Weight& w, const float* x, int64_t count, float* y, float* scratch, int threads) {
  const int64_t held = w.starts[w.out];
  const int parts = threads * 4;
  std::vector<int64_t> ends(parts + 1, w.out);  // ranges of rows of W
  ends[0] = 0;
  for (int part = 1; part < parts; part++)
    ends[part] = std::lower_bound(w.starts, w.starts + w.out, static_cast<int32_t>(held * part / parts)) - w.starts;
  const bool alone = threads == 1 || held * count < (1 << 15);
  if (count == 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (!alone)
    for (int part = 0; part < parts; part++) one_row<kind, Column>(w, x, ends[part], ends[part + 1], y);
    return;
  }
  const int64_t width = count > 2 * kLane ? 4 * kLane : count > kLane ? 2 * kLane : kLane;
  const int64_t blocks = (count + width - 1) / width;
  const auto transposed = [&](int64_t b, float* block) {
    transpose(x + b * width * w.in, std::min(width, count - b * width), w.in, width, block);
  };
  const auto multiply = [&](int64_t b, const float* block, int64_t first, int64_t last) {
    const int64_t rows = std::min(width, count - b * width);
    float* results = y + b * width * w.out;
    if (width == 4 * kLane)
      many_rows<kind, Column, 4, 2>(w, block, first, last, results, rows);
    else if (width == 2 * kLane)
      many_rows<kind, Column, 2, 4>(w, block, first, last, results, rows);
    else
      many_rows<kind, Column, 1, 8>(w, block, first, last, results, rows);
  };
  if (blocks >= 4 * threads) {  // enough for each thread to have blocks of its own, which stay in its cache
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (!alone)
    for (int64_t b = 0; b < blocks; b++) {
      float* block = scratch + (alone ? 0 : omp_get_thread_num()) * w.in * width;
      transposed(b, block);
      multiply(b, block, 0, w.out);
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (!alone)
  for (int64_t group = 0; group < blocks; group += threads) {  // as many blocks as scratch has room for
    const int64_t here = std::min<int64_t>(threads, blocks - group);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < here; b++) transposed(group + b, scratch + b * w.in * width);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t b = 0; b < here; b++)
      for (int part = 0; part < parts; part++)
        multiply(group + b, scratch + b * w.in * width, ends[part], ends[part + 1]);
  }
}

}  // namespace csr
}  // namespace

extern "C" {

// The most rows of x that are taken together: scratch has room for threads * in * so many floats.
int hf_pdecay_block_rows() { return csr::kMost; }

void hf_pdecay_sparse_product(int kind, int narrow, const int32_t* starts, const void* columns, const void* values,
                              const float* bias, int64_t out, int64_t in, const float* x, int64_t count, float* y,
                              float* scratch, int threads) {
  using namespace csr;
  const Weight w{starts, columns, values, bias, out, in};
  for_kind(kind, [&](auto of) {
    if constexpr (of.value == kInt8)
      return;  // int8 values have scales, which the columns of CSR do not follow
    else if (narrow)
      product<of.value, uint16_t>(w, x, count, y, scratch, threads);
    else
      product<of.value, int32_t>(w, x, count, y, scratch, threads);
  });
}

}  // extern "C"
