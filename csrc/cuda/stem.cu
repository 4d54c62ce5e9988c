// Convolution of an image with 1 to 4 channels, the first layer of a network, by tensor cores, with scale, shift,
// residual and activation.

#include <limits>
#include <vector>

#include "cuda/affine.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/products.h"

namespace fused_resnet::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kCell = 8;  // elements of K that an address holds for: half an mma of 16 bits, a whole one of TF32

// x [N, H, W, C], out [N, P, Q, K], and the tile of a block: `rows` by `columns` pixels and the channels of a chunk.
struct Stem {
  int images, h, w, c, k, p, q;
  int window, stride[2], padding[2];  // the filter's rows
  int length, skew, cells;            // of a row of the filter: its elements, those before them, and kCells it takes
  int rows, columns, tiles_p, tiles_q, chunks, steps;
  int height, pitch;  // of the part of the image under a tile, in shared memory: rows, and elements a row
  int act;

  FUSED_RESNET_HOST_DEVICE int row_size() const { return w * c; }
};

// The cells of K in order: `offset` is that of the cell's first element from a pixel's first one. The window's rows lie
// `pitch` elements apart. A cell beyond them reads the first one.
struct Cells {
  int j = 0, r = 0, offset = 0;

  FUSED_RESNET_DEVICE void next(const Stem& conv) {
    offset += kCell;
    if (++j < conv.cells) return;
    j = 0;
    ++r;
    offset = r < conv.window ? r * conv.pitch : 0;
  }
};

// What a lane takes of a cell: the elements from `at` on, kPer of them in 4 bytes. Those in the last cell of a row
// beyond `length`, and before `skew` in the first, belong to neighbouring pixels and are masked out: zero weights would
// turn their NaN and Inf into NaN.
template <int kPer>
struct Mask {
  std::uint32_t first = 0, last = 0;

  FUSED_RESNET_DEVICE Mask(const Stem& conv, int at) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const std::uint32_t bits = 0xffffffffu >> (32 - 32 / kPer) << (e * 32 / kPer);
      if (at + e >= conv.skew) first |= bits;
      if ((conv.cells - 1) * kCell + at + e < conv.length + conv.skew) last |= bits;
    }
  }

  FUSED_RESNET_DEVICE std::uint32_t of(const Stem& conv, const Cells& cells) const {
    const std::uint32_t mask = cells.r < conv.window ? (cells.j == 0 ? first : 0xffffffffu) : 0;
    return cells.j == conv.cells - 1 ? mask & last : mask;
  }
};

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// Elements i to i + kPerWord as 4 bytes; kOdd: i may be odd, and an address of elements only.
template <class T, bool kOdd>
FUSED_RESNET_DEVICE std::uint32_t load_word(const T* rows, int i) {
  if constexpr (!kOdd) return load_pack<std::uint32_t, 1>(reinterpret_cast<const std::uint32_t*>(rows + i)).data[0];
  const auto* halves = reinterpret_cast<const std::uint16_t*>(rows + i);
  return halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
}

// Copies the rows under a tile, kV elements an access, zeros outside of the image; `left` is the first element of a
// row, a multiple of 16 bytes and so of kV, as a row's length is. One warp a row.
template <class T, int kV>
FUSED_RESNET_DEVICE void copy_rows(T* rows, const T* image, const Stem& conv, int top, int left) {
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < conv.height; i += kWarps) {
    const int h = top + i;
    const bool here = h >= 0 && h < conv.h;
    const T* row = image + static_cast<std::int64_t>(here ? h : 0) * conv.row_size();
    for (int e = static_cast<int>(threadIdx.x) % kWarp * kV; e < conv.pitch; e += kWarp * kV) {
      const bool inside = here && left + e >= 0 && left + e < conv.row_size();
      T* to = rows + i * conv.pitch + e;
      if constexpr (kV == kWide<T>) {
        cp_async16(to, inside ? row + left + e : image, inside);
      } else {
        Pack<T, kV> pack{};
        if (inside) pack = load_pack<T, kV>(row + left + e);
        store_pack(to, pack);
      }
    }
  }
}

