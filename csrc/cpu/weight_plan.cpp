#include "cpu/weight_plan.h"

#include <algorithm>

#include "cpu/conv.h"
#include "cpu/pixel_map.h"

namespace imaml::cpu {
namespace {

constexpr int64_t kChunkPixels = 200;

// Appends the terms of the chunk's other images to those of the first.
void repeat(std::vector<WeightTerm>& terms, int64_t images, int64_t x_image, int64_t g_image) {
  const std::size_t size = terms.size();
  terms.reserve(size * static_cast<std::size_t>(images));
  for (int64_t n = 1; n < images; ++n)
    for (std::size_t i = 0; i < size; ++i)
      terms.push_back({terms[i].x + n * x_image, terms[i].g + n * g_image});
}

std::vector<WeightJob> jobs_by_class(const ConvShape& s, const PixelMap& map, int64_t lanes) {
  std::vector<WeightJob> jobs;
  for (const PixelClass& pixels : map.classes) {
    WeightJob& job = jobs.emplace_back();
    for (const Pixel& pixel : pixels.pixels)
      job.terms.push_back({pixel.source * s.channels, pixel.result * lanes});
    for (const Tap& tap : pixels.taps)
      for (int64_t c = 0; c < s.channels; ++c) {
        job.sources.push_back(tap.source * s.channels + c);
        job.weights.push_back(c * s.taps() + tap.tap);
      }
  }
  return jobs;
}

std::vector<WeightJob> jobs_by_tap(const ConvShape& s, const std::vector<int64_t>& slots,
                                   int64_t lanes) {
  std::vector<WeightJob> jobs(static_cast<std::size_t>(s.taps()));
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    WeightJob& job = jobs[static_cast<std::size_t>(tap)];
    for (int64_t row = 0; row < s.out_h; ++row) {
      const int64_t h = row * s.stride_h + tap / s.kernel_w - s.pad_h;
      if (h < 0 || h >= s.in_h) continue;
      for (int64_t column = 0; column < s.out_w; ++column) {
        const int64_t w = column * s.stride_w + tap % s.kernel_w - s.pad_w;
        if (0 <= w && w < s.in_w)
          job.terms.push_back({slots[static_cast<std::size_t>(h * s.in_w + w)] * lanes,
                               (row * s.out_w + column) * lanes});
      }
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      job.sources.push_back(c % lanes);
      job.weights.push_back(c * s.taps() + tap);
    }
  }
  return jobs;
}

// The rank of each pixel by (row % stride, column % stride, row, column).
std::vector<int64_t> ordered_by_stride(const ConvShape& s) {
  std::vector<int64_t> slots(static_cast<std::size_t>(s.in_pixels()));
  int64_t slot = 0;
  for (int64_t i = 0; i < std::min(s.stride_h, s.in_h); ++i)
    for (int64_t j = 0; j < std::min(s.stride_w, s.in_w); ++j)
      for (int64_t h = i; h < s.in_h; h += s.stride_h)
        for (int64_t w = j; w < s.in_w; w += s.stride_w)
          slots[static_cast<std::size_t>(h * s.in_w + w)] = slot++;
  return slots;
}

}  // namespace

WeightPlan weight_plan(const ConvShape& s, int64_t lanes) {
  const int64_t images = std::clamp<int64_t>(kChunkPixels / s.out_pixels(), 1, s.images);
  const int64_t pixels = images * s.out_pixels();
  const int64_t chunks = (pixels + kChunkPixels - 1) / kChunkPixels;
  const bool by_class = s.channels < kTileRows;
  WeightPlan plan{.chunk_images = images,
                  .chunk_pixels = (pixels + chunks - 1) / chunks,
                  .slots = {},
                  .jobs = {}};
  if (by_class) {
    plan.jobs = jobs_by_class(s, output_pixels(s), lanes);
  } else {
    plan.slots = ordered_by_stride(s);
    plan.jobs = jobs_by_tap(s, plan.slots, lanes);
  }
  for (WeightJob& job : plan.jobs)
    repeat(job.terms, images, by_class ? s.image_size() : s.in_pixels() * lanes,
           s.out_pixels() * lanes);
  return plan;
}

}  // namespace imaml::cpu
