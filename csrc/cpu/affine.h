// A batch norm over kN channels. Read by per_isa.h inside the namespace of each instruction set, so there is no guard
// here.

template <int kN>
struct AffineLanes {
  Vec<kN> mean{}, scale{}, shift{};

  AffineLanes() = default;
  AffineLanes(const Affine& affine, std::int64_t c)
      : mean(load<kN>(affine.mean + c)), scale(load<kN>(affine.scale + c)), shift(load<kN>(affine.shift + c)) {}

  Vec<kN> of_centred(Vec<kN> centred) const { return batch_norm<Vec<kN>>(centred, scale, shift); }
};
