// Weights that decay by units, or the 2 weakest of each 4: see unit_decay.py. Compiled together with weights.cpp and
// divisors.cpp.

namespace {

// The divisors of a block of weights that decay by units, from a table with one for each index of a dimension.
template <class P, class T>
inline void unit_divisors_of(const T* table, int64_t inner, int64_t length, const P* p, int64_t at, int n, bool keep_zeros,
                           T* divisor) {
  int64_t index = at / inner % length, left = inner - at % inner;
  for (int i = 0; i < n;) {
    if (inner == 1) {
      const int run = static_cast<int>(std::min<int64_t>(n - i, length - index));
      std::copy(table + index, table + index + run, divisor + i);
      index = index + run == length ? 0 : index + run;
      i += run;
    } else {
      const int run = static_cast<int>(std::min<int64_t>(n - i, left));
      std::fill(divisor + i, divisor + i + run, table[index]);
      left -= run;
      if (left == 0) {
        left = inner;
        index = index + 1 == length ? 0 : index + 1;
      }
      i += run;
    }
  }
  if (!keep_zeros) return;
  for (int i = 0; i < n; ++i) {
    if (load(p[i]) == 0) divisor[i] = std::numeric_limits<T>::infinity();
  }
}

// Of each 4 weights those that the second largest does not exceed are not divided.
template <class P, class T>
inline void spare_strongest(const P* __restrict p, int n, bool keep_zeros, T* __restrict divisor) {
#pragma omp simd
  for (int i = 0; i < n; i += 4) {
    const T a = std::fabs(load(p[i])), b = std::fabs(load(p[i + 1]));
    const T c = std::fabs(load(p[i + 2])), d = std::fabs(load(p[i + 3]));
    const T ab = a > b ? a : b, ba = a > b ? b : a, cd = c > d ? c : d, dc = c > d ? d : c;
    const T low = ab > cd ? cd : ab, high = ba > dc ? ba : dc;
    T second = low > high ? low : high;
    second = keep_zeros && second == T(0) ? std::numeric_limits<T>::min() : second;
    divisor[i] = a < second ? divisor[i] : T(1);
    divisor[i + 1] = b < second ? divisor[i + 1] : T(1);
    divisor[i + 2] = c < second ? divisor[i + 2] : T(1);
    divisor[i + 3] = d < second ? divisor[i + 3] : T(1);
  }
}

// --- sums of squares

struct Summed {  // one tensor
  const void* weights;
  void* sums;  // one for each index of a dimension, of the working dtype
  int64_t numel;
  int64_t inner, length;  // elements from one index of that dimension to the next, and how many indices there are
  int64_t dtype;
  const void* base;  // what the weights decay to, or null for 0
};

constexpr int64_t kLongRun = 32;  // from here on an index has so many neighbours that they are summed by themselves
constexpr int64_t kSegment = 1 << 11;

struct Share {
  int64_t row, begin, end;
};

// A weight, or its change from a base.
template <bool kToBase, class P>
inline auto distance(const P* w, const P* base, int64_t i) {
  return kToBase ? load(w[i]) - load(base[i]) : load(w[i]);
}

// Runs of one index from `begin` up to `end`, or, where runs are short, such columns of all the tensor's rows.
template <bool kToBase, class P, class T>
void add_squares(const Summed& row, int64_t begin, int64_t end) {
  const P* const weights = static_cast<const P*>(row.weights);
  const P* const bases = static_cast<const P*>(kToBase ? row.base : row.weights);
  T* const sums = static_cast<T*>(row.sums);
  if (row.inner >= kLongRun) {
    for (int64_t run = begin; run < end; ++run) {
      const P *const w = weights + run * row.inner, *const b = bases + run * row.inner;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < row.inner; ++i) {
        const T x = distance<kToBase>(w, b, i);
        sum += x * x;
      }
      sums[run % row.length] += sum;
    }
    return;
  }
  const int64_t width = row.inner * row.length;
  std::vector<T> columns(end - begin, T(0));
  T* const __restrict column = columns.data();
  for (int64_t first = 0; first < row.numel; first += width) {
    const P *const w = weights + first + begin, *const b = bases + first + begin;
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) {
      const T x = distance<kToBase>(w, b, i);
      column[i] += x * x;
    }
  }
  for (int64_t i = begin; i < end; ++i) sums[i / row.inner] += column[i - begin];
}

template <class P, class T>
void add_row(const Summed& row, int64_t begin, int64_t end) {
  row.base != nullptr ? add_squares<true, P, T>(row, begin, end) : add_squares<false, P, T>(row, begin, end);
}

// --- the divisors of units

struct Member {  // where the units of a layer lie in one tensor
  const void* sums;
  void* table;           // divisors, one for each index of the dimension, of the working dtype
  int64_t offset, size;  // index at which the first unit begins, and how many indices belong to one
  int64_t wide;          // whether the working dtype is double
};

