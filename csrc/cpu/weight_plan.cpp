#include "cpu/weight_plan.h"

#include <algorithm>

#include "cpu/conv.h"
#include "cpu/pixel_map.h"

namespace imaml::cpu {
namespace {

constexpr int64_t kChunkPixels = 256;

// Sorts the terms of one image, and appends those of the chunk's other images.
void complete(WeightJob& job, int64_t images, int64_t x_image, int64_t g_image) {
  std::sort(job.terms.begin(), job.terms.end(),
            [](const WeightTerm& a, const WeightTerm& b) { return a.g < b.g; });
  const std::size_t size = job.terms.size();
  for (int64_t n = 1; n < images; ++n)
    for (std::size_t i = 0; i < size; ++i)
      job.terms.push_back({job.terms[i].x + n * x_image, job.terms[i].g + n * g_image});
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

std::vector<WeightJob> jobs_by_tap(const ConvShape& s, const PixelMap& map,
                                   const std::vector<int64_t>& slots, int64_t lanes) {
  std::vector<WeightJob> jobs(static_cast<std::size_t>(s.taps()));
  for (const PixelClass& pixels : map.classes)
    for (const Tap& tap : pixels.taps)
      for (const Pixel& pixel : pixels.pixels)
        jobs[static_cast<std::size_t>(tap.tap)].terms.push_back(
            {slots[static_cast<std::size_t>(pixel.source + tap.source)] * lanes,
             pixel.result * lanes});
  for (int64_t tap = 0; tap < s.taps(); ++tap)
    for (int64_t c = 0; c < s.channels; ++c) {
      WeightJob& job = jobs[static_cast<std::size_t>(tap)];
      job.sources.push_back(c % lanes);
      job.weights.push_back(c * s.taps() + tap);
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
  const PixelMap map = output_pixels(s);
  WeightPlan plan{.chunk_images = std::clamp<int64_t>(kChunkPixels / s.out_pixels(), 1, s.images),
                  .chunk_pixels = kChunkPixels,
                  .slots = {},
                  .jobs = {}};
  const bool by_class = s.channels < kTileRows;
  if (!by_class) plan.slots = ordered_by_stride(s);
  plan.jobs = by_class ? jobs_by_class(s, map, lanes) : jobs_by_tap(s, map, plan.slots, lanes);
  for (WeightJob& job : plan.jobs)
    complete(job, plan.chunk_images, by_class ? s.image_size() : s.in_pixels() * lanes,
             s.out_pixels() * lanes);
  return plan;
}

}  // namespace imaml::cpu
