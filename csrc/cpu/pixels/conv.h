// The forward pass of a pixel-sparse convolution, by an op and by a prepared call.
#pragma once

#include "../engine/forward.h"

namespace dynops::cpu {

// Gathers, multiplies, finishes and scatters.
void run_forward(const Forward& f);

// The forward pass of a float32 3x3 convolution with stride 1 by Winograd's F(2x2, 3x3). It runs on `tiles`
// tiles of winograd_quads, int32 [tiles][5], with the weight of pack_winograd.
void run_winograd(const Forward& f, const int32_t* quads, int64_t tiles);

}  // namespace dynops::cpu