// sums += a b over one cell (fp32) or two (16 bits), of kM times 16 pixels and two times 8 channels.
template <class T, Products kProducts, int kM>
FUSED_RESNET_DEVICE void multiply(float (&sums)[kM][2][4], const std::uint32_t (&a)[kM][4],
                                  const Pack<std::uint32_t, 4>& b) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    [[maybe_unused]] std::uint32_t high[4], low[4];
    if constexpr (kProducts != Products::kHalf) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        high[i] = high_part(a[m][i]), low[i] = low_part(a[m][i]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const std::uint32_t b0 = b.data[2 * n], b1 = b.data[2 * n + 1];
      if constexpr (kProducts == Products::kHalf)
        mma<T>(sums[m][n], a[m], b0, b1);
      else if constexpr (kProducts == Products::kTf32)
        mma_tf32(sums[m][n], high, high_part(b0), high_part(b1));
      else
        mma_fp32(sums[m][n], high, low, b0, b1);
    }
  }
}

// The sums of one pixel and kV channels in plain fp32, for those that are not finite by an infinity's parts, or by a
// number whose nearest TF32 is infinite.
template <int kV>
FUSED_RESNET_DEVICE void sum_plainly(float (&v)[kV], const float* pixel, const float* weight, const Stem& conv,
                                     int pairs, int tile, int lane) {
#pragma unroll
  for (int e = 0; e < kV; ++e)
    v[e] = 0.0f;
  for (int r = 0; r < conv.window; ++r)
    for (int i = 0; i < conv.length; ++i) {
      const float x = pixel[r * conv.pitch + i];
      const int cell = r * conv.cells + i / kCell, k = i % kCell;
#pragma unroll
      for (int e = 0; e < kV; ++e) {
        const int n = tile + e / 2, column = lane % 4 * 2 + e % 2;
        v[e] += x * weight[((cell * pairs + n / 2) * kWarp + column * 4 + k % 4) * 4 + n % 2 * 2 + k / 4];
      }
    }
}

// The end of 16 pixels: v is [group, half, kV], whose channels begin at first_k + 4 * kV * group, and to[half] tells
// where in the output a pixel is; negative: it is not there. One branch for the activation of all of them.
template <class T, int kGroups>
FUSED_RESNET_DEVICE void write(float (&v)[kGroups][2][kWide<T>], const float* scale_vector, const float* shift_vector,
                               const T* residual, T* out, const Stem& conv, int first_k, const std::int64_t (&to)[2]) {
  constexpr int kV = kWide<T>;
  const bool wide = conv.k % kV == 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int k = first_k + group * 4 * kV, here = conv.k - k < kV ? conv.k - k : kV;
    float scale[kV] = {}, shift[kV] = {};
    if (here == kV) {
      load_channels(scale, scale_vector, k, 1.0f);
      load_channels(shift, shift_vector, k, 0.0f);
    } else {
#pragma unroll
      for (int e = 0; e < kV; ++e)
        if (e < here) scale[e] = scale_vector[k + e], shift[e] = shift_vector[k + e];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<T, kV> added{};
      if (residual && to[half] >= 0 && here > 0) {
        if (wide) {
          added = load_pack<T, kV>(residual + to[half] + k);
        } else {
#pragma unroll
          for (int e = 0; e < kV; ++e)
            if (e < here) added.data[e] = residual[to[half] + k + e];
        }
      }
#pragma unroll
      for (int e = 0; e < kV; ++e)
        v[group][half][e] = v[group][half][e] * scale[e] + shift[e] + static_cast<float>(added.data[e]);
    }
  }
  activate_all(reinterpret_cast<float (&)[kGroups * 2 * kV]>(v), conv.act);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int k = first_k + group * 4 * kV, here = conv.k - k < kV ? conv.k - k : kV;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (to[half] < 0 || here <= 0) continue;
      Pack<T, kV> rounded;
