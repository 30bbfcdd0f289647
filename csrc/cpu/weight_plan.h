// In which order the weight gradient of a convolution adds its terms.
#pragma once
#include <vector>

#include "conv_shape.h"

namespace imaml::cpu {

using std::int64_t;

// An output pixel and the input pixel that a tap reads for it, as offsets of elements in a chunk.
struct WeightTerm {
  int64_t x, g;
};

// Terms that several weights have in common.
struct WeightJob {
  std::vector<WeightTerm> terms;  // of a chunk, in the order of its output pixels
  // Of each weight of a filter:
  std::vector<int64_t> sources;  // offset from a term's x
  std::vector<int64_t> weights;  // index
};

// One job per tap, whose weights are those of all channels; or, with few channels, one job per
// class of pixels, whose weights are those of all taps inside the image, so that they fill a tile.
struct WeightPlan {
  int64_t chunk_images;  // whose terms the jobs contain
  int64_t chunk_pixels;  // that are processed at a time: rows of lanes that stay in cache
  // With one job per tap, x are rows of lanes in this order of pixels: those that a tap reads are
  // adjacent. Empty with one job per class: then x are images.
  std::vector<int64_t> slots;
  std::vector<WeightJob> jobs;
};

WeightPlan weight_plan(const ConvShape& s, int64_t lanes);

}  // namespace imaml::cpu
