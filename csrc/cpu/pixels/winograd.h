#pragma once

#include "../engine/forward.h"

namespace dynops::cpu {

// The forward pass of a float32 3x3 convolution with stride 1 by Winograd's F(2x2, 3x3), on the tiles of
// `quads` (winograd.cpp), with the weight of pack_winograd.
void run_winograd(const Forward& f, const Tensor& quads);

}  // namespace dynops::cpu
