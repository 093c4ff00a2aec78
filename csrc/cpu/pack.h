#pragma once

#include "engine.h"

namespace dynops::cpu {

// The layout of a packed weight of `columns` outputs, each a sum over `segments` runs of `depth`.
// `dot`: bfloat16 pairs, so that a run is rounded up to an even depth.
PanelLayout panel_layout(int64_t columns, int64_t segments, int64_t depth, bool dot);

}  // namespace dynops::cpu
