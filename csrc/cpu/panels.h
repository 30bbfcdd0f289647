// Transposes between weights, where the values of one filter are contiguous, and panels of lanes.
#pragma once
#include <cstdint>

namespace imaml::cpu {

using std::int64_t;

// Weights of up to kTileLanes lanes: element k of a lane, k < count, in each of several slices.
struct WeightBlock {
  int64_t slices, slice_stride;
  int64_t width, lane_stride;
  int64_t count;  // contiguous
};

// pack_panel:    panel[rows[k] + slice, lane] = weights[slice, lane, k], and 0 for lanes from width
//                on.
// unpack_panel:  weights[lane, k] = panel[k, lane] for k < count and lane < width.
#define IMAML_DECLARE(T)                                                                \
  void pack_panel(const WeightBlock&, const T* weights, const int64_t* rows, T* panel); \
  void unpack_panel(const T* panel, int64_t width, int64_t count, T* weights, int64_t lane_stride);
IMAML_DECLARE(float)
IMAML_DECLARE(double)
#undef IMAML_DECLARE

}  // namespace imaml::cpu
