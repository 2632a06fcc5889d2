// Rounds float32 weights to codes, and pulls gradients back, one block after the other, which stays in L1.
//
// transform.py has the formulas. A block is seen as rows of lanes: with inputs in the last dimension the lanes are
// neighbours in it, and their sums are added up; otherwise each lane is a block of its own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// The compiler would unroll such a loop, and then vectorise nothing.
#define LANES(L)      \
  _Pragma("omp simd") \
  for (int l = 0; l < (L); ++l)

namespace {

constexpr int kLanes = 16;
constexpr int64_t kLargest = 128;  // weights of a block
constexpr float kLeast = 1e-15f;   // _LEAST in transform.py
constexpr float kRidge = 0.01f;    // RIDGE

struct Grid {
  float low, high, step;  // step 0: from the range
  int affine, odd, nonzero;
};

template <int L>
using Lane = float[L];

template <int L>
inline void clear(Lane<L>& a) {
  LANES(L) a[l] = 0;
}

// Adds up lanes that are parts of one block, in each of them.
template <int L, bool kTogether>
inline void add_up(Lane<L>& a) {
  if (!kTogether) return;
  for (int half = L / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) a[l] += a[l + half];
  for (int l = 1; l < L; ++l) a[l] = a[0];
}

template <int L, bool kTogether>
inline void largest_of(Lane<L>& a) {
  if (!kTogether) return;
  for (int half = L / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) a[l] = std::max(a[l], a[l + half]);
  for (int l = 1; l < L; ++l) a[l] = a[0];
}

// Rounds to bfloat16.
inline float narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// `rows` rows of L lanes. What is worked out once is read by all that follows.
template <int L, bool kTogether>
struct Block {
  int64_t rows;
  float count;  // weights of a block
  float x[kLargest][L], q[kLargest][L];
  Lane<L> step, scale, mean, code, energy, alike;

  void read(const float* from, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) x[r][l] = from[r * stride + l];
  }