#pragma unroll
      for (int e = 0; e < kV; ++e)
        rounded.data[e] = static_cast<T>(v[group][half][e]);
      if (wide) {
        store_global(out + to[half] + k, rounded);
      } else {
#pragma unroll
        for (int e = 0; e < kV; ++e)
          if (e < here) out[to[half] + k + e] = rounded.data[e];
      }
    }
  }
}

// out[i, p, q, k] = act(sum_rsc x[i, p * stride + r - pad, q * stride + s - pad, c] w[k, r, s, c] * scale[k] + shift[k]
// + residual[i, p, q, k]); out may be the residual.
//
// A block has `rows` by `columns` pixels of one image by 16 * kPairs channels; a warp kM times 16 of its pixels at a
// time, in fp32. The rows of the image under the tile are copied to shared memory once, as they lie in memory, and the
// pixels are read straight from there: of one pixel, a row of the filter is `length` = S * C elements in a row, so that
// K is the rows of the filter, each filled up to whole cells: for 7x7 and 3 channels 168 products in place of 147.
//
// The weight comes in the order of the fragments, as fused_resnet/backends/cuda/stem.py packs it: 16 bytes a lane for
// 16 channels and one step of K. Its columns are dealt so that a lane has 16 bytes of neighbouring channels of the
// output.
template <class T, Products kProducts, int kPairs, int kM, bool kOdd>
__global__ void __launch_bounds__(kThreads, kM == 4 || sizeof(T) == 4 ? 2 : 4)
    stem_kernel(const T* x, const T* weight, const float* scale_vector, const float* shift_vector, const T* residual,
                T* out, Stem conv, int vector) {
  constexpr int kV = kWide<T>;
  constexpr int kPer = kPerWord<T>;
  constexpr int kFragment = 4 * kPer;  // elements of the weight a lane, for 16 channels and one step
  auto* weights = reinterpret_cast<T*>(block_memory());
  const int weight_size = conv.steps * kPairs * kWarp * kFragment;
  T* rows = weights + weight_size;

  unsigned number = blockIdx.x;
  const int chunk = static_cast<int>(number % conv.chunks);
  number /= conv.chunks;
  const int q0 = static_cast<int>(number % conv.tiles_q) * conv.columns;
  number /= conv.tiles_q;
  const int p0 = static_cast<int>(number % conv.tiles_p) * conv.rows;
  const std::int64_t image = number / conv.tiles_p;

  for (int i = static_cast<int>(threadIdx.x) * kV; i < weight_size; i += kThreads * kV)
    cp_async16(weights + i, weight + static_cast<std::int64_t>(chunk) * weight_size + i, true);
  const int start = (q0 * conv.stride[1] - conv.padding[1]) * conv.c - conv.skew;
  const int lead = (start % kV + kV) % kV;  // elements before it that are copied too, so that copies are aligned
  const T* from = x + image * conv.h * conv.row_size();
  const int top = p0 * conv.stride[0] - conv.padding[0];
  if (vector == kV)
    copy_rows<T, kV>(rows, from, conv, top, start - lead);
  else if (vector == 2)
    copy_rows<T, 2>(rows, from, conv, top, start - lead);
  else
    copy_rows<T, 1>(rows, from, conv, top, start - lead);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int across = conv.q - q0 < conv.columns ? conv.q - q0 : conv.columns;
  const int pixels = (conv.p - p0 < conv.rows ? conv.p - p0 : conv.rows) * across;
  const int places[2] = {lane % 4 * kPer, lane % 4 * kPer + (kPer == 1 ? 4 : 0)};  // in a cell, for 16 bytes of K each
  const Mask<kPer> masks[2] = {Mask<kPer>(conv, places[0]), Mask<kPer>(conv, places[1])};
  for (int first = warp * kM * 16; first < pixels; first += kWarps * kM * 16) {
    int at[kM][2];  // of this lane's pixels, 8 apart, in `rows`; one that is not there reads the first one
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first + m * 16 + half * 8 + lane / 4, pixel = i < pixels ? i : 0;
        at[m][half] = pixel / across * conv.stride[0] * conv.pitch + pixel % across * conv.stride[1] * conv.c + lead;
      }
    float sums[kPairs][kM][2][4] = {};
    Cells cells;
    for (int step = 0; step < conv.steps; ++step) {
      std::uint32_t a[kM][4];
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // of 16 bytes of K
        const std::uint32_t mask = masks[part].of(conv, cells);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            a[m][2 * part + half] = load_word<T, kOdd>(rows, at[m][half] + cells.offset + places[part]) & mask;
        if (kPer == 2 || part == 1) cells.next(conv);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
        multiply<T, kProducts, kM>(
            sums[pair], a,
            load_pack<std::uint32_t, 4>(reinterpret_cast<const std::uint32_t*>(
                weights + ((step * kPairs + pair) * kWarp + lane) * static_cast<std::int64_t>(kFragment))));
    }

#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float v[4 * kPairs / kV][2][kV];  // 16 bytes of the output each, in the order of memory
      std::int64_t to[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first + m * 16 + half * 8 + lane / 4;
        const std::int64_t row = image * conv.p + p0 + i / across;
        to[half] = i < pixels ? (row * conv.q + q0 + i % across) * conv.k : -1;
#pragma unroll
        for (int group = 0; group < 4 * kPairs / kV; ++group) {
          bool finite = true;
#pragma unroll
          for (int e = 0; e < kV; ++e) {
            const int tile = group * kV / 2 + e / 2;
            v[group][half][e] = sums[tile / 2][m][tile % 2][2 * half + e % 2];
            finite &= is_finite(v[group][half][e]);
          }
          if constexpr (kProducts != Products::kHalf)
            if (!finite) sum_plainly(v[group][half], rows + at[m][half], weights, conv, kPairs, group * kV / 2, lane);
        }
      }
      write<T>(v, scale_vector, shift_vector, residual, out, conv, chunk * kPairs * 16 + lane % 4 * kV, to);
    }
  }
}

