// Which pixels a convolution reads for each pixel that it writes.
#pragma once
#include <vector>

#include "conv_shape.h"

namespace imaml::cpu {

using std::int64_t;

struct Pixel {
  int64_t result, source;  // the source is the one of the pixel's first tap
};

// A tap that is inside, and the pixel that it reads, relative to the one that the first tap reads.
struct Tap {
  int64_t tap, source;
};

// Consecutive elements of the source that are multiplied by consecutive rows of a panel.
struct Run {
  int64_t source, row, terms;
};

// Pixels of the result for which the same taps are inside the source.
struct PixelClass {
  std::vector<Pixel> pixels;
  std::vector<Tap> taps;
  // The sum over taps and channels, in parts whose rows of a panel stay in cache; at least one.
  std::vector<std::vector<Run>> parts;
};

struct PixelMap {
  int64_t panel_rows;
  std::vector<int64_t> rows;  // of a panel: those of the taps' first channels
  std::vector<PixelClass> classes;
};

// The results are all pixels of a convolution's output, the sources pixels of its input.
PixelMap output_pixels(const ConvShape& s);

// The results are all pixels of the input, the sources pixels of the output.
PixelMap input_pixels(const ConvShape& s);

}  // namespace imaml::cpu
