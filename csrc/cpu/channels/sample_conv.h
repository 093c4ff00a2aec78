#pragma once

#include <functional>
#include <vector>

#include "../engine/forward.h"

namespace dynops::cpu {

inline constexpr int64_t kWinogradTiles = 49, kWinogradChannels = 32;

// Makes a panel of a sample's transformed weight: 16 of them, `position_bytes` apart.
using MakeWinograd = std::function<void(int64_t sample, int64_t panel, char* to, int64_t position_bytes)>;

// Whether samples with weights of their own run by Winograd's algorithm.
bool takes_winograd(const Forward& f);

// All samples, with `bias` [N or 1, O] or none.
void run_winograd_samples(const Forward& shared, const std::vector<float>& bias, const MakeWinograd& make);

}  // namespace dynops::cpu
