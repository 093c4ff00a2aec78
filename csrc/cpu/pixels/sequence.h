// Layers that follow each other on rows of compact plans, in float32, run by one call.
//
// What a layer costs besides its kernel is then 1 us instead of 25 to 60: between two kernels Python finds
// its objects out of the caches.
#pragma once

#include <vector>

#include "prepared.h"

namespace dynops::cpu {

// The pixels of one resolution.
struct PlanView {
  const int32_t* index;         // [rows], flat positions
  const int32_t* inverse;       // [batch * pixels]: the row, or -1
  const int32_t* quads;         // Winograd's tiles, or null
  int64_t rows, tiles, pixels;  // pixels: of a sample
};

enum class StepKind : int64_t {
  kConv,     // geometry, norm, residual (the second input) and activation are in the prepared one
  kEach,     // as kConv, of each row by itself at any resolution: a norm, an activation
  kMean,     // of each sample's rows
  kSum,      // of two values; the second may have one pixel a sample
  kProduct,  // likewise
  kSigmoid,  // elementwise
  kHardsigmoid,
  kCat,  // of channels
  kMaxPool,
  kMeanPool,      // over whole windows, padding included
  kNearest,       // upsampling by whole factors
  kTake,          // channels
  kLayerNorm,     // over the channels of a row
  kResponseNorm,  // global response normalisation: by the 2-norm of each channel over a sample's rows
  kGroupNorm,     // over groups of channels of a sample's rows; `channels` holds the number of groups
  kBilinear,  // resizing: `channels` holds the first row, then column, that each reads; gamma and beta the
              // shares of the ones after them
  kInnerMeanPool,  // over those pixels of windows that lie inside the map
};

constexpr StepKind kLastStepKind = StepKind::kInnerMeanPool;

struct SequenceStep {
  StepKind kind;
  std::vector<int64_t> inputs;
  int64_t out;
  const PreparedConv* conv = nullptr;
  Geometry g{};                                   // of a pool or an upsampling
  std::vector<int64_t> freed{};                   // values that nothing reads after it
  std::vector<int64_t> channels{};                // that are taken
  const float *gamma = nullptr, *beta = nullptr;  // of a layer norm, or null
  double eps = 0;
};

class Sequence {
 public:
  struct Value {
    int64_t plan, channels;
  };
  std::vector<Value> values;
  std::vector<int64_t> inputs, outputs;  // values that come from outside, and that are wanted there
  std::vector<SequenceStep> steps;

  // Addresses of the inputs and outputs, in their order.
  void run(const std::vector<PlanView>& plans, const std::vector<const char*>& from,
           const std::vector<char*>& to) const;

 private:
  void run_step(const SequenceStep& step, const std::vector<PlanView>& plans,
                const std::vector<char*>& at) const;
};

}  // namespace dynops::cpu
