// The weight gradient of a thread's part. Read by per_isa.h inside the namespace of each instruction set.

constexpr std::int64_t kWgradPanel = 2 * kLanes;             // input channels of a tile
constexpr std::int64_t kWgradBlock = kLanes == 16 ? 14 : 6;  // output channels of a tile, at most
constexpr std::int64_t kWgradCopy = kLanes == 16 ? 16 : 8;   // floats that are copied for a block of a pixel
constexpr std::int64_t kWgradGroup = 16;                     // pixels of which dy is packed block by block

// Pixels that lie side by side in the packed x.
struct WgradRun {
  std::int64_t offset, pixels;
};

// What tiles fetch to L2 for later: rows of `row` bytes whose starts are row + jump apart, `step` bytes at each pixel.
// Evenly, because a burst would take all the fill buffers of L1 from the tile's own loads.
struct WgradFetch {
  const char* next;
  std::int64_t step, left, row, jump;
};

// sums[m, c] += sum_i dy[i, m] x[i * x_step + c] over the pixels i of all runs, for M output channels and V vectors of
// input channels: up to 28 accumulators in fp32 registers, x streamed from L1 or L2 and each dy broadcast from memory.
// They begin at 0, for sums of sums round less than one long sum.
template <int M, int V>
void wgrad_tile(const float* x, std::int64_t x_step, const float* dy, const WgradRun* runs, const WgradRun* end,
                WgradFetch& stream, float* sums, bool add) {
  WgradFetch fetch = stream;
  Vec<kLanes> sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[m][v] = Vec<kLanes>{};
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v)
      __builtin_prefetch(sums + m * kWgradPanel + v * kLanes, 1, 3);
  for (; runs != end; ++runs) {
    const float* from = x + runs->offset;
    for (std::int64_t i = runs->pixels; i > 0; --i) {
      Vec<kLanes> in[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        in[v] = load<kLanes>(from + v * kLanes);
      __builtin_prefetch(fetch.next, 0, 2);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          sum[m][v] += dy[m] * in[v];
      fetch.next += fetch.step;
      fetch.left -= fetch.step;
      if (fetch.left <= 0) fetch.next += fetch.jump, fetch.left += fetch.row;
      from += x_step;
      dy += M;
    }
  }
  stream = fetch;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = sums + m * kWgradPanel + v * kLanes;
      store<kLanes>(at, add ? load<kLanes>(at) + sum[m][v] : sum[m][v]);
    }
}

using WgradTile = void (*)(const float*, std::int64_t, const float*, const WgradRun*, const WgradRun*, WgradFetch&,
                           float*, bool);

template <int V, int... kHeights>
constexpr WgradTile pick_wgrad_tile(std::int64_t height, std::integer_sequence<int, kHeights...>) {
  constexpr WgradTile kTable[] = {wgrad_tile<kHeights + 1, V>...};
  return kTable[height - 1];
}

