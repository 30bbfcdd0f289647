// Which pixels a convolution reads for each pixel that it writes.
#pragma once
#include <vector>

#include "conv_shape.h"

namespace imaml::cpu {

using std::int64_t;

// Result pixels of an image that see the same taps.
struct PixelMap {
  std::vector<int64_t> taps;
  std::vector<int64_t> pixels;   // indices in the result
  std::vector<int64_t> sources;  // [taps, pixels], indices in the source; -1 outside the image
};

// All pixels of a convolution's output; sources are pixels of the input.
PixelMap output_pixels(const ConvShape& s);

// The pixels of the input, one map for each residue of (row, column) modulo the stride; sources are
// pixels of the output.
std::vector<PixelMap> input_pixels(const ConvShape& s);

}  // namespace imaml::cpu
