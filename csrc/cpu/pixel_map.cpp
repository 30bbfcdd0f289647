#include "cpu/pixel_map.h"

#include <algorithm>

namespace imaml::cpu {

PixelMap output_pixels(const ConvShape& s) {
  PixelMap map;
  for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel) map.pixels.push_back(pixel);
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    map.taps.push_back(tap);
    for (const int64_t pixel : map.pixels) {
      const int64_t h = pixel / s.out_w * s.stride_h + tap / s.kernel_w - s.pad_h;
      const int64_t w = pixel % s.out_w * s.stride_w + tap % s.kernel_w - s.pad_w;
      const bool inside = 0 <= h && h < s.in_h && 0 <= w && w < s.in_w;
      map.sources.push_back(inside ? h * s.in_w + w : -1);
    }
  }
  return map;
}

std::vector<PixelMap> input_pixels(const ConvShape& s) {
  std::vector<PixelMap> maps;
  for (int64_t row = 0; row < std::min(s.stride_h, s.in_h); ++row)
    for (int64_t column = 0; column < std::min(s.stride_w, s.in_w); ++column) {
      PixelMap map;
      for (int64_t h = row; h < s.in_h; h += s.stride_h)
        for (int64_t w = column; w < s.in_w; w += s.stride_w) map.pixels.push_back(h * s.in_w + w);
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        const int64_t down = s.pad_h - tap / s.kernel_w, right = s.pad_w - tap % s.kernel_w;
        if ((row + down) % s.stride_h != 0 || (column + right) % s.stride_w != 0) continue;
        map.taps.push_back(tap);
        for (const int64_t pixel : map.pixels) {
          const int64_t h = pixel / s.in_w + down, w = pixel % s.in_w + right;
          const bool inside =
              0 <= h && h < s.out_h * s.stride_h && 0 <= w && w < s.out_w * s.stride_w;
          map.sources.push_back(inside ? h / s.stride_h * s.out_w + w / s.stride_w : -1);
        }
      }
      maps.push_back(std::move(map));
    }
  return maps;
}

}  // namespace imaml::cpu
