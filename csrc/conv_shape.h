// The shape of a batch of convolutions, one set of weights per task, shared by the CPU and the CUDA
// kernels.
//
// Images are [tasks, images, height, width, channels], so that a pixel's channels are contiguous;
// weights are [tasks, filters, channels, kernel_h, kernel_w], as in torch.nn.Conv2d. A patch is the
// window under one output pixel, flattened in the order of the weights:
//
//   rows[b, n, p, (c, t)] = x[b, n, source(p, t), c], 0 outside the image
//
// for images n, output pixels p, channels c and taps t, so that a convolution is the matrix product
// of its patches with the weights.
#pragma once
#include "formulas.h"

namespace imaml {

struct ConvShape {
  std::int64_t tasks, images;
  std::int64_t in_h, in_w, channels;
  std::int64_t out_h, out_w, filters;
  std::int64_t kernel_h, kernel_w;
  std::int64_t stride_h, stride_w;
  std::int64_t pad_h, pad_w;
  std::int64_t task_stride;  // elements from one task's weights to the next

  IMAML_INLINE std::int64_t in_pixels() const { return in_h * in_w; }
  IMAML_INLINE std::int64_t out_pixels() const { return out_h * out_w; }
  IMAML_INLINE std::int64_t taps() const { return kernel_h * kernel_w; }
  IMAML_INLINE std::int64_t weights() const { return filters * channels * taps(); }

  // Of one image: its elements, and its patches' columns and elements.
  IMAML_INLINE std::int64_t image_size() const { return in_pixels() * channels; }
  IMAML_INLINE std::int64_t patch_size() const { return channels * taps(); }
  IMAML_INLINE std::int64_t patches_size() const { return out_pixels() * patch_size(); }
};

// Whether 31 bits index every element of an image, of its padding and of its patches, as the CUDA
// kernels require.
inline bool fits_31_bits(const ConvShape& s) {
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  return s.patches_size() < limit && s.image_size() < limit && s.in_h + s.pad_h < limit &&
         s.in_w + s.pad_w < limit;
}

}  // namespace imaml