  // t and the codes of x; without an offset.
  void encode_linear(const Grid& grid) {
    Lane<L> largest, squares, nonzero;
    clear<L>(largest), clear<L>(squares), clear<L>(nonzero);
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        largest[l] = std::max(largest[l], std::fabs(x[r][l]));
        squares[l] += x[r][l] * x[r][l];
        nonzero[l] += x[r][l] != 0 ? 1.0f : 0.0f;
      }
    largest_of<L, kTogether>(largest), add_up<L, kTogether>(squares), add_up<L, kTogether>(nonzero);
    LANES(L) {
      const float by_range = largest[l] / grid.high;
      const float by_squares = grid.step * std::sqrt(squares[l] / std::max(nonzero[l], 1.0f));
      alike[l] = largest[l] < kLeast ? 1.0f : 0.0f;
      step[l] = alike[l] != 0 ? 1.0f : grid.step == 0 ? by_range : by_squares;
      mean[l] = code[l] = 0;
    }
    Lane<L> inverse;
    LANES(L) inverse[l] = (grid.odd ? 0.5f : 1.0f) / step[l];
    const float least = grid.nonzero ? 1.0f : 0.0f;
    for (int64_t r = 0; r < rows; ++r) {
      if (grid.odd)
        LANES(L) q[r][l] = 2 * std::floor(std::fabs(x[r][l]) * inverse[l]) + 1;
      else
        LANES(L) q[r][l] = std::max(std::nearbyint(std::fabs(x[r][l]) * inverse[l]), least);
      LANES(L) {
        const float c = std::min(q[r][l], grid.high), w = x[r][l];
        q[r][l] = w > 0 ? c : w < 0 ? -c : 0.0f;
      }
    }
  }

  // t, b and the codes of x, which are centred then, as x is.
  void encode_affine(const Grid& grid) {
    Lane<L> most, least, squares, offset;
    LANES(L) most[l] = x[0][l], least[l] = -x[0][l];
    clear<L>(mean), clear<L>(squares), clear<L>(code);
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        most[l] = std::max(most[l], x[r][l]);
        least[l] = std::max(least[l], -x[r][l]);
        mean[l] += x[r][l];
      }
    largest_of<L, kTogether>(most), largest_of<L, kTogether>(least), add_up<L, kTogether>(mean);
    LANES(L) mean[l] /= count;
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) squares[l] += (x[r][l] - mean[l]) * (x[r][l] - mean[l]);
    add_up<L, kTogether>(squares);
    LANES(L) {
      const float range = most[l] + least[l];
      alike[l] = range < kLeast ? 1.0f : 0.0f;
      step[l] = grid.step == 0 ? range / (grid.high - grid.low) : grid.step * std::sqrt(squares[l] / count);
      offset[l] = grid.step == 0 ? -least[l] - grid.low * step[l] : mean[l] - (grid.low + grid.high) / 2 * step[l];
      if (alike[l] != 0) step[l] = 1.0f;
    }
    Lane<L> inverse;
    LANES(L) inverse[l] = 1 / step[l];
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        const float c = std::nearbyint((x[r][l] - offset[l]) * inverse[l]);
        q[r][l] = std::min(std::max(c, grid.low), grid.high);
        code[l] += q[r][l];
      }
    add_up<L, kTogether>(code);
    LANES(L) code[l] /= count;
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) q[r][l] -= code[l], x[r][l] -= mean[l];
  }

  void fit(const Grid& grid) {
    if (grid.affine) encode_affine(grid);
    else encode_linear(grid);
    clear<L>(energy), clear<L>(scale);
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) energy[l] += q[r][l] * q[r][l], scale[l] += q[r][l] * x[r][l];
    add_up<L, kTogether>(energy), add_up<L, kTogether>(scale);
    LANES(L) energy[l] += kRidge * count, scale[l] /= energy[l];
  }

  void decode(const Grid& grid, float* to, int64_t stride) const {
    Lane<L> rough, above, base;  // the scale in bfloat16, minus the least code, and what that stands for
    for (int l = 0; l < L; ++l) rough[l] = narrow(scale[l]);
    if (!grid.affine) {
      for (int64_t r = 0; r < rows; ++r)
        LANES(L) to[r * stride + l] = rough[l] * q[r][l] + 0.0f;
      return;
    }
    LANES(L) above[l] = -q[0][l];
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) above[l] = std::max(above[l], -q[r][l]);
    largest_of<L, kTogether>(above);
    for (int l = 0; l < L; ++l) base[l] = narrow(mean[l] - rough[l] * above[l]);
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        const float fitted = rough[l] * std::nearbyint(q[r][l] + above[l]) + base[l];
        to[r * stride + l] = alike[l] != 0 ? x[r][l] + mean[l] : fitted;
      }
  }

  void pull_back(const Grid& grid, const float* above, float* to, int64_t stride) const {
    Lane<L> base, pull, ratio, by_weight, by_code;
    clear<L>(base), clear<L>(pull);
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        const float g = above[r * stride + l];
        base[l] += g;
        pull[l] += g * q[r][l];
      }
    add_up<L, kTogether>(base), add_up<L, kTogether>(pull);
    LANES(L) {
      base[l] = grid.affine ? base[l] / count : 0.0f;
      ratio[l] = scale[l] / step[l];
      by_weight[l] = pull[l] / energy[l] / step[l];
      by_code[l] = pull[l] / energy[l] * (1 - 2 * ratio[l]);
      if (alike[l] != 0) base[l] = by_weight[l] = by_code[l] = 0, ratio[l] = 1;
    }
    for (int64_t r = 0; r < rows; ++r)
      LANES(L) {
        const float g = above[r * stride + l] - base[l];
        to[r * stride + l] = base[l] + ratio[l] * g + by_weight[l] * x[r][l] + by_code[l] * q[r][l];
      }
  }

  void run(const Grid& grid, const float* weights, const float* above, float* to, int64_t stride) {
    read(weights, stride);
    fit(grid);
    if (above == nullptr) decode(grid, to, stride);
    else pull_back(grid, above, to, stride);
  }
};

template <int L, bool kTogether>
inline void block(const Grid& grid, int64_t size, const float* x, const float* above, float* to, int64_t stride) {
  Block<L, kTogether> work;
  work.rows = kTogether ? size / L : size;
  work.count = static_cast<float>(size);
  work.run(grid, x, above, to, stride);
}

}  // namespace

extern "C" {

// Writes the rounded weights, or with gradients `above` the gradients of the weights, to `to`. All three are of shape
// (outer, inputs, inner), without gaps.
void hf_pdecay_round(const float* x, const float* above, float* to, int64_t outer, int64_t inputs, int64_t inner,
                     float low, float high, float step, int affine, int odd, int nonzero, int threads) {
  const Grid grid{low, high, step, affine, odd, nonzero};
  const int64_t blocks = (inputs + kLargest - 1) / kLargest;
  // Neighbouring lanes of a block that are worked on at once, and how many such parts there are.
  const int64_t wide = inner / kLanes, parts = wide + inner % kLanes, total = outer * blocks * parts;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < total; ++i) {
    const int64_t part = i % parts, first = i / parts % blocks * kLargest, row = i / parts / blocks;
    const int64_t lane = part < wide ? part * kLanes : wide * kLanes + part - wide;
    const int64_t at = (row * inputs + first) * inner + lane, size = std::min(kLargest, inputs - first);
    const float* const g = above == nullptr ? nullptr : above + at;
    if (part < wide) block<kLanes, false>(grid, size, x + at, g, to + at, inner);
    else if (inner == 1 && size % kLanes == 0) block<kLanes, true>(grid, size, x + at, g, to + at, kLanes);
    else block<1, false>(grid, size, x + at, g, to + at, inner);
  }
}
}
