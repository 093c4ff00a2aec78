// Convolutions whose samples or regions have weights of their own.
#pragma once

#include <functional>
#include <vector>

#include "../engine/forward.h"

namespace dynops::cpu {

inline void check_region(const OptionalTensor& region, const Geometry& g) {
  STD_TORCH_CHECK(!region || region->numel() == g.out_pixels(), "region: expected ", g.out_pixels(),
                  " pixels, got ", region ? region->numel() : 0);
}

// One weight, and the pixels [begin, begin + rows) of the index that it computes.
struct WeightRows {
  int64_t weight, begin, rows;
};

// The pixels of a map [batch, pixels] sorted by weight, ascending within each; weights without a pixel are
// left out. Weights are [batch or 1, regions]: `shared` by the samples or not; no `region`: one region.
struct PixelsByWeight {
  std::vector<int32_t> index;
  std::vector<WeightRows> weights;

  PixelsByWeight(int64_t batch, int64_t pixels, int64_t regions, bool shared, const int32_t* region)
      : index(ascending(batch * pixels)) {
    const int64_t count = (shared ? 1 : batch) * regions;
    std::vector<int64_t> next(count + 1, 0);
    const auto weight_of = [&](int64_t n, int64_t p) {
      return (shared ? 0 : n * regions) + (region ? region[n * pixels + p] : 0);
    };
    for (int64_t p = 0; region && p < batch * pixels; ++p) {
      STD_TORCH_CHECK(region[p] >= 0 && region[p] < regions, "region: expected values in [0, ", regions,
                      "), got ", region[p]);
    }
    for (int64_t n = 0; n < batch; ++n) {
      if (!region) next[weight_of(n, 0) + 1] += pixels;
      for (int64_t p = 0; region && p < pixels; ++p) ++next[weight_of(n, p) + 1];
    }
    for (int64_t w = 0; w < count; ++w) {
      const int64_t rows = next[w + 1];
      next[w + 1] += next[w];
      if (rows) weights.push_back({w, next[w], rows});
    }
    for (int64_t n = 0; region && n < batch; ++n) {
      for (int64_t p = 0; p < pixels; ++p) index[next[weight_of(n, p)]++] = int32_t(n * pixels + p);
    }
  }
};

inline constexpr int64_t kWinogradTiles = 49, kWinogradChannels = 32;

// Makes a panel of a sample's transformed weight: 16 of them, `position_bytes` apart.
using MakeWinograd = std::function<void(int64_t sample, int64_t panel, char* to, int64_t position_bytes)>;

// True if samples with weights of their own run by Winograd's algorithm.
bool takes_winograd(const Forward& f);

// All samples, with `bias` [N or 1, O] or none.
void run_winograd_samples(const Forward& shared, const std::vector<float>& bias, const MakeWinograd& make);

}  // namespace dynops::cpu
