// Shared by the tests of the kernels: checks, sizes, random numbers, threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/rows.h"

namespace imaml {

using cpu::int64_t;

inline int failures = 0;
inline int64_t checks = 0;
inline std::string context;

inline void expect(bool ok, const char* what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s\n", context.c_str(), what);
}

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

// Checks |got - want| relative to `scale`, the sum of the magnitudes of the terms of `want`.
template <typename T>
void expect_close(long double got, long double want, long double scale, const char* what) {
  if (std::isnan(want)) return expect(std::isnan(got), what);
  if (std::isinf(want)) return expect(got == want, what);
  expect(std::abs(got - want) <= kTolerance<T> * (std::abs(scale) + 1e-30), what);
}

struct Threads {
  int count;
  template <typename Body>
  void operator()(int64_t n, int64_t, const Body& body) const {
    std::vector<std::thread> pool;
    const int64_t share = (n + count - 1) / count;
    for (int64_t begin = 0; begin < n; begin += share)
      pool.emplace_back([=, &body] { body(begin, std::min(n, begin + share)); });
    for (auto& one : pool) one.join();
  }
};

template <typename T>
std::vector<T> normal(int64_t count, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> draw;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(draw(generator));
  return values;
}

// All NaNs are equal: the compiler chooses which operand's NaN propagates.
template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const T& one, const T& other) {
    return !std::memcmp(&one, &other, sizeof(T)) || (one != one && other != other);
  });
}

inline std::size_t at(int64_t i) { return static_cast<std::size_t>(i); }

// As in "cg_step<float>[8, 17]".
template <typename T>
std::string name_of(const char* kernel, int64_t rows, int64_t dim) {
  return std::string(kernel) + (sizeof(T) == 4 ? "<float>[" : "<double>[") + std::to_string(rows) +
         ", " + std::to_string(dim) + "]";
}

// Around every boundary: lanes (16), threads (256), a block's elements (2048), a share of a row and
// a CPU chunk (4096).
constexpr int64_t kDims[] = {0,   1,   2,    15,   16,   17,   31,   33,  255,
                             256, 257, 2047, 2049, 4095, 4096, 4097, 8193};

// More elements than kMaxBlocksPerRow blocks take at once, so that the stride loop iterates.
constexpr int64_t kManyBlocks = 2048 * 512 + 3;

void test_cg_step();
void test_prox();
void test_layers();
void test_program();

}  // namespace imaml
