// Patches and their transpose on the CPU: plain pointers, no torch. conv_shape.h defines patches;
// each of the two is linear and the derivative of the other. An element of the transpose sums at
// most one term per tap, in one order: the same bits on every device.
#pragma once
#include "conv_shape.h"

namespace imaml::cpu {

using std::int64_t;

// Calls visit(index in the patches, index in the image) for every element of one image's patches.
// The latter is -1 outside the image. `s` is passed by value, so stores cannot alias it.
template <typename Visit>
IMAML_INLINE void for_patches(const ConvShape s, const Visit& visit) {
  for (int64_t i = 0; i < s.out_h; ++i)
    for (int64_t j = 0; j < s.out_w; ++j)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t a = 0; a < s.kernel_h; ++a)
          for (int64_t b = 0; b < s.kernel_w; ++b) {
            const int64_t h = i * s.stride_h + a - s.pad_h, w = j * s.stride_w + b - s.pad_w;
            const bool inside = 0 <= h && h < s.in_h && 0 <= w && w < s.in_w;
            visit((i * s.out_w + j) * s.patch_size() + c * s.taps() + a * s.kernel_w + b,
                  inside ? (h * s.in_w + w) * s.channels + c : -1);
          }
}

// Calls body(n) for every image of every task.
template <typename ParallelFor, typename Body>
void for_images(const ConvShape& s, const ParallelFor& parallel_for, const Body& body) {
  parallel_for(s.tasks * s.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) body(n);
  });
}

template <typename T, typename ParallelFor>
void patches(const ConvShape& s, const T* images, T* patches, const ParallelFor& parallel_for) {
  for_images(s, parallel_for, [&](int64_t n) {
    const T* image = images + n * s.image_size();
    T* out = patches + n * s.patches_size();
    for_patches(s, [&](int64_t at, int64_t from) { out[at] = from < 0 ? T(0) : image[from]; });
  });
}

template <typename T, typename ParallelFor>
void patches_transpose(const ConvShape& s, const T* patches, T* images,
                       const ParallelFor& parallel_for) {
  for_images(s, parallel_for, [&](int64_t n) {
    const T* from = patches + n * s.patches_size();
    T* image = images + n * s.image_size();
    for (int64_t i = 0; i < s.image_size(); ++i) image[i] = 0;
    for_patches(s, [&](int64_t at, int64_t to) {
      if (to >= 0) image[to] += from[at];
    });
  });
}

}  // namespace imaml::cpu