struct Units {  // the units of one layer
  int64_t first, members;  // place of its first member, and how many there are
  int64_t begin, count;    // place of its first unit among those of all layers, and how many there are
  int64_t weights;         // in one unit
  int64_t wide;            // whether any member is
};

template <class T>
void add_members(const Member& member, const Units& units, double* total) {
  const T* sums = static_cast<const T*>(member.sums) + member.offset;
  for (int64_t unit = 0; unit < units.count; ++unit) {
    for (int64_t i = 0; i < member.size; ++i) total[unit] += *sums++;
  }
}

template <class T>
void spread(const double* divisors, const Member& member, const Units& units) {
  T* table = static_cast<T*>(member.table) + member.offset;
  for (int64_t unit = 0; unit < units.count; ++unit) {
    for (int64_t i = 0; i < member.size; ++i) *table++ = static_cast<T>(divisors[unit]);
  }
}

template <class T>
void divisors_of(const double* rms, int64_t count, double p_norm, double alpha_lambda, double* found) {
  bool decays;
  const Power<T> power = power_of<T>(p_norm, alpha_lambda, false, std::numeric_limits<T>::min(), &decays);
  if (!decays) {  // a dead unit stays dead
    const double at_zero = p_norm < 2 ? std::numeric_limits<double>::infinity() : 1.0;
    std::transform(rms, rms + count, found, [at_zero](double norm) { return norm == 0 ? at_zero : 1.0; });
    return;
  }
  T norm[kBlock], divisor[kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, count - at));
    std::transform(rms + at, rms + at + n, norm, [](double x) { return static_cast<T>(x); });
    divisors(norm, n, power, divisor);
    std::copy(divisor, divisor + n, found + at);
  }
}

}  // namespace

extern "C" {

// Adds up the squares of each row's weights index by index. Returns 0, or 1 for an unknown dtype.
int hf_pdecay_square_sums(const Summed* rows, int64_t count, int threads) {
  std::vector<Share> shares;
  for (int64_t i = 0; i < count; ++i) {
    const Summed& row = rows[i];
    if (row.dtype < kFloat32 || row.dtype > kFloat16) return 1;
    std::memset(row.sums, 0, row.length * (row.dtype == kFloat64 ? sizeof(double) : sizeof(float)));
    // No two threads have a share in the same sum, so that the order in which they are added up is always the same.
    const int64_t runs = row.inner >= kLongRun ? row.numel / row.inner : row.inner * row.length;
    const bool whole = row.inner >= kLongRun && runs != row.length;
    const int64_t step = whole ? runs
                         : row.inner >= kLongRun
                             ? std::max<int64_t>(1, (1 << 17) / row.inner)
                             : std::max<int64_t>(1, kSegment / row.inner) * row.inner;
    for (int64_t at = 0; at < runs; at += step) shares.push_back({i, at, std::min(runs, at + step)});
  }
  const int64_t total = static_cast<int64_t>(shares.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (total > 1)
  for (int64_t i = 0; i < total; ++i) {
    const Share& share = shares[i];
    const Summed& row = rows[share.row];
    switch (row.dtype) {
      case kFloat32: add_row<float, float>(row, share.begin, share.end); break;
      case kFloat64: add_row<double, double>(row, share.begin, share.end); break;
      case kBFloat16: add_row<bfloat16, float>(row, share.begin, share.end); break;
      default: add_row<float16, float>(row, share.begin, share.end);
    }
  }
  return 0;
}
// The root mean square of each unit of all layers, from the sums of squares.
void hf_pdecay_unit_norms(const Units* layers, int64_t count, const Member* members, double* rms, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Units& units = layers[i];
    double* const total = rms + units.begin;
    std::fill(total, total + units.count, 0.0);
    for (int64_t k = units.first; k < units.first + units.members; ++k) {
      if (members[k].wide) {
        add_members<double>(members[k], units, total);
      } else {
        add_members<float>(members[k], units, total);
      }
    }
    const double weights = static_cast<double>(units.weights);
    std::transform(total, total + units.count, total, [weights](double sum) { return std::sqrt(sum / weights); });
  }
}

// The divisor of each unit, and the tables of the tensors. `dormant`, which may be null, marks units that do not decay.
void hf_pdecay_unit_divisors(const Units* layers, int64_t count, const Member* members, const double* rms,
                              const uint8_t* dormant, double* divisors, double p_norm, double alpha_lambda,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Units& units = layers[i];
    double* const found = divisors + units.begin;
    if (units.wide) {
      divisors_of<double>(rms + units.begin, units.count, p_norm, alpha_lambda, found);
    } else {
      divisors_of<float>(rms + units.begin, units.count, p_norm, alpha_lambda, found);
    }
    for (int64_t unit = 0; dormant != nullptr && unit < units.count; ++unit) {
      if (dormant[units.begin + unit]) found[unit] = 1.0;
    }
    for (int64_t k = units.first; k < units.first + units.members; ++k) {
      if (members[k].wide) {
        spread<double>(found, members[k], units);
      } else {
        spread<float>(found, members[k], units);
      }
    }
  }
}
}
