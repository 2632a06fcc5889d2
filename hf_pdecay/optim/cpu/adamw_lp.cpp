// One AdamWLp step over many tensors on a CPU: every weight, gradient and moment is read once and written once.
//
// The arithmetic is that of foreach.py. Two things differ from it:
//   - |w|^x comes from two polynomials instead of log2 and exp2, see divisors.cpp.
//   - Tensors are split into chunks that all threads share, so many small tensors cost no more than a few large ones.
// Without decay it is torch.optim.AdamW up to rounding. Compiled together with the other files that step.py names.

namespace {

constexpr int64_t kLeastChunk = 1 << 12, kMostChunk = 1 << 17;  // elements a thread takes at a time
constexpr int64_t kCheckChunk = 1 << 18;
constexpr int kStreams = 4;  // places read at once in a check: one stream does not fill the memory bus

// --- the interface: plain numbers, filled in by step.py

struct Row {  // one tensor
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* step;  // increased here
  int64_t numel;
  int64_t hyper;  // index into the hyperparameters
  int64_t index;  // place of the tensor in the optimizer, for the random bits
  int64_t param_dtype;
  int64_t moment_dtype;
  int64_t asleep;  // whether the tensor was wholly zero at the start and still is
  // For a tensor that decays by units, the divisor of each index of a dimension, of the working dtype; else null.
  const void* divisors;
  int64_t inner, length;  // elements from one index of that dimension to the next, and how many indices there are
  int64_t by_four;        // whether only the 2 weakest of each 4 consecutive weights decay
  // For moments in 8 bits, whose codes are at exp_avg and exp_avg_sq: their scales and the numbers that codes stand for.
  float *exp_avg_scale, *exp_avg_sq_scale;
  const float *exp_avg_map, *exp_avg_sq_map;
  const void* base;  // what the weights decay to, of their dtype, or null for 0
};

constexpr int64_t kRow = 20;

struct Hyper {  // one param group
  double lr, beta1, beta2, eps, weight_decay, p_norm, lambda_p, keep_zeros, maximize, decays;
};

// --- one tensor's scalars

template <class T>
Scalars<T> scalars_of(const Hyper& h, const Row& row, double least, double tiny, bool* decays) {
  const double step = *row.step;
  Scalars<T> s;
  s.keep_zeros = h.keep_zeros != 0;
  const bool keep_zeros = s.keep_zeros && row.base == nullptr;  // else zeros are not those of what decays
  static_cast<Power<T>&>(s) = power_of<T>(h.p_norm, h.lr * h.lambda_p, keep_zeros, tiny, decays);
  *decays = *decays && row.asleep == 0;
  s.beta1 = static_cast<T>(h.beta1);
  s.weight1 = static_cast<T>(h.maximize != 0 ? h.beta1 - 1 : 1 - h.beta1);  // the second moment knows no sign
  s.beta2 = static_cast<T>(h.beta2);
  s.weight2 = static_cast<T>(1 - h.beta2);
  s.scale2 = static_cast<T>(1 / std::sqrt(1 - std::pow(h.beta2, step)));
  s.eps = static_cast<T>(h.eps);
  s.least = static_cast<T>(least);
  s.step_size = static_cast<T>(h.lr / (1 - std::pow(h.beta1, step)));
  s.shrink_l2 = static_cast<T>(1 - h.lr * h.weight_decay);
  s.nearest = h.decays == 0 && row.param_dtype == row.moment_dtype ? ~0u : 0u;
  s.noise_a = mix(static_cast<uint32_t>(step) + static_cast<uint32_t>(row.index) * 0x9e3779b9u);
  s.noise_b = mix(s.noise_a ^ 0x68e31da4u);
  return s;
}

// --- the step on a run of elements

// Up to kBlock changes of weights from `base` on, as numbers of the working dtype.
template <class P, class T>
inline void changes_of(const P* __restrict p, const P* __restrict base, int n, T* __restrict change) {
#pragma omp simd
  for (int i = 0; i < n; ++i) change[i] = load(p[i]) - load(base[i]);
}

// Up to kBlock elements from `at` on, with their moments.
template <Decay kDecay, class P, class M, class T>
inline void step_block(const Row& row, const Scalars<T>& s, int64_t at, int n, M* m, M* v) {
  P* const p = static_cast<P*>(row.param) + at;
  const P* const g = static_cast<const P*>(row.grad) + at;
  T divisor[kBlock];
  // The memory would be idle while the divisors are computed. In one loop over all it never is, and hints cost time.
  constexpr bool kOneLoop = kInLanes<T> && (kDecay == kElements || kDecay == kNone);
  for (int i = 0; i < (kOneLoop ? 0 : kBlock); i += 16) {
    PREFETCH(p + kPrefetch + i);
    PREFETCH(g + kPrefetch + i);
    PREFETCH(m + kPrefetch + i);
    PREFETCH(v + kPrefetch + i);
    if (row.base != nullptr) PREFETCH(static_cast<const P*>(row.base) + at + kPrefetch + i);
  }
  if (kDecay != kNone && row.base != nullptr) {
    const P* const base = static_cast<const P*>(row.base) + at;
    T change[kBlock];
    if (!kOneLoop) changes_of(p, base, n, change);
    if (kDecay == kUnits) {
      unit_divisors_of(static_cast<const T*>(row.divisors), row.inner, row.length, p, at, n, false, divisor);
    } else if (!kOneLoop) {
      divisors(change, n, s, divisor);
      if (kDecay == kByFour) spare_strongest(change, n, false, divisor);
    }
    update_to_base<kDecay>(p, base, g, m, v, change, divisor, n, static_cast<uint32_t>(at), s);
    return;
  }
  if (kDecay == kUnits) {
    unit_divisors_of(static_cast<const T*>(row.divisors), row.inner, row.length, p, at, n, s.keep_zeros, divisor);
  } else if (kDecay == kByFour || (kDecay == kElements && !kInLanes<T>)) {
    divisors(p, n, s, divisor);
    if (kDecay == kByFour) spare_strongest(p, n, s.keep_zeros, divisor);
  }
  update<kDecay>(p, g, m, v, divisor, n, static_cast<uint32_t>(at), s);
}

template <Decay kDecay, class P, class M, class T>
void step_chunk(const Row& row, const Scalars<T>& shared, int64_t begin, int64_t end) {
  const Scalars<T> s = shared;  // a copy that no store to a tensor can change, as the compiler sees it
  M* const exp_avg = static_cast<M*>(row.exp_avg);
  M* const exp_avg_sq = static_cast<M*>(row.exp_avg_sq);
  int64_t at = begin;
  // With a constant size the compiler makes loops without a remainder.
  for (; at + kBlock <= end; at += kBlock) step_block<kDecay, P>(row, s, at, kBlock, exp_avg + at, exp_avg_sq + at);
  if (at < end) step_block<kDecay, P>(row, s, at, static_cast<int>(end - at), exp_avg + at, exp_avg_sq + at);
}

// Moments in 8 bits are numbers for as long as their block is worked on.
template <Decay kDecay, class P>
void step_encoded(const Row& row, const Scalars<float>& shared, const Encoder& first, const Encoder& second,
                  int64_t begin, int64_t end) {
  const Scalars<float> s = shared;
  float exp_avg[kScaled], exp_avg_sq[kScaled];
  for (int64_t at = begin; at < end; at += kScaled) {
    uint8_t* const m = static_cast<uint8_t*>(row.exp_avg) + at;
    uint8_t* const v = static_cast<uint8_t*>(row.exp_avg_sq) + at;
    const int64_t block = at / kScaled;
    first.decode(m, row.exp_avg_scale[block], exp_avg);
    second.decode(v, row.exp_avg_sq_scale[block], exp_avg_sq);
    for (int i = 0; i < kScaled; i += kBlock) {
      step_block<kDecay, P>(row, s, at + i, kBlock, exp_avg + i, exp_avg_sq + i);
    }
    row.exp_avg_scale[block] = first.encode(exp_avg, m);
    row.exp_avg_sq_scale[block] = second.encode(exp_avg_sq, v);
  }
}

// --- the decay alone, of weights that another optimizer has stepped: `grad` is their copy from before that

template <class P, class T>
void decay_chunk(const Row& row, const Scalars<T>& shared, int64_t begin, int64_t end) {
  const Scalars<T> s = shared;
  P* const param = static_cast<P*>(row.param);
  const P* const before = static_cast<const P*>(row.grad);
  T divisor[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    P* const __restrict p = param + at;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - at));
    for (int i = 0; i < kBlock; i += 16) {
      PREFETCH(p + kPrefetch + i);
      PREFETCH(before + at + kPrefetch + i);
    }
    const uint32_t first = static_cast<uint32_t>(at);
    if (row.base != nullptr) {
      const P* const base = static_cast<const P*>(row.base) + at;
      T change[kBlock];
      changes_of(before + at, base, n, change);
      divisors(change, n, s, divisor);
      for (int i = 0; i < n; ++i) {
        const uint32_t noise = noise_at(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b);
        const bool kept = s.keep_zeros && load(before[at + i]) == 0;
        store_to_base(p[i], base[i], static_cast<T>(load(p[i])), change[i], divisor[i], kept, noise, 0);
      }
      continue;
    }
    divisors(before + at, n, s, divisor);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      T result = load(p[i]) / divisor[i];
      const T least = divisor[i] > T(1) ? std::numeric_limits<T>::min() : T(0);
      result = std::fabs(result) < least ? T(0) : result + T(0);
      store(p[i], result, noise_at(first + static_cast<uint32_t>(i), s.noise_a, s.noise_b), 0);
    }
  }
}