// The first `count` of kN floats, and zeros.
template <int kN>
inline Vec<kN> load_some(const float* p, std::int64_t count) {
  count = std::clamp<std::int64_t>(count, 0, kN);
#if defined(__x86_64__)
  if constexpr (kN == 16) return _mm512_maskz_loadu_ps((1u << count) - 1, p);
#endif
  if (count == kN) return load<kN>(p);
  Vec<kN> v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

// Calls body<kNorm, kAct>().
template <class Body>
inline void with_norm(const WgradArgs& args, Body body) {
  if (!args.mean) return body.template operator()<false, kNone>();
  with_types(false, args.act, [&]<class T, int kAct>() { body.template operator()<true, kAct>(); });
}

inline void copy_block(const float* from, float* to) {
  for (std::int64_t i = 0; i < kWgradCopy; i += kLanes)
    store<kLanes>(to + i, load<kLanes>(from + i));
}

// Packs a thread's dy and x; x goes through the norm and the activation on its way.
struct WgradPacker {
  const WgradShape& g;
  const WgradArgs& args;
  std::vector<WgradRun> runs;  // of the packed x: the pixels of an output row, or of several where nothing is between
  std::vector<float> lines;    // folded: the padded rows under an output row

  // [blocks][pixels][channels of the block] of the pixels [begin, end). Copies are of one length; what is too much is
  // written over by the next pixel, or falls between the blocks.
  void pack_dy(const std::int64_t* blocks, std::int64_t count, std::int64_t begin, std::int64_t end, float* to) const {
    const std::int64_t pixels = end - begin, last = g.n * g.p * g.q * g.k - kWgradCopy;
    for (std::int64_t first = begin; first < end; first += kWgradGroup) {
      float* block = to;
      for (std::int64_t b = 0; b < count; ++b) {
        const std::int64_t height = blocks[b + 1] - blocks[b];
        float* out = block + (first - begin) * height;
        for (std::int64_t i = first; i < std::min(end, first + kWgradGroup); ++i, out += height) {
          const std::int64_t at = i * g.k + blocks[b];
          if (at <= last)
            copy_block(args.dy + at, out);
          else
            std::memcpy(out, args.dy + at, height * sizeof(float));
        }
        block += pixels * height + kWgradCopy;
      }
    }
  }

  // [rows][columns][kWgradPanel] under the output rows [begin, end).
  void pack_x(std::int64_t panel, std::int64_t begin, std::int64_t end, float* to) {
    runs.clear();
    with_norm(args, [&]<bool kNorm, int kAct>() {
      if (g.flat) return copy_pixels<kNorm, kAct>(args.x + begin * g.c, g.c, end - begin, panel, to);
      float* row = to;
      for_images(begin, end, [&](std::int64_t n, std::int64_t p0, std::int64_t p1) {
        for (std::int64_t p = p0; p < p1 && g.taps > 1; ++p)
          runs.push_back({row - to + (p - p0) * g.step_h * g.columns * kWgradPanel, g.q});
        const std::int64_t height = (p1 - p0 - 1) * g.step_h + g.span_h;
        for (std::int64_t i = 0; i < height; ++i, row += g.columns * kWgradPanel)
          pack_row<kNorm, kAct>(n, (p0 * g.step_h + i) * g.source_h - g.pad_h, panel, row);
      });
    });
    if (g.taps == 1) runs.push_back({0, (end - begin) * g.q});
  }

  // [pixels][pixel_floats] of the output rows [begin, end): the R * S * C inputs under each.
  void fold_x(std::int64_t begin, std::int64_t end, std::int64_t pixel_floats, float* to) {
    const std::int64_t width = std::max(g.pad_w + g.w, (g.q - 1) * g.stride_w + (g.s - 1) * g.dilation_w + 1) * g.c;
    const std::int64_t line = width + kWgradCopy;
    lines.assign(g.r * line, 0.0f);
    runs.assign(1, {0, (end - begin) * g.q});
    for_images(begin, end, [&](std::int64_t n, std::int64_t p0, std::int64_t p1) {
      for (std::int64_t p = p0; p < p1; ++p, to += g.q * pixel_floats) {
        for (std::int64_t r = 0; r < g.r; ++r)
          fill_line(n, p * g.stride_h + r * g.dilation_h - g.pad_h, lines.data() + r * line);
        for (std::int64_t q = 0; q < g.q; ++q)
          gather(lines.data() + q * g.stride_w * g.c, line, to + q * pixel_floats);
      }
    });
  }

 private:
  template <class Body>
  void for_images(std::int64_t begin, std::int64_t end, Body body) const {
    for (std::int64_t row = begin; row < end;) {
      const std::int64_t n = row / g.p, p0 = row % g.p, p1 = std::min(g.p, p0 + end - row);
      body(n, p0, p1);
      row += p1 - p0;
    }
  }

  template <bool kNorm, int kAct, int kN>
  Vec<kN> value(Vec<kN> v, std::int64_t c) const {
    if constexpr (kNorm)
      v = activate<kAct>(
          batch_norm<Vec<kN>>(v - load<kN>(args.mean + c), load<kN>(args.scale + c), load<kN>(args.shift + c)));
    return v;
  }

  template <bool kNorm, int kAct>
  void copy_pixels(const float* from, std::int64_t step, std::int64_t count, std::int64_t panel, float* to) const {
    const std::int64_t c = panel * kWgradPanel, left = g.c - c;
    for (; count > 0; --count, from += step, to += kWgradPanel) {
      store<kLanes>(to, value<kNorm, kAct, kLanes>(load_some<kLanes>(from + c, left), c));
      if (left <= kLanes) continue;
      store<kLanes>(to + kLanes,
                    value<kNorm, kAct, kLanes>(load_some<kLanes>(from + c + kLanes, left - kLanes), c + kLanes));
    }
  }

  template <bool kNorm, int kAct>
  void pack_row(std::int64_t n, std::int64_t y, std::int64_t panel, float* to) const {
    const auto column = [&](std::int64_t x) { return (x + g.pad_w + g.source_w - 1) / g.source_w; };
    const bool inside = y >= 0 && y < g.h;
    const std::int64_t first = inside ? std::min(column(0), g.columns) : g.columns;
    const std::int64_t last = std::clamp(column(g.w), first, g.columns);
    std::memset(to, 0, first * kWgradPanel * sizeof(float));
    if (!inside) return;
    const float* from = args.x + ((n * g.h + y) * g.w + first * g.source_w - g.pad_w) * g.c;
    copy_pixels<kNorm, kAct>(from, g.source_w * g.c, last - first, panel, to + first * kWgradPanel);
    std::memset(to + last * kWgradPanel, 0, (g.columns - last) * kWgradPanel * sizeof(float));
  }

  void fill_line(std::int64_t n, std::int64_t y, float* line) const {
    const bool inside = y >= 0 && y < g.h;
    float* to = line + g.pad_w * g.c;
    const float* from = args.x + (n * g.h + y) * g.w * g.c;
    if (!inside || !args.mean) {
      inside ? std::memcpy(to, from, g.w * g.c * sizeof(float)) : std::memset(to, 0, g.w * g.c * sizeof(float));
      return;
    }
    with_norm(args, [&]<bool kNorm, int kAct>() {
      for (std::int64_t i = 0; i < g.w; ++i, to += g.c, from += g.c)
        for (std::int64_t c = 0; c < g.c; c += kLanes) {
          const Vec<kLanes> v = value<kNorm, kAct, kLanes>(load_some<kLanes>(from + c, g.c - c), c);
          std::memcpy(to + c, &v, std::min<std::int64_t>(kLanes, g.c - c) * sizeof(float));
        }
    });
  }

  // The inputs of a pixel, as many at once as lie side by side; too much is copied, as in pack_dy.
  void gather(const float* line, std::int64_t line_floats, float* to) const {
    const std::int64_t together = g.dilation_w == 1 ? g.s * g.c : g.c, pieces = g.s * g.c / together;
    for (std::int64_t r = 0; r < g.r; ++r)
      for (std::int64_t s = 0; s < pieces; ++s, to += together) {
        const float* from = line + r * line_floats + s * g.dilation_w * g.c;
        for (std::int64_t i = 0; i < together; i += kWgradCopy)
          copy_block(from + i, to + i);
      }
  }
};

// Adds the sums of one block and panel over the parts, in their order, and writes them to dweight.
inline void wgrad_finish(const WgradShape& g, const WgradArgs& args, std::int64_t k, std::int64_t height,
                         std::int64_t panel, float* sums, std::int64_t parts, std::int64_t part_stride) {
  const std::int64_t size = g.taps * height * kWgradPanel;
  for (std::int64_t part = 1; part < parts; ++part)
    for (std::int64_t i = 0; i < size; i += kLanes)
      store<kLanes>(sums + i, load<kLanes>(sums + i) + load<kLanes>(sums + part * part_stride + i));
  const std::int64_t lanes = std::min(kWgradPanel, g.channels - panel * kWgradPanel);
  const auto tap_offset = [&](std::int64_t tap) { return tap / g.s * args.stride[2] + tap % g.s * args.stride[3]; };
  std::int64_t offset[kWgradPanel];
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    const std::int64_t c = panel * kWgradPanel + lane;
    offset[lane] = c % g.c * args.stride[1] + (g.fold ? tap_offset(c / g.c) : 0);
  }
  const bool together = args.stride[1] == 1 && !g.fold;
  for (std::int64_t m = 0; m < height; ++m) {
    float* out = args.dweight + (k + m) * args.stride[0];
    const float* from = sums + m * kWgradPanel;
    if (together)
      for (std::int64_t tap = 0; tap < g.taps; ++tap)
        std::memcpy(out + offset[0] + tap_offset(tap), from + tap * height * kWgradPanel, lanes * sizeof(float));
    else
      for (std::int64_t lane = 0; lane < lanes; ++lane)
        for (std::int64_t tap = 0; tap < g.taps; ++tap)
          out[offset[lane] + (g.fold ? 0 : tap_offset(tap))] = from[tap * height * kWgradPanel + lane];
  }
}

