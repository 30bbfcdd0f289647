// What the fuzzing driver draws an input from, and the kernels that it draws.
#pragma once
#include <limits>
#include <map>

#include "harness.h"

namespace imaml {

#if defined(__SANITIZE_THREAD__)
constexpr bool kEmulates = false;  // an emulated kernel is one thread
#else
constexpr bool kEmulates = true;
#endif

// How many inputs each kernel was tried on.
inline std::map<std::string, int64_t> tried;

// The values of one task's operand.
enum Values {
  kNormal,
  kPoisoned,  // a few entries are infinite or NaN
  kZeros,     // of either sign
  kConstant,
  kSubnormal,
  kHuge,   // close to the largest
  kMixed,  // of any magnitude
  kBits,   // any at all
  kValues
};

// The most that a number may be for a formula's terms to stay within T.
template <typename T>
constexpr double kTame = sizeof(T) == 4 ? 1e9 : 1e60;

struct Nature {
  bool finite = true, tame = true;

  template <typename T>
  Nature& operator&=(T value) {
    finite = finite && std::isfinite(value);
    tame = tame && std::abs(double(value)) <= kTame<T>;
    return *this;
  }
};

template <typename T>
Nature nature_of(const T* values, int64_t count) {
  Nature nature;
  for (int64_t i = 0; i < count; ++i) nature &= values[i];
  return nature;
}

// Everything about an input, from its seed.
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

  // Elements before each operand of a kernel: every alignment to a cache line.
  std::size_t offset() { return at(from(0, 15)); }

  // A row's length: short, around a boundary, or in several chunks.
  int64_t dim() {
    if (chance(0.3)) return one_of(kDims);
    return chance(0.9) ? from(0, 80) : from(81, 13000);
  }

  template <typename T>
  T value(Values values) {
    using limits = std::numeric_limits<T>;
    const T sign = chance(0.5) ? T(1) : T(-1), share = T(double(generator_() >> 11) * 0x1p-53);
    switch (values) {
      case kPoisoned:
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
        return value == value ? value : limits::quiet_NaN();  // none that signals
      }
      default:
        return sign * share * T(4);
    }
  }

  // Makes values of `count` entries that were normal, and leaves them so half of the time.
  template <typename T>
  void spoil(T* entries, int64_t count) {
    if (count == 0 || chance(0.5)) return;
    const Values values = static_cast<Values>(from(0, kValues - 1));
    if (values == kPoisoned) {
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

// Part `index` of `count` values a part.
template <typename T>
std::vector<T> part(const std::vector<T>& values, int64_t index, int64_t count) {
  const auto first = values.begin() + index * count;
  return std::vector<T>(first, first + count);
}

// Calls same(threads, pool) for some numbers of threads, of which it says so itself.
template <typename Same>
void on_threads(Draw& draw, const Same& same) {
  for (const int threads : {2, 3, int(draw.from(1, 9))})
    expect(same(threads, Threads{int(draw.from(2, 4))}), "threads or alignment change the bits");
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
void fuzz_patches(Draw& draw);
template <typename T>
void fuzz_batch_norm(Draw& draw);

}  // namespace imaml
