// Activations and their derivatives on vectors. Read by per_isa.h inside the namespace of each instruction set. Every
// comparison is written so that NaN takes the branch that keeps it.

template <int kAct, int kN>
inline Vec<kN> activate(Vec<kN> v) {
  if constexpr (kAct == kRelu || kAct == kRelu6) v = v < 0.0f ? Vec<kN>{} : v;
  if constexpr (kAct == kRelu6) v = v > 6.0f ? splat<kN>(6.0f) : v;
  if constexpr (kAct == kHardswish) {
    Vec<kN> gate = v + 3.0f;
    gate = gate < 0.0f ? Vec<kN>{} : gate;
    gate = gate > 6.0f ? splat<kN>(6.0f) : gate;
    v = v * gate * (1.0f / 6);
  }
  if constexpr (kAct == kSilu) v = v / (1.0f + exp<kN>(-v));
  return v;
}

// The gradient of the pre-activation, from that of the output. `at` is the output for ReLU and ReLU6, which are told
// from it, and the pre-activation for the others.
template <int kAct, int kN>
inline Vec<kN> activate_grad(Vec<kN> g, Vec<kN> at) {
  if constexpr (kAct == kRelu || kAct == kRelu6) g = at <= 0.0f ? Vec<kN>{} : g;
  if constexpr (kAct == kRelu6) g = at >= 6.0f ? Vec<kN>{} : g;
  if constexpr (kAct == kHardswish) {
    Vec<kN> inside = g * (at * (1.0f / 3) + 0.5f);
    inside = at <= -3.0f ? Vec<kN>{} : inside;
    g = at >= 3.0f ? g : inside;
  }
  if constexpr (kAct == kSilu) {
    const Vec<kN> gate = 1.0f / (1.0f + exp<kN>(-at));
    g = g * gate * (1.0f + at * (1.0f - gate));
  }
  return g;
}

// Calls body<T, kAct>() for the element type and the activation.
template <class Body>
inline void with_types(bool bf16, int act, Body body) {
  const auto with_act = [&]<class T>() {
    switch (act) {
      case kNone:
        return body.template operator()<T, kNone>();
      case kRelu:
        return body.template operator()<T, kRelu>();
      case kRelu6:
        return body.template operator()<T, kRelu6>();
      case kHardswish:
        return body.template operator()<T, kHardswish>();
      default:
        return body.template operator()<T, kSilu>();
    }
  };
  if (bf16)
    with_act.template operator()<Bf16>();
  else
    with_act.template operator()<float>();
}
