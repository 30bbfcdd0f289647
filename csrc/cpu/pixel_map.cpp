#include "cpu/pixel_map.h"

#include <algorithm>
#include <numeric>

namespace imaml::cpu {
namespace {

// One axis of the image, and of the kernel.
struct AxisClass {
  int64_t rank, taps;         // those inside are consecutive in rank, as are their sources
  std::vector<Pixel> pixels;  // coordinates on this axis
};
struct Axis {
  std::vector<int64_t> taps;  // by rank
  std::vector<AxisClass> classes;
};

// source_of(result, tap) is -1 outside.
template <typename SourceOf>
std::vector<AxisClass> classify(const std::vector<int64_t>& taps, int64_t results,
                                const SourceOf& source_of) {
  std::vector<AxisClass> classes;
  for (int64_t result = 0; result < results; ++result) {
    int64_t rank = 0, count = 0, first = 0;
    for (std::size_t k = 0; k < taps.size(); ++k) {
      const int64_t source = source_of(result, taps[k]);
      if (source >= 0 && count++ == 0) {
        rank = static_cast<int64_t>(k);
        first = source;
      }
    }
    auto known = std::find_if(classes.begin(), classes.end(), [&](const AxisClass& one) {
      return one.rank == rank && one.taps == count;
    });
    if (known == classes.end()) known = classes.insert(known, {rank, count, {}});
    known->pixels.push_back({result, first});
  }
  return classes;
}

Axis output_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad) {
  std::vector<int64_t> taps(static_cast<std::size_t>(kernel));
  std::iota(taps.begin(), taps.end(), 0);
  return {taps, classify(taps, out, [&](int64_t result, int64_t tap) {
            const int64_t source = result * stride + tap - pad;
            return source < in ? std::max<int64_t>(source, -1) : -1;
          })};
}

// A pixel reads every `stride`-th tap; the sources ascend as the taps descend.
Axis input_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad) {
  std::vector<int64_t> taps;
  for (int64_t last = kernel - 1; last >= std::max<int64_t>(kernel - stride, 0); --last)
    for (int64_t tap = last; tap >= 0; tap -= stride) taps.push_back(tap);
  return {taps, classify(taps, in, [&](int64_t result, int64_t tap) {
            const int64_t from = result + pad - tap;
            return from >= 0 && from % stride == 0 && from / stride < out ? from / stride : -1;
          })};
}

// Rows of a panel that stay in the L1 cache, with the pixels of a tile: 16 of 32 KB.
constexpr int64_t kPartRows = 256;

std::vector<std::vector<Run>> parts_of(const std::vector<Tap>& taps,
                                       const std::vector<int64_t>& rows, int64_t depth) {
  std::vector<std::vector<Run>> parts(1);
  int64_t room = kPartRows;
  for (const Tap& tap : taps)
    for (int64_t k = 0; k < depth;) {
      if (room == 0) {
        parts.emplace_back();
        room = kPartRows;
      }
      const int64_t source = tap.source * depth + k;
      const int64_t row = rows[static_cast<std::size_t>(tap.tap)] + k;
      const int64_t terms = std::min(depth - k, room);
      std::vector<Run>& runs = parts.back();
      if (!runs.empty() && runs.back().source + runs.back().terms == source &&
          runs.back().row + runs.back().terms == row)
        runs.back().terms += terms;
      else
        runs.push_back({source, row, terms});
      k += terms;
      room -= terms;
    }
  return parts;
}

PixelMap product(const Axis& rows, const Axis& columns, int64_t result_width, int64_t source_width,
                 int64_t depth) {
  const int64_t kernel_w = static_cast<int64_t>(columns.taps.size());
  PixelMap map;
  map.rows.resize(rows.taps.size() * columns.taps.size());
  map.panel_rows = 0;
  for (const int64_t row : rows.taps) {
    for (const int64_t column : columns.taps) {
      map.rows[static_cast<std::size_t>(row * kernel_w + column)] = map.panel_rows;
      map.panel_rows += depth;
    }
    // The taps of one channel are packed together: at distances of 4 KB they would compete for the
    // same lines of the cache.
    ++map.panel_rows;
  }
  for (const AxisClass& row : rows.classes)
    for (const AxisClass& column : columns.classes) {
      PixelClass one;
      for (const Pixel& h : row.pixels)
        for (const Pixel& w : column.pixels)
          one.pixels.push_back({h.result * result_width + w.result,  //
                                h.source * source_width + w.source});
      for (int64_t i = 0; i < row.taps; ++i)
        for (int64_t j = 0; j < column.taps; ++j)
          one.taps.push_back({rows.taps[static_cast<std::size_t>(row.rank + i)] * kernel_w +
                                  columns.taps[static_cast<std::size_t>(column.rank + j)],
                              i * source_width + j});
      one.parts = parts_of(one.taps, map.rows, depth);
      map.classes.push_back(std::move(one));
    }
  return map;
}

}  // namespace

PixelMap output_pixels(const ConvShape& s) {
  return product(output_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_h),
                 output_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_w), s.out_w, s.in_w,
                 s.channels);
}

PixelMap input_pixels(const ConvShape& s) {
  return product(input_axis(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.pad_h),
                 input_axis(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.pad_w), s.in_w, s.out_w,
                 s.filters);
}

}  // namespace imaml::cpu