// Refuses what does not fit: places in an image, and in shared memory, are kept in 32 bits.
void check_stem(const Arguments& args, const Tensor& x, const Tensor& out, const std::vector<std::int64_t>& geometry,
                const std::vector<std::int64_t>& tile) {
  args.image(x, "x");
  args.number(x.size(1), 1, "the channels of x", 4);
  const auto map = args.map(x, geometry, 8);
  args.image(out, "out");
  args.image(out, x, {x.size(0), out.size(1), map[0], map[1]}, "out");
  for (int i = 0; i < 2; ++i)
    args.number(geometry[6 + i], 1, "geometry's dilation", 1);
  args.number((x.size(2) + 2 * geometry[4]) * (x.size(3) + 2 * geometry[5]), 1, "the padded pixels of x",
              Arguments::kMostNumber / x.size(1));
  args.number(out.numel() / out.size(0), 1, "the size of an image of out");
  args.length(tile, 4, "tile");
  for (int i = 0; i < 2; ++i) {
    args.number(tile[i], 1, "tile's rows or columns", 1 << 16);
    args.number(tile[i] * geometry[2 + i] * x.size(1), 1, "tile's reach", 1 << 30);
  }
  if (tile[1] < map[1] && tile[1] % 2) args.refuse("tile's columns", std::to_string(tile[1]), "a whole row, or even");
  if (tile[2] != 2 && tile[2] != 4) args.refuse("tile's times", std::to_string(tile[2]), "2 or 4");
  if (tile[3] != 32 && tile[3] != 64) args.refuse("tile's channels", std::to_string(tile[3]), "32 or 64");
}