struct Chunk {
  int64_t row, begin, end;
};

std::vector<Chunk> chunks_of(const int64_t* numel, int64_t stride, int64_t count, int64_t size) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t n = numel[row * stride];
    for (int64_t at = 0; at < n; at += size) chunks.push_back({row, at, std::min(n, at + size)});
  }
  return chunks;
}

struct Task {  // everything about one tensor that its chunks share
  Scalars<float> single;
  Scalars<double> wide;
  const Encoder *first, *second;
  void (*run)(const Row&, const Task&, int64_t, int64_t);
};

template <Decay kDecay, class P, class M>
void run_single(const Row& row, const Task& task, int64_t begin, int64_t end) {
  step_chunk<kDecay, P, M>(row, task.single, begin, end);
}
template <Decay kDecay>
void run_wide(const Row& row, const Task& task, int64_t begin, int64_t end) {
  step_chunk<kDecay, double, double>(row, task.wide, begin, end);
}

template <Decay kDecay, class P>
void run_encoded(const Row& row, const Task& task, int64_t begin, int64_t end) {
  step_encoded<kDecay, P>(row, task.single, *task.first, *task.second, begin, end);
}

template <class P>
void decay_single(const Row& row, const Task& task, int64_t begin, int64_t end) {
  decay_chunk<P>(row, task.single, begin, end);
}
void decay_wide(const Row& row, const Task& task, int64_t begin, int64_t end) {
  decay_chunk<double>(row, task.wide, begin, end);
}

