// The gradient of a max pool. Read by per_isa.h inside the namespace of each instruction set, so there is no guard
// here.

// out = the sums of the gradients of the windows that took each pixel of the tile, in fp32 and in the order of the
// windows. out is the tile's first row, and as wide as all channels.
template <class T>
void max_pool_grad_rows(const PooledGradient& grad, const Tile& tile, T* out) {
  const Pool pool = grad.pool;
  const T* dy = static_cast<const T*>(grad.dy);
  const std::uint8_t* argmax = grad.argmax;
  for (std::int64_t row = tile.row; row < tile.row + tile.rows; ++row, out += pool.channels) {
    const std::int64_t n = row / (pool.h * pool.w), y = row / pool.w % pool.h + pool.pad_h,
                       x = row % pool.w + pool.pad_w;
    const std::int64_t top = y < pool.r ? 0 : (y - pool.r) / pool.stride_h + 1;
    const std::int64_t left = x < pool.s ? 0 : (x - pool.s) / pool.stride_w + 1;
    const std::int64_t bottom = std::min(y / pool.stride_h + 1, pool.p);
    const std::int64_t right = std::min(x / pool.stride_w + 1, pool.q);
    const std::int64_t first = ((n * pool.p + top) * pool.q + left) * pool.channels;
    const std::int64_t first_tap = (y - top * pool.stride_h) * pool.s + x - left * pool.stride_w;
    for_lanes<1>(0, tile, [=]<int, int kN>(std::int64_t, std::int64_t c) {
      Vec<kN> sum{};
      for (std::int64_t p = 0; p < bottom - top; ++p) {
        std::int64_t at = first + p * pool.q * pool.channels + c, tap = first_tap - p * pool.stride_h * pool.s;
        for (std::int64_t q = left; q < right; ++q, at += pool.channels, tap -= pool.stride_w) {
          const auto taken = load_bytes<kN>(argmax + at) == static_cast<std::int32_t>(tap);
          sum += taken ? load<kN>(dy + at) : Vec<kN>{};
        }
      }
      store<kN>(out + c, sum);
    });
  }
}

inline void max_pool_grad_tile(const PooledGradient& grad, const Tile& tile, void* out) {
  grad.bf16 ? max_pool_grad_rows(grad, tile, static_cast<Bf16*>(out))
            : max_pool_grad_rows(grad, tile, static_cast<float*>(out));
}
