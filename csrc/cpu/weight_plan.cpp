#include "cpu/weight_plan.h"

#include <algorithm>

#include "cpu/conv.h"
#include "cpu/pixel_map.h"

namespace imaml::cpu {
namespace {

constexpr int64_t kChunkPixels = 256;

// Sorts the terms of one image, and appends those of the chunk's other images.
void complete(WeightJob& job, const ConvShape& s, int64_t images, int64_t lanes) {
  std::sort(job.terms.begin(), job.terms.end(),
            [](const WeightTerm& a, const WeightTerm& b) { return a.g < b.g; });
  const std::size_t size = job.terms.size();
  for (int64_t n = 1; n < images; ++n)
    for (std::size_t i = 0; i < size; ++i)
      job.terms.push_back({job.terms[i].x + n * s.image_size(),
                           job.terms[i].g + n * s.out_pixels() * lanes});
}

}  // namespace

WeightPlan weight_plan(const ConvShape& s, int64_t lanes) {
  const PixelMap map = output_pixels(s);
  const int64_t channels = s.channels, taps = s.taps();
  WeightPlan plan{.by_class = channels < kTileRows,
                  .chunk_images = std::clamp<int64_t>(kChunkPixels / s.out_pixels(), 1, s.images),
                  .chunk_pixels = kChunkPixels,
                  .jobs = {}};
  plan.jobs.resize(plan.by_class ? map.classes.size() : static_cast<std::size_t>(taps));
  for (std::size_t i = 0; i < map.classes.size(); ++i) {
    const std::vector<Pixel>& pixels = map.classes[i].pixels;
    for (const Tap& tap : map.classes[i].taps) {
      WeightJob& job = plan.jobs[plan.by_class ? i : static_cast<std::size_t>(tap.tap)];
      if (plan.by_class) {
        for (int64_t c = 0; c < channels; ++c) {
          job.sources.push_back(tap.source * channels + c);
          job.weights.push_back(c * taps + tap.tap);
        }
      } else {
        for (const Pixel& pixel : pixels)
          job.terms.push_back({(pixel.source + tap.source) * channels, pixel.result * lanes});
      }
    }
    if (plan.by_class)
      for (const Pixel& pixel : pixels)
        plan.jobs[i].terms.push_back({pixel.source * channels, pixel.result * lanes});
  }
  for (int64_t tap = 0; !plan.by_class && tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) {
      plan.jobs[static_cast<std::size_t>(tap)].sources.push_back(c);
      plan.jobs[static_cast<std::size_t>(tap)].weights.push_back(c * taps + tap);
    }
  for (WeightJob& job : plan.jobs) complete(job, s, plan.chunk_images, lanes);
  return plan;
}

}  // namespace imaml::cpu
