// The jobs of a convolution whose pixels have weights of their own: those of one weight are one job.
#pragma once

#include <numeric>
#include <vector>

#include "../engine/operands.h"

namespace dynops::cpu {

inline void check_region(const OptionalTensor& region, const Geometry& g) {
  STD_TORCH_CHECK(!region || region->numel() == g.out_pixels(), "region: expected ", g.out_pixels(),
                  " pixels, got ", region ? region->numel() : 0);
}

// One weight, and the pixels [begin, begin + rows) of the jobs' index that it computes.
struct Job {
  int64_t weight, begin, rows;
};

// The pixels of a map [batch, pixels] sorted by weight, ascending within each; jobs without a pixel are left
// out. Weights are [batch or 1, regions]: `shared` by the samples or not; `region` is null for one region.
struct Jobs {
  std::vector<int32_t> index;
  std::vector<Job> jobs;

  Jobs(int64_t batch, int64_t pixels, int64_t regions, bool shared, const int32_t* region)
      : index(size_t(batch * pixels)) {
    const int64_t weights = (shared ? 1 : batch) * regions;
    std::vector<int64_t> next(size_t(weights) + 1, 0);
    const auto weight_of = [&](int64_t n, int64_t p) {
      return size_t((shared ? 0 : n * regions) + (region ? region[n * pixels + p] : 0));
    };
    for (int64_t p = 0; region && p < batch * pixels; ++p) {
      STD_TORCH_CHECK(region[p] >= 0 && region[p] < regions, "region: expected values in [0, ", regions,
                      "), got ", region[p]);
    }
    for (int64_t n = 0; n < batch; ++n) {
      if (!region) next[weight_of(n, 0) + 1] += pixels;
      for (int64_t p = 0; region && p < pixels; ++p) ++next[weight_of(n, p) + 1];
    }
    for (int64_t w = 0; w < weights; ++w) {
      const int64_t rows = next[size_t(w) + 1];
      next[size_t(w) + 1] += next[size_t(w)];
      if (rows) jobs.push_back({w, next[size_t(w)], rows});
    }
    if (!region) std::iota(index.begin(), index.end(), 0);
    for (int64_t n = 0; region && n < batch; ++n) {
      for (int64_t p = 0; p < pixels; ++p) index[size_t(next[weight_of(n, p)]++)] = int32_t(n * pixels + p);
    }
  }
};

}  // namespace dynops::cpu