Decay decay_of(const Row& row, bool decays) {
  return row.divisors != nullptr ? kUnits : !decays ? kNone : row.by_four ? kByFour : kElements;
}

template <class P, class M>
void task_single(Task* task, const Hyper& hyper, const Row& row, double least) {
  bool decays;
  task->single = scalars_of<float>(hyper, row, least, std::numeric_limits<float>::min(), &decays);
  switch (decay_of(row, decays)) {
    case kNone: task->run = run_single<kNone, P, M>; break;
    case kElements: task->run = run_single<kElements, P, M>; break;
    case kUnits: task->run = run_single<kUnits, P, M>; break;
    case kByFour: task->run = run_single<kByFour, P, M>; break;
  }
}

template <class P>
void task_encoded(Task* task, const Hyper& hyper, const Row& row) {
  bool decays;
  task->single = scalars_of<float>(hyper, row, 0, std::numeric_limits<float>::min(), &decays);
  task->first = encoder_of(row.exp_avg_map);
  task->second = encoder_of(row.exp_avg_sq_map);
  switch (decay_of(row, decays)) {
    case kNone: task->run = run_encoded<kNone, P>; break;
    case kElements: task->run = run_encoded<kElements, P>; break;
    case kUnits: task->run = run_encoded<kUnits, P>; break;
    case kByFour: task->run = run_encoded<kByFour, P>; break;
  }
}

void task_wide(Task* task, const Hyper& hyper, const Row& row) {
  bool decays;
  task->wide = scalars_of<double>(hyper, row, 0, std::numeric_limits<double>::min(), &decays);
  switch (decay_of(row, decays)) {
    case kNone: task->run = run_wide<kNone>; break;
    case kElements: task->run = run_wide<kElements>; break;
    case kUnits: task->run = run_wide<kUnits>; break;
    case kByFour: task->run = run_wide<kByFour>; break;
  }
}

constexpr int64_t pair(int64_t param, int64_t moment) { return param * 8 + moment; }

bool make_task(Task* task, const Hyper& hyper, const Row& row) {
  // A second moment below float16's smallest number is stored as 0, and m / (0 + eps) is not a useful step.
  const double half = hyper.eps < 0x1p-25 ? 0x1p-12 : 0.0;
  switch (pair(row.param_dtype, row.moment_dtype)) {
    case pair(kFloat32, kFloat32): task_single<float, float>(task, hyper, row, 0); return true;
    case pair(kFloat32, kBFloat16): task_single<float, bfloat16>(task, hyper, row, 0); return true;
    case pair(kFloat32, kEightBit): task_encoded<float>(task, hyper, row); return true;
    case pair(kBFloat16, kFloat32): task_single<bfloat16, float>(task, hyper, row, 0); return true;
    case pair(kBFloat16, kBFloat16): task_single<bfloat16, bfloat16>(task, hyper, row, 0); return true;
    case pair(kBFloat16, kEightBit): task_encoded<bfloat16>(task, hyper, row); return true;
    case pair(kFloat16, kFloat32): task_single<float16, float>(task, hyper, row, 0); return true;
    case pair(kFloat16, kFloat16): task_single<float16, float16>(task, hyper, row, half); return true;
    case pair(kFloat16, kEightBit): task_encoded<float16>(task, hyper, row); return true;
    case pair(kFloat64, kFloat64): task_wide(task, hyper, row); return true;
    default: return false;
  }
}

