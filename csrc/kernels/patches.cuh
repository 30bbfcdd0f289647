// patches and patches_transpose: the gathers of patches.h.
//
// Bound by memory: patches reads an image, whose pixels the window sees several times, from cache
// and writes each value of the rows once; the transpose reads each value once and writes an image.
// A block writes kPatchItems values a thread, of one image, in their order; what it reads lies
// together for the taps of a channel (patches) or is read again by the block's next pixels (the
// transpose). Every value is written by one thread, without atomics: the same bits always.
#pragma once
#include "device.cuh"
#include "patches.h"

namespace imaml::cuda {

constexpr int kPatchItems = 4;

// Division by a number that is not known before the kernel runs, as a multiplication.
// n / d = (n m) >> (32 + s) with s = ceil(log2 d), m = ceil(2^(32 + s) / d), for n, d below 2^31
// (Granlund, Montgomery 1994, "Division by invariant integers using multiplication"); m has at most
// 33 bits, of which the highest is added by hand.
struct Divisor {
  std::uint32_t d, m, s;

  explicit Divisor(int64_t divisor) : d(static_cast<std::uint32_t>(divisor)), s(0) {
    while ((std::uint64_t{1} << s) < d) ++s;
    m = static_cast<std::uint32_t>((((std::uint64_t{1} << s) - d) << 32) / d + 1);
  }
  struct Quotient {
    std::uint32_t whole, rest;
  };
  __device__ Quotient operator()(std::uint32_t n) const {
    const auto high = static_cast<std::uint32_t>((std::uint64_t{n} * m) >> 32);
    const std::uint32_t whole = (high + n) >> s;
    return {whole, n - whole * d};
  }
};

// A shape in 32 bits, which hold whatever fits_divisors lets pass.
struct PatchNumbers {
  Divisor columns, taps, channels, in_w, out_w, kernel_w, stride_h, stride_w;
  std::uint32_t in_h, out_h, kernel_h, pad_h, pad_w;

  explicit PatchNumbers(const PatchShape& s)
      : columns(s.columns()),
        taps(s.taps()),
        channels(s.channels),
        in_w(s.in_w),
        out_w(s.out_w),
        kernel_w(s.kernel_w),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        in_h(static_cast<std::uint32_t>(s.in_h)),
        out_h(static_cast<std::uint32_t>(s.out_h)),
        kernel_h(static_cast<std::uint32_t>(s.kernel_h)),
        pad_h(static_cast<std::uint32_t>(s.pad_h)),
        pad_w(static_cast<std::uint32_t>(s.pad_w)) {}
};

// Calls write(element) for the elements of this block's image that this thread writes.
template <typename Write>
__device__ void for_elements(const Place& at, int64_t size, const Write& write) {
  const int64_t first = at.block * kThreads * kPatchItems + threadIdx.x;
#pragma unroll 2
  for (int k = 0; k < kPatchItems; ++k)
    if (first + k * kThreads < size) write(static_cast<std::uint32_t>(first + k * kThreads));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    patches_kernel(PatchShape s, PatchNumbers by, const T* images, T* rows, int64_t blocks) {
  const Place at(blocks);
  const T* __restrict__ image = images + at.row * s.image_size();
  T* __restrict__ out = rows + at.row * s.rows_size();
  for_elements(at, s.rows_size(), [&](std::uint32_t element) {
    const auto [pixel, column] = by.columns(element);
    const auto [c, tap] = by.taps(column);
    const auto [i, j] = by.out_w(pixel);
    const auto [a, b] = by.kernel_w(tap);
    // As unsigned numbers, what lies before the image lies behind it.
    const std::uint32_t h = i * by.stride_h.d + a - by.pad_h, w = j * by.stride_w.d + b - by.pad_w;
    out[element] =
        h < by.in_h && w < by.in_w.d ? image[(h * by.in_w.d + w) * by.channels.d + c] : T(0);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    patches_transpose_kernel(PatchShape s, PatchNumbers by, const T* rows, T* images,
                             int64_t blocks) {
  const Place at(blocks);
  const T* __restrict__ from = rows + at.row * s.rows_size();
  T* __restrict__ image = images + at.row * s.image_size();
  for_elements(at, s.image_size(), [&](std::uint32_t element) {
    const auto [pixel, c] = by.channels(element);
    const auto [h, w] = by.in_w(pixel);
    T total = 0;
    // Of the pixels of the result that see this one, the last; the others are one, two, ... before.
    auto [i, a] = by.stride_h(h + by.pad_h);
    for (; a < by.kernel_h; a += by.stride_h.d, --i) {
      if (i < by.out_h) {
        auto [j, b] = by.stride_w(w + by.pad_w);
        for (; b < by.kernel_w.d; b += by.stride_w.d, --j) {
          if (j < by.out_w.d)
            total +=
                from[(i * by.out_w.d + j) * by.columns.d + c * by.taps.d + a * by.kernel_w.d + b];
          if (j == 0) break;
        }
      }
      if (i == 0) break;
    }
    image[element] = total;
  });
}

// Whether the kernels can number an image's values: a Divisor takes 31 bits.
inline bool fits_divisors(const PatchShape& s) {
  constexpr int64_t limit = int64_t{1} << 31;
  return s.rows_size() < limit && s.image_size() < limit && s.in_h + s.pad_h < limit &&
         s.in_w + s.pad_w < limit;
}

inline int64_t patch_blocks(int64_t size) {
  return (size + kThreads * kPatchItems - 1) / (kThreads * kPatchItems);
}

template <typename T>
int patches(const PatchShape& s, const T* images, T* rows, Stream stream) {
  const int64_t blocks = patch_blocks(s.rows_size());
  return launch(patches_kernel<T>, s.images * blocks, stream, s, PatchNumbers(s), images, rows,
                blocks);
}

template <typename T>
int patches_transpose(const PatchShape& s, const T* rows, T* images, Stream stream) {
  const int64_t blocks = patch_blocks(s.image_size());
  return launch(patches_transpose_kernel<T>, s.images * blocks, stream, s, PatchNumbers(s), rows,
                images, blocks);
}

}  // namespace imaml::cuda
