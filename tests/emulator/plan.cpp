// What csrc/cuda/implicit_gemm_plan.h promises, for all threads, checked by the compiler.

#include "cuda/implicit_gemm_plan.h"

namespace fused_resnet::cuda {
namespace {

// The eight rows of a matrix that ldmatrix reads lie in all the banks, and so do the 16 bytes of eight threads that
// fill a row.
constexpr bool no_bank_conflicts() {
  for (int chunk = 0; chunk < kRowChunks; ++chunk)
    for (int first = 0; first < 64; first += 8) {
      unsigned column = 0, row = 0;
      for (int i = 0; i < 8; ++i) {
        column |= 1u << swizzled(first + i, chunk) % 128 / 16;
        row |= 1u << swizzled(first + chunk, i) % 128 / 16;
      }
      if (column != 0xff || row != 0xff) return false;
    }
  return true;
}
static_assert(no_bank_conflicts());

// Lane l of ldmatrix_x4 gives row l % 8 of matrix l / 8, and the matrices come in the order of mma's registers: of a
// the rows 0 and 8 of the first 16 bytes, then of the next ones; of b both halves of the depth for 8 rows, and again.
constexpr bool fragments_lie_as_mma_reads_them() {
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8, row = lane % 8;
    if (a_row(lane) != row + matrix % 2 * 8 || a_chunk(lane) != matrix / 2) return false;
    if (b_row(lane) != row + matrix / 2 * 8 || b_chunk(lane) != matrix % 2) return false;
    for (int i = 0; i < 4; ++i)
      if (d_row(lane, i) != lane / 4 + (i > 1 ? 8 : 0) || d_column(lane, i) != lane % 4 * 2 + i % 2) return false;
  }
  return true;
}
static_assert(fragments_lie_as_mma_reads_them());

constexpr ConvShape shape(int n, int c, int k, int size, int r, int groups, int splits) {
  ConvShape g{};
  g.n = n, g.c = c, g.k = k, g.h = g.w = g.p = g.q = size, g.r = g.s = r, g.splits = splits;
  g.groups = groups, g.group_c = c / groups, g.group_k = k / groups;
  g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  g.depth = static_cast<int>(c / groups * r * r);
  return g;
}

// Every pixel, channel and split has one block.
template <int kM, int kN>
constexpr bool work_is_whole(const ConvShape& g) {
  const std::int64_t tiles_m = ceil_div(g.pixels(), kM), tiles_n = ceil_div(g.group_k, kN);
  const std::int64_t blocks = count_blocks(g, kM, kN);
  if (blocks != tiles_m * tiles_n * g.groups * g.splits) return false;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Work work = work_of(g, kM, kN, block);
    const std::int64_t number =
        ((work.pixel / kM * g.splits + work.split) * g.groups + work.group) * tiles_n + work.channel / kN;
    if (number != block || work.pixel % kM || work.channel % kN || work.pixel >= g.pixels() ||
        work.channel >= g.group_k || work.group >= g.groups || work.split >= g.splits)
      return false;
  }
  return true;
}
static_assert(work_is_whole<64, 64>(shape(2, 64, 200, 9, 3, 1, 3)));
static_assert(work_is_whole<128, 64>(shape(3, 32, 96, 7, 3, 4, 1)));
// 2^31 pixels and more, at the first and at the last block
constexpr ConvShape kHuge = shape(1 << 18, 8, 64, 128, 1, 1, 1);
static_assert(work_of(kHuge, 128, 64, count_blocks(kHuge, 128, 64) - 1).pixel == (std::int64_t{1} << 32) - 128);

// The splits of a depth follow each other, and none is empty.
constexpr bool splits_are_whole() {
  for (int steps = 1; steps < 80; ++steps)
    for (int splits = 1; splits <= steps; ++splits) {
      if (split_begin(steps, splits, 0) != 0 || split_begin(steps, splits, splits) != steps) return false;
      for (int i = 0; i < splits; ++i)
        if (split_begin(steps, splits, i + 1) - split_begin(steps, splits, i) < 1) return false;
    }
  return true;
}
static_assert(splits_are_whole());

// Going on by a step comes to the place that divisions give.
constexpr bool depth_advances() {
  for (const int c : {1, 3, 8, 24, 64, 100}) {
    const ConvShape g = shape(1, c, 8, 8, 3, 1, 1);
    for (const int step : {1, 4, 8, 32, 64}) {
      Depth d(g, step / 2);
      for (int at = step / 2; at < g.depth; at += step, d.advance(g, step)) {
        const Depth expected(g, at);
        if (d.r != expected.r || d.s != expected.s || d.c != expected.c) return false;
      }
    }
  }
  return true;
}
static_assert(depth_advances());

constexpr bool positions_are_kept() {
  for (const int h : {-32768, -3, 0, 7, 32767})
    for (const int w : {-32768, -1, 0, 5, 32767})
      if (Position::of(h, w).h() != h || Position::of(h, w).w() != w) return false;
  return true;
}
static_assert(positions_are_kept());

}  // namespace
}  // namespace fused_resnet::cuda