// For a row without moments, which names the dtype of its weights for them.
bool make_decay_task(Task* task, const Hyper& hyper, const Row& row) {
  if (!make_task(task, hyper, row)) return false;
  switch (row.param_dtype) {
    case kFloat32: task->run = decay_single<float>; break;
    case kBFloat16: task->run = decay_single<bfloat16>; break;
    case kFloat16: task->run = decay_single<float16>; break;
    default: task->run = decay_wide;
  }
  return true;
}

void run_all(const Row* rows, int64_t count, const std::vector<Task>& tasks, int threads) {
  static_assert(sizeof(Row) == kRow * sizeof(int64_t), "a row is twenty numbers of 64 bits");
  int64_t numel = 0;
  for (int64_t i = 0; i < count; ++i) numel += rows[i].numel;
  const int64_t share = numel / (8 * std::max(threads, 1)) / kScaled * kScaled;  // a few chunks for each thread
  const auto chunks = chunks_of(&rows->numel, kRow, count, std::min(std::max(share, kLeastChunk), kMostChunk));
  const int64_t total = static_cast<int64_t>(chunks.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (total > 1)
  for (int64_t i = 0; i < total; ++i) {
    const Chunk& chunk = chunks[i];
    tasks[chunk.row].run(rows[chunk.row], tasks[chunk.row], chunk.begin, chunk.end);
  }
}

// The largest magnitude in a run, as bits, in which infinities and NaN are larger than all finite numbers.
template <class Bits>
Bits largest(const Bits* values, int64_t n, Bits mask) {
  Bits most = 0;
  const int64_t length = n / kStreams;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < length; ++i) {
    for (int k = 0; k < kStreams; ++k) most = std::max<Bits>(most, values[i + k * length] & mask);
  }
  for (int64_t i = length * kStreams; i < n; ++i) most = std::max<Bits>(most, values[i] & mask);
  return most;
}

bool finite(const void* values, int64_t dtype, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  switch (dtype) {
    case kFloat32: return largest(static_cast<const int32_t*>(values) + begin, n, 0x7fffffff) < 0x7f800000;
    case kFloat64:
      return largest(static_cast<const int64_t*>(values) + begin, n, int64_t(0x7fffffffffffffff)) < 0x7ff0000000000000;
    case kBFloat16: return largest(static_cast<const int16_t*>(values) + begin, n, int16_t(0x7fff)) < 0x7f80;
    default: return largest(static_cast<const int16_t*>(values) + begin, n, int16_t(0x7fff)) < 0x7c00;
  }
}

}  // namespace

extern "C" {

// Whether steps are done in lanes.cpp's registers.
int hf_pdecay_lanes() { return HF_PDECAY_LANES; }

// Does one step on each row. Returns 0, or 1 before anything is written if a row has unknown dtypes.
int hf_pdecay_step(const Row* rows, int64_t count, const Hyper* hypers, int threads) {
  std::vector<Task> tasks(count);
  for (int64_t i = 0; i < count; ++i) {
    Row counted = rows[i];
    float next = *rows[i].step + 1;
    counted.step = &next;
    if (!make_task(&tasks[i], hypers[rows[i].hyper], counted)) return 1;
  }
  for (int64_t i = 0; i < count; ++i) *rows[i].step += 1;
  run_all(rows, count, tasks, threads);
  return 0;
}

// Decays the weights of each row by factors of `grad`, their copy from before a step. Returns as hf_pdecay_step does.
int hf_pdecay_decay(const Row* rows, int64_t count, const Hyper* hypers, int threads) {
  std::vector<Task> tasks(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!make_decay_task(&tasks[i], hypers[rows[i].hyper], rows[i])) return 1;
  }
  run_all(rows, count, tasks, threads);
  return 0;
}

// Whether all gradients are finite.
int hf_pdecay_all_finite(const Row* rows, int64_t count, int threads) {
  const auto chunks = chunks_of(&rows->numel, kRow, count, kCheckChunk);
  const int64_t total = static_cast<int64_t>(chunks.size());
  int bad = 0;
  // From the last to the first: the step begins with the first, which is then still in the cache.
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : bad) if (total > 1)
  for (int64_t i = 0; i < total; ++i) {
    const Chunk& chunk = chunks[total - 1 - i];
    const Row& row = rows[chunk.row];
    bad |= !finite(row.grad, row.param_dtype, chunk.begin, chunk.end);
  }
  return bad == 0;
}
}
