// Random inputs for the kernels.
#pragma once
#include <limits>
#include <map>

#include "harness.h"

namespace imaml {

#if defined(__SANITIZE_THREAD__)
constexpr bool kEmulates = false;  // an emulated kernel runs on one thread
#else
constexpr bool kEmulates = true;
#endif

// The number of inputs per kernel.
inline std::map<std::string, int64_t> tried;

// The distribution of an operand's values.
enum Values {
  kNormal,
  kSomeNonfinite,  // a few entries are infinite or NaN
  kZeros,          // of either sign
  kConstant,
  kSubnormal,
  kHuge,   // close to the largest finite value
  kMixed,  // any magnitude
  kBits,   // any bits
  kValues
};

// Up to this magnitude, the terms of all formulas stay finite in T.
template <typename T>
constexpr double kModerate = sizeof(T) == 4 ? 1e9 : 1e60;

struct Range {
  bool finite = true, moderate = true;

  template <typename T>
  Range& operator&=(T value) {
    finite = finite && std::isfinite(value);
    moderate = moderate && std::abs(double(value)) <= kModerate<T>;
    return *this;
  }
};

template <typename T>
Range range_of(const T* values, int64_t count) {
  Range range;
  for (int64_t i = 0; i < count; ++i) range &= values[i];
  return range;
}

// Draws an input from its seed.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : generator_(seed) {}

  std::uint64_t seed() { return generator_(); }
  bool chance(double share) { return double(generator_() >> 11) * 0x1p-53 < share; }
  int64_t from(int64_t least, int64_t most) {
    return least +
           static_cast<int64_t>(generator_() % static_cast<std::uint64_t>(most - least + 1));
  }
  template <typename T, std::size_t N>
  T one_of(const T (&values)[N]) {
    return values[from(0, N - 1)];
  }

  // Elements before each operand, for every alignment within a cache line.
  std::size_t offset() { return at(from(0, 15)); }

  // The length of a row: short, near a boundary, or several chunks long.
  int64_t dim() {
    if (chance(0.3)) return one_of(kDims);
    return chance(0.9) ? from(0, 80) : from(81, 13000);
  }

  template <typename T>
  T value(Values values) {
    using limits = std::numeric_limits<T>;
    const T sign = chance(0.5) ? T(1) : T(-1), share = T(double(generator_() >> 11) * 0x1p-53);
    switch (values) {
      case kSomeNonfinite:
        return chance(0.5) ? limits::quiet_NaN() : sign * limits::infinity();
      case kZeros:
        return sign * T(0);
      case kSubnormal:
        return sign * share * limits::min();
      case kHuge:
        return sign * (T(0.5) + share / 2) * limits::max();
      case kMixed:
        return sign * std::ldexp(T(1) + share, int(from(limits::min_exponent - limits::digits,
                                                        limits::max_exponent - 1)));
      case kBits: {
        T value;
        const std::uint64_t bits = generator_();
        std::memcpy(&value, &bits, sizeof value);
        return value == value ? value : limits::quiet_NaN();  // not a signalling NaN
      }
      default:
        return sign * share * T(4);
    }
  }

  // Replaces `count` entries by values of a random distribution, with probability 1/2.
  template <typename T>
  void corrupt(T* entries, int64_t count) {
    if (count == 0 || chance(0.5)) return;
    const Values values = static_cast<Values>(from(0, kValues - 1));
    if (values == kSomeNonfinite) {
      for (int64_t left = from(1, 3); left > 0; --left)
        entries[from(0, count - 1)] = value<T>(values);
    } else if (values != kNormal) {
      const T same = value<T>(values);
      for (int64_t i = 0; i < count; ++i)
        entries[i] = values == kConstant ? same : value<T>(values);
    }
  }

 private:
  std::mt19937_64 generator_;
};

// Slice `index` of slices of `count` values.
template <typename T>
std::vector<T> part(const std::vector<T>& values, int64_t index, int64_t count) {
  const auto first = values.begin() + index * count;
  return std::vector<T>(first, first + count);
}

// Calls same(threads, pool) for several numbers of threads, whose pool may have another size.
template <typename Same>
void on_threads(Draw& draw, const Same& same) {
  for (const int threads : {2, 3, int(draw.from(1, 9))})
    expect(same(threads, Threads{int(draw.from(2, 4))}),
           "the number of threads or the alignment changes the bits");
}

template <typename T>
void fuzz_cg_step(Draw& draw);
template <typename T>
void fuzz_prox_step(Draw& draw);
template <typename T>
void fuzz_row_sums(Draw& draw);
template <typename T>
void fuzz_conv(Draw& draw);
template <typename T>
void fuzz_channel_sums(Draw& draw);
template <typename T>
void fuzz_patches(Draw& draw);
template <typename T>
void fuzz_batch_norm(Draw& draw);
template <typename T>
void fuzz_batched_product(Draw& draw);
template <typename T>
void fuzz_map(Draw& draw);
template <typename T>
void fuzz_reduction(Draw& draw);
template <typename T>
void fuzz_product(Draw& draw);
template <typename T>
void fuzz_indexing(Draw& draw);

}  // namespace imaml
