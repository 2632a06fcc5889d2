// Moments in 8 bits, as torchao stores them: 256 values share a scale, and each is one of the 256 numbers of a map.
// Compiled together with weights.cpp.

namespace {

constexpr int kScaled = 256;  // values that share a scale

// Which number of a map is nearest to a value, as torchao's quantize_8bit_with_qmap finds it by a search. Here values go
// into buckets by the first bits of their magnitude, so narrow that at most one border between two numbers lies in each.
class Encoder {
 public:
  explicit Encoder(const float* map) {
    std::copy(map, map + 256, map_);
    for (int i = 0; i < 255; ++i) borders_[i] = border(map[i], map[i + 1]);
    borders_[255] = std::numeric_limits<float>::infinity();
    for (int negative = 0; negative < 2; ++negative) {
      for (int32_t k = 0; k < kBuckets; ++k) {
        // The least and the largest value of the bucket; the first has all magnitudes below it too, to 0.
        const float near = k == 0 ? 0.0f : bit_cast<float>((kFirst + k) << kShift);
        const float far = bit_cast<float>(((kFirst + k + 1) << kShift) - 1);
        const float least = negative ? -far : near, most = negative ? -near : far;
        const int below = static_cast<int>(std::upper_bound(borders_, borders_ + 255, least) - borders_);
        const int within = static_cast<int>(std::upper_bound(borders_, borders_ + 255, most) - borders_) - below;
        borders_below_[negative * kBuckets + k] = static_cast<uint8_t>(below);
        narrow_ = narrow_ && within < 2;
      }
    }
  }

  bool is_of(const float* map) const { return std::memcmp(map, map_, sizeof map_) == 0; }

  void decode(const uint8_t* codes, float scale, float* values) const {
#pragma omp simd
    for (int i = 0; i < kScaled; ++i) values[i] = map_[codes[i]] * scale;
  }

  // Returns the scale. A NaN or an infinity makes it one, and so all of the values when they are read again.
  float encode(const float* values, uint8_t* codes) const {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < kScaled; ++i) most = std::max(most, bit_cast<int32_t>(values[i]) & 0x7fffffff);
    const float largest = bit_cast<float>(most), scale = largest < 1e-12f ? 1e-12f : largest;
    float scaled[kScaled];
    int32_t places[kScaled];
#pragma omp simd
    for (int i = 0; i < kScaled; ++i) {
      scaled[i] = values[i] / scale;
      const int32_t bits = bit_cast<int32_t>(scaled[i]);
      const int32_t first = ((bits & 0x7fffffff) >> kShift) - kFirst, last = kBuckets - 1;
      places[i] = (first < 0 ? 0 : first > last ? last : first) + (bits < 0 ? kBuckets : 0);
    }
    for (int i = 0; i < kScaled; ++i) {
      const int below = borders_below_[places[i]];  // the next border lies in the bucket, or beyond it
      codes[i] = static_cast<uint8_t>(below + (scaled[i] >= borders_[below] ? 1 : 0));
    }
    if (!narrow_) {  // a map other than torchao's
      for (int i = 0; i < kScaled; ++i) {
        codes[i] = static_cast<uint8_t>(std::upper_bound(borders_, borders_ + 255, scaled[i]) - borders_);
      }
    }
    return scale;
  }

 private:
  static constexpr int kShift = 16;                                       // 7 bits of the mantissa are left
  static constexpr int32_t kFirst = 0x33800000 >> kShift;                 // of 2^-24
  static constexpr int32_t kBuckets = (0x3f800000 >> kShift) - kFirst + 1;  // up to that of 1

  // The least value that is nearer to `upper` than to `lower`, or as near, in float32's arithmetic.
  static float border(float lower, float upper) {
    int64_t low = ordered(lower), high = ordered(upper);  // as far apart as a map of any numbers may have them
    while (low + 1 < high) {
      const int64_t middle = low + (high - low) / 2;
      (number(static_cast<int32_t>(middle)) - lower >= (upper - lower) * 0.5f ? high : low) = middle;
    }
    return number(static_cast<int32_t>(high));
  }
  static int32_t ordered(float x) {
    const int32_t bits = bit_cast<int32_t>(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }
  static float number(int32_t ordered) { return bit_cast<float>(ordered ^ ((ordered >> 31) & 0x7fffffff)); }

  float map_[256];
  float borders_[256];                   // between two numbers each, and infinity
  uint8_t borders_below_[2 * kBuckets];  // how many are below a bucket
  bool narrow_ = true;
};

// The encoder of a map, which is made once in a process.
inline const Encoder* encoder_of(const float* map) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Encoder>> encoders;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& encoder : encoders) {
    if (encoder->is_of(map)) return encoder.get();
  }
  encoders.push_back(std::unique_ptr<const Encoder>(new Encoder(map)));
  return encoders.back().get();
}

}  // namespace
