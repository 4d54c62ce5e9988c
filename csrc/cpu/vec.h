// Vectors of kN floats, written in the compiler's own vector types so that every instruction set shares one source.
// Read by per_isa.h inside the namespace of each set, so there is no guard and no include here.

template <int kN>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * kN)));
  typedef std::int32_t Int __attribute__((vector_size(4 * kN)));
  typedef std::uint32_t Bits __attribute__((vector_size(4 * kN)));
  typedef std::uint16_t Half __attribute__((vector_size(2 * kN)));
  typedef std::uint8_t Bytes __attribute__((vector_size(kN)));
  typedef long long Sixteen __attribute__((vector_size(16)));  // bytes, as intrinsics take them
};

template <int kN>
using Vec = typename Lanes<kN>::Float;

template <int kN>
inline Vec<kN> splat(float value) {
  return Vec<kN>{} + value;
}

template <int kN>
inline Vec<kN> load(const float* p) {
  Vec<kN> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int kN>
inline Vec<kN> load(const Bf16* p) {
  typename Lanes<kN>::Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<kN>)(__builtin_convertvector(half, typename Lanes<kN>::Bits) << 16);
}

template <int kN>
inline void store(float* p, Vec<kN> v) {
  std::memcpy(p, &v, sizeof v);
}

// The 16 bits of v as bfloat16. Rounds to nearest even; a NaN, which the rounding could turn into an infinity, becomes
// torch's quiet NaN.
template <int kN>
inline typename Lanes<kN>::Bits bf16_bits(Vec<kN> v) {
  using Bits = typename Lanes<kN>::Bits;
  const Bits bits = (Bits)v;
  const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v == v ? nearest : Bits{} + 0x7fc0;
}

template <int kN>
inline void store(Bf16* p, Vec<kN> v) {
  const auto half = __builtin_convertvector(bf16_bits<kN>(v), typename Lanes<kN>::Half);
  std::memcpy(p, &half, sizeof half);
}

// Compilers take the conversion of so many bytes apart, at ten times the cost of the instruction that there is for it.
template <int kN>
inline typename Lanes<kN>::Int load_bytes(const std::uint8_t* p) {
  typename Lanes<kN>::Int v;
#if defined(__x86_64__)
  if constexpr (kN == 16 || kN == 8) {
    typename Lanes<kN>::Sixteen bytes{};
    std::memcpy(&bytes, p, kN);
    if constexpr (kN == 16)
      v = (decltype(v))_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    else
      v = (decltype(v))_mm256_cvtepu8_epi32(bytes);
    return v;
  }
#endif
  for (int i = 0; i < kN; ++i)
    v[i] = p[i];
  return v;
}

template <int kN>
inline void store_bytes(std::uint8_t* p, typename Lanes<kN>::Int v) {
  const auto bytes = __builtin_convertvector(v, typename Lanes<kN>::Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}

// v as it is read where it was stored as T.
template <class T, int kN>
inline Vec<kN> rounded(Vec<kN> v) {
  if constexpr (sizeof(T) == 4) return v;
  return (Vec<kN>)(bf16_bits<kN>(v) << 16);
}

// Whether vectors of T fill cache lines: writing pieces of a line past the caches costs more than it spares.
template <class T>
constexpr bool kCanStream = kLanes * sizeof(T) == 64;

// Writes v, past the caches (to an aligned address) with kStream.
template <bool kStream, int kN, class T>
inline void put(T* p, Vec<kN> v) {
#if defined(__x86_64__)
  if constexpr (kStream && kN == 16)
    _mm512_stream_ps(p, v);
  else
#endif
    store<kN>(p, v);
}

// Orders what put<true> wrote before what this thread writes next.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// e^x = 2^n e^r with n = round(x / ln 2), by the Taylor series to r^7 (its error is 5e-9 at |r| = ln(2) / 2). Inf, 0
// and NaN as std::exp; 2^n is applied in two factors, so that n = 128 overflows only where the result does.
template <class V>
inline V exponential(V x) {
  constexpr int kN = sizeof(V) / sizeof(float);
  using Int = typename Lanes<kN>::Int;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -104.0f ? splat<kN>(-104.0f) : x;
  x = x > 89.0f ? splat<kN>(89.0f) : x;
  const Vec<kN> shifted = x * 1.44269504f + kRound;
  const Vec<kN> n = shifted - kRound;
  const Vec<kN> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<kN> p = splat<kN>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int power = (Int)shifted - std::bit_cast<std::int32_t>(kRound);
  const Int half = power >> 1;
  return p * (Vec<kN>)((half + 127) << 23) * (Vec<kN>)((power - half + 127) << 23);
}