// A thread's part: chunks of output channels, bands of rows, panels of input channels, slabs of rows, blocks of output
// channels, taps: dy of a chunk and band stays in L2, x of a panel and slab in L1, both packed. What the next band
// reads is fetched by the tiles of this one.
class WgradRunner {
 public:
  WgradRunner(const WgradShape& shape, const WgradArgs& arguments, const WgradPlan& whole, const WgradTask& part)
      : g(shape),
        args(arguments),
        plan(whole),
        task(part),
        packer{shape, arguments, {}, {}},
        pixel_floats(shape.fold ? whole.panels * kWgradPanel : kWgradPanel),
        bands((part.row_end - part.row_begin + whole.band_rows - 1) / whole.band_rows) {}

  void run() {
    if (g.fold) std::memset(task.x, 0, plan.x_floats * sizeof(float));
    for (std::int64_t chunk = task.chunk_begin; chunk < task.chunk_end; ++chunk) {
      blocks = plan.blocks.data() + plan.chunks[chunk];
      count = plan.chunks[chunk + 1] - plan.chunks[chunk];
      for (band = 0; band < bands; ++band) {
        begin = band_row(band), end = band_row(band + 1);
        slabs = (end - begin + plan.slab_rows - 1) / plan.slab_rows;
        plan_fetches(chunk);
        packer.pack_dy(blocks, count, begin * g.q, end * g.q, task.dy);
        for (std::int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
          run_panel(panel);
      }
    }
  }

 private:
  struct Piece {
    WgradFetch fetch;
    std::int64_t bytes;
  };

  std::int64_t band_row(std::int64_t i) const { return task.row_begin + (task.row_end - task.row_begin) * i / bands; }

  void run_panel(std::int64_t panel) {
    float* sums = task.sums + panel * task.panel_stride - (task.lone ? blocks[0] * g.taps * kWgradPanel : 0);
    for (std::int64_t slab = 0; slab < slabs; ++slab) {
      const std::int64_t from = begin + (end - begin) * slab / slabs, to = begin + (end - begin) * (slab + 1) / slabs;
      if (!g.fold)
        packer.pack_x(panel, from, to, task.x);
      else if (panel == task.panel_begin)
        packer.fold_x(from, to, pixel_floats, task.x);
      run_tiles(panel, from, (to - from) * g.q, sums, band + slab > 0);
    }
    for (std::int64_t b = 0; b < count && task.finish && band + 1 == bands; ++b)
      wgrad_finish(g, args, blocks[b], blocks[b + 1] - blocks[b], panel, sums + blocks[b] * g.taps * kWgradPanel, 1, 0);
  }

  void run_tiles(std::int64_t panel, std::int64_t from, std::int64_t pixels, float* sums, bool add) {
    constexpr auto kHeights = std::make_integer_sequence<int, kWgradBlock>();
    const bool wide = g.channels - panel * kWgradPanel > kLanes;
    const float* x = task.x + (g.fold ? panel * kWgradPanel : 0);
    const std::int64_t x_step = g.fold ? pixel_floats : g.step_w * kWgradPanel;
    const WgradRun* runs = packer.runs.data();
    const float* dy = task.dy;
    for (std::int64_t b = 0; b < count; ++b) {
      const std::int64_t height = blocks[b + 1] - blocks[b];
      const WgradTile tile = wide ? pick_wgrad_tile<2>(height, kHeights) : pick_wgrad_tile<1>(height, kHeights);
      for (std::int64_t tap = 0; tap < g.taps; ++tap) {
        const std::int64_t shift =
            g.fold ? 0 : (tap / g.s * g.dilation_h * g.columns + tap % g.s * g.dilation_w) * kWgradPanel;
        advance_fetch(pixels);
        tile(x + shift, x_step, dy + (from - begin) * g.q * height, runs, runs + packer.runs.size(), fetch,
             sums + (blocks[b] * g.taps + tap * height) * kWgradPanel, add);
      }
      dy += (end - begin) * g.q * height + kWgradCopy;
    }
  }

  // What the next band or chunk reads: its dy, then its x, which is one piece unless rows or columns are passed over.
  void plan_fetches(std::int64_t chunk) {
    pieces.clear();
    fetch = {reinterpret_cast<const char*>(task.x), 0, 1, 0, 0};
    std::int64_t next = band + 1;
    if (next == bands && ++chunk == task.chunk_end) return;
    next %= bands;
    const std::int64_t first = band_row(next), last = band_row(next + 1);
    const std::int64_t channel = plan.blocks[plan.chunks[chunk]];
    const std::int64_t channels = plan.blocks[plan.chunks[chunk + 1]] - channel;
    add_piece(args.dy + first * g.q * g.k + channel, (last - first) * g.q, channels, g.k);
    const auto input = [&](std::int64_t row, std::int64_t y) {
      const std::int64_t at = std::clamp<std::int64_t>(row % g.p * g.stride_h - g.pad_h + y, 0, g.h);
      return args.x + (row / g.p * g.h + at) * g.w * g.c;
    };
    if (g.source_h * g.source_w == 1)
      add_piece(input(first, 0), 1, input(last - 1, g.span_h) - input(first, 0), 0);
    else
      for (std::int64_t row = first; row < last; ++row)
        add_piece(input(row, 0), g.w / g.source_w, g.c, g.source_w * g.c);
    std::int64_t bytes = 0;
    for (const Piece& piece : pieces)
      bytes += piece.bytes;
    const std::int64_t visits = (task.panel_end - task.panel_begin) * count * g.taps * (end - begin) * g.q;
    fetch.step = std::min<std::int64_t>(64, bytes / visits + 1);
    piece_left = next_piece = 0;
  }

  void add_piece(const float* from, std::int64_t rows, std::int64_t floats, std::int64_t pitch) {
    const std::int64_t bytes = floats * sizeof(float), apart = pitch * sizeof(float);
    pieces.push_back({{reinterpret_cast<const char*>(from), 0, bytes, bytes, apart - bytes}, rows * bytes});
  }

  // Goes on to the next piece where the last one is done, and to nothing behind all of them.
  void advance_fetch(std::int64_t pixels) {
    if (piece_left <= 0 && fetch.step > 0) {
      const std::int64_t step = next_piece < pieces.size() ? fetch.step : 0;
      if (step > 0) fetch = pieces[next_piece].fetch, piece_left = pieces[next_piece++].bytes;
      fetch.step = step;
    }
    piece_left -= pixels * fetch.step;
  }

  const WgradShape& g;
  const WgradArgs& args;
  const WgradPlan& plan;
  const WgradTask& task;
  WgradPacker packer;
  const std::int64_t pixel_floats, bands;
  const std::int64_t* blocks = nullptr;  // of this chunk
  std::int64_t count = 0, band = 0, begin = 0, end = 0, slabs = 0;
  std::vector<Piece> pieces;
  WgradFetch fetch;
  std::int64_t piece_left = 0;  // bytes
  std::size_t next_piece = 0;
};

inline void wgrad_task(const WgradShape& g, const WgradArgs& args, const WgradPlan& plan, const WgradTask& task) {
  WgradRunner(g, args, plan, task).run();
}
