// Winograd's F(2x2, 3x3) of whole samples with a transformed weight of their own.
#include "../engine/winograd_pass.h"
#include "own_weights.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kInputBytes = 768 * 1024;  // of transformed input of a chunk of tiles, most of an L2 cache

}  // namespace

bool takes_winograd(const Forward& f) {
  const Geometry& g = f.g;
  const bool square = g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h * g.stride_w * g.dil_h * g.dil_w == 1;
  const int64_t tiles = ceil_div(g.out_h, 2) * ceil_div(g.out_w, 2);
  return square && g.groups == 1 && f.dtype == Dtype::kFloat32 && tiles >= kWinogradTiles &&
         std::min(f.in_channels, f.out_channels) >= kWinogradChannels;
}

void run_winograd_samples(const Forward& shared, const std::vector<float>& bias, const MakeWinograd& make) {
  const Geometry& g = shared.g;
  const int64_t pixels = g.out_h * g.out_w, channels = shared.in_channels, width = kernels().panel_width;
  Geometry one = g;
  one.batch = 1;
  const std::vector<int32_t> quads = all_quads(one);
  const int64_t tiles = int64_t(quads.size()) / 5;
  const std::vector<int32_t> index = ascending(pixels);
  const PanelLayout layout = panel_layout(shared.out_channels, 1, channels, false);
  const double macs = double(g.batch * tiles * kPositions) * double(channels * shared.out_channels);
  const int64_t threads = threads_for(macs, kMacsPerThread);
  // Threads take whole samples where these share out evenly, else a share of each.
  const int64_t shares = g.batch % threads == 0 ? 1 : std::min(threads, layout.panels);
  const int64_t least = std::max<int64_t>(kInputBytes / (kPositions * channels * 4), kTileRows);
  const int64_t chunks = ceil_div(tiles, least);
  const int64_t most = share_of(tiles, 0, chunks, kTileRows).end + kTileRows;
  const int64_t panel_bytes = width * layout.depth * 4, units = g.batch * shares;
  parallel(threads, [&](int64_t t) {
    const int64_t held = ceil_div(layout.panels, shares), position_bytes = held * panel_bytes;
    const std::unique_ptr<char[]> weight(new char[kPositions * position_bytes]);
    const std::unique_ptr<float[]> v(new float[kPositions * most * channels]);
    WinogradPass::Work work;
    for (const int64_t u : each(share_of(units, t, threads))) {
      const int64_t n = u / shares;
      const Span panels = share_of(layout.panels, u % shares, shares);
      Forward f{shared};
      f.index = index.data();
      f.rows = pixels;
      f.source.x += n * g.in_h * g.in_w * f.source.row_bytes;
      f.out += n * pixels * f.out_bytes();
      f.weight = weight.get() - panels.begin * panel_bytes;
      const int64_t biases = int64_t(bias.size()) / f.out_channels;
      if (biases) f.affine = Affine(f.out_channels, bias.data() + n % biases * f.out_channels);
      const WinogradPass pass(f, quads.data(), tiles, position_bytes);
      for (int64_t i = 0; i < chunks; ++i) {
        const Span chunk = share_of(tiles, i, chunks, kTileRows);
        if (chunk.size() == 0) continue;
        pass.transform(chunk, v.get(), chunk.size() * channels);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {  // made where it is read first
          if (i == 0) make(n, panel, weight.get() + (panel - panels.begin) * panel_bytes, position_bytes);
          pass.multiply(chunk, v.get(), {panel, panel + 1}, work);
        }
      }
    }
  });
}

}  // namespace dynops::cpu
