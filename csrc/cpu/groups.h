// The way through a tile of rows x channels. Read by per_isa.h inside the namespace of each instruction set, so there
// is no guard here. Rows are taken kGroup at a time and channels kLanes at a time: a group reads whole cache lines of
// consecutive rows, keeps them in registers, and touches the per-channel vectors once.

constexpr int kGroup = 8;

template <int kRows, class Body>
inline void for_lanes(std::int64_t row, const Tile& tile, Body body) {
  std::int64_t c = 0;
  for (; c + kLanes <= tile.channels; c += kLanes)
    body.template operator()<kRows, kLanes>(row, tile.channel + c);
  if constexpr (kLanes > 4)
    for (; c + 4 <= tile.channels; c += 4)
      body.template operator()<kRows, 4>(row, tile.channel + c);
  for (; c < tile.channels; ++c)
    body.template operator()<kRows, 1>(row, tile.channel + c);
}

// Calls body<kRows, kN>(row, channel) over the tile.
template <class Body>
inline void for_groups(const Tile& tile, Body body) {
  const std::int64_t end = tile.row + tile.rows;
  std::int64_t row = tile.row;
  for (; row + kGroup <= end; row += kGroup)
    for_lanes<kGroup>(row, tile, body);
  for (; row < end; ++row)
    for_lanes<1>(row, tile, body);
}
