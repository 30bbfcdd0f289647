// patches and patches_transpose, both as gathers. conv_shape.h defines patches.
//
// Bound by memory: patches reads each pixel once per tap, mostly from cache, and writes every
// element once; the transpose reads every element once and writes an image. A block writes
// kPatchItems consecutive elements per thread of one image; its reads are contiguous over the taps
// of a channel (patches) or are reused by the block's next pixels (the transpose). Every element is
// written by one thread, without atomics: the same input gives the same bits.
#pragma once
#include "conv_shape.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace imaml::cuda {

constexpr int kPatchItems = 4;

// Division by a launch-time constant as a multiplication: n / d = (n m) >> (32 + s) with
// s = ceil(log2 d), m = ceil(2^(32 + s) / d), for n, d below 2^31 (Granlund and Montgomery 1994,
// "Division by invariant integers using multiplication"). m has at most 33 bits; the highest one is
// added separately.
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

// A shape in 32 bits, for shapes that pass fits_31_bits.
struct PatchDivisors {
  Divisor columns, taps, channels, in_w, out_w, kernel_w, stride_h, stride_w;
  std::uint32_t in_h, out_h, kernel_h, pad_h, pad_w;

  explicit PatchDivisors(const ConvShape& s)
      : columns(s.patch_size()),
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

// Calls write(element) for the elements of this thread.
template <typename Write>
__device__ void for_elements(const BlockCoord& at, int64_t size, const Write& write) {
  const int64_t first = at.block * kThreads * kPatchItems + threadIdx.x;
#pragma unroll 2
  for (int k = 0; k < kPatchItems; ++k)
    if (first + k * kThreads < size) write(static_cast<std::uint32_t>(first + k * kThreads));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    patches_kernel(ConvShape s, PatchDivisors by, const T* images, T* patches, int64_t blocks) {
  const BlockCoord at(blocks);
  const T* __restrict__ image = images + at.row * s.image_size();
  T* __restrict__ out = patches + at.row * s.patches_size();
  for_elements(at, s.patches_size(), [&](std::uint32_t element) {
    const auto [pixel, column] = by.columns(element);
    const auto [c, tap] = by.taps(column);
    const auto [i, j] = by.out_w(pixel);
    const auto [a, b] = by.kernel_w(tap);
    // Unsigned: negative coordinates wrap around to values beyond the image.
    const std::uint32_t h = i * by.stride_h.d + a - by.pad_h, w = j * by.stride_w.d + b - by.pad_w;
    out[element] =
        h < by.in_h && w < by.in_w.d ? image[(h * by.in_w.d + w) * by.channels.d + c] : T(0);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    patches_transpose_kernel(ConvShape s, PatchDivisors by, const T* patches, T* images,
                             int64_t blocks) {
  const BlockCoord at(blocks);
  const T* __restrict__ from = patches + at.row * s.patches_size();
  T* __restrict__ image = images + at.row * s.image_size();
  for_elements(at, s.image_size(), [&](std::uint32_t element) {
    const auto [pixel, c] = by.channels(element);
    const auto [h, w] = by.in_w(pixel);
    T total = 0;
    // (i, j) runs backwards over the output pixels that read this one, and (a, b) over their taps.
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

inline int64_t patch_blocks(int64_t size) {
  return (size + kThreads * kPatchItems - 1) / (kThreads * kPatchItems);
}

template <typename T>
int patches(const ConvShape& s, const T* images, T* patches, void* stream) {
  const int64_t blocks = patch_blocks(s.patches_size());
  return launch(patches_kernel<T>, s.tasks * s.images * blocks, stream, s, PatchDivisors(s), images,
                patches, blocks);
}

template <typename T>
int patches_transpose(const ConvShape& s, const T* patches, T* images, void* stream) {
  const int64_t blocks = patch_blocks(s.image_size());
  return launch(patches_transpose_kernel<T>, s.tasks * s.images * blocks, stream, s,
                PatchDivisors(s), patches, images, blocks);
}

}  // namespace imaml::cuda
