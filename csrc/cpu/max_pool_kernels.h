// One row of outputs of a max pool. Read by per_isa.h inside the namespace of each instruction set.

template <class T, int kN>
inline void max_pool_pixel(const MaxPoolArgs& args, const T* first, std::int64_t rows, std::int64_t cols,
                           std::int64_t c, T* out) {
  Vec<kN> best = load<kN>(first + c);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t s = 0; s < cols; ++s)
      best = larger(load<kN>(first + (r * args.w + s) * args.channels + c), best);
  store<kN>(out + c, best);
}

template <class T>
inline void max_pool_row(const MaxPoolArgs& args, std::int64_t row) {
  const std::int64_t n = row / args.p, y = row % args.p * args.stride_h - args.pad_h;
  const std::int64_t top = std::max<std::int64_t>(y, 0), bottom = std::min(y + args.r, args.h);
  const T* image = static_cast<const T*>(args.x) + n * args.h * args.w * args.channels;
  T* out = static_cast<T*>(args.out) + row * args.q * args.channels;
  for (std::int64_t q = 0; q < args.q; ++q, out += args.channels) {
    const std::int64_t x = q * args.stride_w - args.pad_w;
    const std::int64_t left = std::max<std::int64_t>(x, 0), right = std::min(x + args.s, args.w);
    const T* first = image + (top * args.w + left) * args.channels;
    std::int64_t c = 0;
    for (; c + kLanes <= args.channels; c += kLanes)
      max_pool_pixel<T, kLanes>(args, first, bottom - top, right - left, c, out);
    for (; c < args.channels; ++c)
      max_pool_pixel<T, 1>(args, first, bottom - top, right - left, c, out);
  }
}

inline void max_pool(const MaxPoolArgs& args, std::int64_t row) {
  args.bf16 ? max_pool_row<Bf16>(args, row) : max_pool_row<float>(args, row);
}
