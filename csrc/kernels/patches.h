// Patches: what a convolution's window sees, as the rows of a matrix, and their transpose, both as
// gathers. With them a convolution is a matrix product, whose derivatives are matrix products
// again.
//
//   rows[n, p, (c, t)] = image[n, source(p, t), c], 0 outside of the image
//   image[n, q, c]     = sum over taps t of rows[n, target(q, t), (c, t)], where there is one
//
// for images n, pixels p of the result and q of the image, channels c, taps t of the window. Images
// are [images, height, width, channels]; the columns of a row are in the order of torch.nn.Conv2d's
// weights, channel by channel, so that those need no copy. Each is linear and the derivative of the
// other. A sum has at most one term a tap, added in one order: the same bits on each device.
#pragma once
#include "formulas.h"

namespace imaml {

struct PatchShape {
  std::int64_t images;  // of all tasks
  std::int64_t in_h, in_w, channels;
  std::int64_t out_h, out_w;
  std::int64_t kernel_h, kernel_w;
  std::int64_t stride_h, stride_w;
  std::int64_t pad_h, pad_w;

  IMAML_INLINE std::int64_t taps() const { return kernel_h * kernel_w; }
  IMAML_INLINE std::int64_t columns() const { return channels * taps(); }
  IMAML_INLINE std::int64_t image_size() const { return in_h * in_w * channels; }
  IMAML_INLINE std::int64_t rows_size() const { return out_h * out_w * columns(); }
};

namespace cpu {

using std::int64_t;

// Calls visit(place in the rows, place in the image) for every value of one image's rows,
// pixel by pixel. The latter is -1 outside of the image.
template <typename Visit>
IMAML_INLINE void for_patches(const PatchShape& s, const Visit& visit) {
  for (int64_t i = 0; i < s.out_h; ++i)
    for (int64_t j = 0; j < s.out_w; ++j)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t a = 0; a < s.kernel_h; ++a)
          for (int64_t b = 0; b < s.kernel_w; ++b) {
            const int64_t h = i * s.stride_h + a - s.pad_h, w = j * s.stride_w + b - s.pad_w;
            const bool inside = 0 <= h && h < s.in_h && 0 <= w && w < s.in_w;
            visit((i * s.out_w + j) * s.columns() + c * s.taps() + a * s.kernel_w + b,
                  inside ? (h * s.in_w + w) * s.channels + c : -1);
          }
}

template <typename T, typename ParallelFor>
void patches(const PatchShape& s, const T* images, T* rows, const ParallelFor& parallel_for) {
  parallel_for(s.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const T* image = images + n * s.image_size();
      T* out = rows + n * s.rows_size();
      for_patches(s, [&](int64_t at, int64_t from) { out[at] = from < 0 ? T(0) : image[from]; });
    }
  });
}

template <typename T, typename ParallelFor>
void patches_transpose(const PatchShape& s, const T* rows, T* images,
                       const ParallelFor& parallel_for) {
  parallel_for(s.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const T* from = rows + n * s.rows_size();
      T* image = images + n * s.image_size();
      for (int64_t i = 0; i < s.image_size(); ++i) image[i] = 0;
      for_patches(s, [&](int64_t at, int64_t to) {
        if (to >= 0) image[to] += from[at];
      });
    }
  });
}

}  // namespace cpu
}  // namespace imaml
