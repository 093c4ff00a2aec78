// A convolution from rows to rows that runs many times: what does not change between calls is looked up once.
#pragma once

#include "conv.h"

namespace dynops::cpu {

class PreparedConv {
 public:
  // `weight` is packed as the op takes it, for Winograd's or for direct products, and belongs to the caller.
  // Of a pointwise convolution, whose row i reads row i, the geometry names the groups alone.
  PreparedConv(const Geometry& g, Dtype dtype, int64_t in_channels, int64_t out_channels, bool pointwise,
               bool winograd, Activation activation, const char* weight, Values bias, Values scale,
               Values shift)
      : g_(g),
        dtype_(dtype),
        in_channels_(in_channels),
        out_channels_(out_channels),
        pointwise_(pointwise),
        winograd_(winograd),
        activation_(activation),
        weight_(weight),
        affine_(bias, scale, shift, out_channels) {}

  struct Call {
    const char* x;         // [in_rows, C]
    const int32_t* index;  // [rows]
    int64_t rows;
    const int32_t* source;  // [N, in_h, in_w], or null where it is pointwise
    const char* residual;   // [rows, O] or null
    const int32_t* quads;   // [tiles, 5], or null: no Winograd
    int64_t tiles;
    char* out;  // [rows, O]
  };
  void run(const Call& call) const;

  bool pointwise() const { return pointwise_; }
  bool winograd() const { return winograd_; }

 private:
  Geometry g_;
  Dtype dtype_;
  int64_t in_channels_, out_channels_;
  bool pointwise_, winograd_;
  Activation activation_;
  const char* weight_;
  Affine affine_;
};

}  // namespace dynops::cpu