Stem stem_of(const Tensor& x, const Tensor& out, const std::vector<std::int64_t>& geometry,
             const std::vector<std::int64_t>& tile, int per, int channels, int act) {
  const auto of = [](std::int64_t value) { return static_cast<int>(value); };
  Stem conv{};
  conv.images = of(x.size(0)), conv.c = of(x.size(1)), conv.h = of(x.size(2)), conv.w = of(x.size(3));
  conv.k = of(out.size(1)), conv.p = of(out.size(2)), conv.q = of(out.size(3));
  conv.window = of(geometry[0]);
  for (int i = 0; i < 2; ++i)
    conv.stride[i] = of(geometry[2 + i]), conv.padding[i] = of(geometry[4 + i]);
  conv.length = of(geometry[1]) * conv.c;
  conv.skew = per == 2 ? conv.padding[1] * conv.c % 2 : 0;  // so that a row of the filter starts at whole words
  conv.cells = of(ceil_div(conv.length + conv.skew, kCell));
  conv.steps = of(ceil_div(conv.window * conv.cells, per));
  conv.rows = of(tile[0]), conv.columns = of(tile[1]);
  conv.tiles_p = of(ceil_div(conv.p, conv.rows)), conv.tiles_q = of(ceil_div(conv.q, conv.columns));
  conv.chunks = of(ceil_div(conv.k, channels));
  conv.height = (conv.rows - 1) * conv.stride[0] + conv.window;
  const int needed = (conv.columns - 1) * conv.stride[1] * conv.c + conv.cells * kCell + kCell - 1;
  conv.pitch = of(ceil_div(needed, kCell)) * kCell;
  conv.act = act;
  return conv;
}

}  // namespace

void stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, std::optional<Tensor> residual,
          std::vector<std::int64_t> geometry, std::vector<std::int64_t> tile, bool tf32, std::int64_t act, Tensor out) {
  const Arguments args("stem", x);
  check_stem(args, x, out, geometry, tile);
  args.vector(scale, out.size(1), "scale");
  args.vector(shift, out.size(1), "shift");
  args.like(residual, out, "residual");
  args.activation(act);
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int channels = static_cast<int>(tile[3]);
    const Stem conv = stem_of(x, out, geometry, tile, kPerWord<T>, channels, static_cast<int>(act));
    const std::size_t weights = static_cast<std::size_t>(conv.steps) * channels * kCell * kPerWord<T>;
    args.matrix(weight, x.scalar_type(), conv.chunks, static_cast<std::int64_t>(weights), "weight");
    const std::size_t shared = sizeof(T) * (weights + static_cast<std::size_t>(conv.height) * conv.pitch);
    const int vector = conv.row_size() % kWide<T> == 0 ? kWide<T> : conv.row_size() % 2 == 0 ? 2 : 1;
    const auto run = [&](auto kernel) {
      launch(kernel, static_cast<std::int64_t>(conv.images) * conv.tiles_p * conv.tiles_q * conv.chunks, kThreads,
             shared, static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
             floats(scale), floats(shift), static_cast<const T*>(data_or_null(residual)),
             static_cast<T*>(out.mutable_data_ptr()), conv, vector);
    };
    const auto with_pairs = [&](auto pairs) {
      if constexpr (sizeof(T) == 4)
        tf32 ? run(stem_kernel<T, Products::kTf32, pairs(), 2, false>)
             : run(stem_kernel<T, Products::kFp32, pairs(), 2, false>);
      else if (conv.stride[1] * conv.c % 2)
        run(stem_kernel<T, Products::kHalf, pairs(), 2, true>);
      else
        tile[2] == 4 ? run(stem_kernel<T, Products::kHalf, pairs(), 4, false>)
                     : run(stem_kernel<T, Products::kHalf, pairs(), 2, false>);
    };
    channels == 32 ? with_pairs(std::integral_constant<int, 2>{}) : with_pairs(std::integral_constant<int, 4>{});
  });
}

}  // namespace fused_resnet::cuda
