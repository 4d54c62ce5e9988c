// The mathematics of one element, for the CPU's vectors and for a GPU's threads: V is a vector of floats or a float.
// Read inside the namespace of each instruction set and of the CUDA kernels, after their exponential(V); so there is no
// guard and no include here. Every comparison is written so that NaN takes the branch that keeps it.

#if defined(__CUDACC__)
#define FUSED_RESNET_BOTH __host__ __device__
#else
#define FUSED_RESNET_BOTH
#endif

template <int kAct, class V>
FUSED_RESNET_BOTH inline V activate(V v) {
  if constexpr (kAct == kRelu || kAct == kRelu6) v = v < 0.0f ? V{} : v;
  if constexpr (kAct == kRelu6) v = v > 6.0f ? V{} + 6.0f : v;
  if constexpr (kAct == kHardswish) {
    V gate = v + 3.0f;
    gate = gate < 0.0f ? V{} : gate;
    gate = gate > 6.0f ? V{} + 6.0f : gate;
    v = v * gate * (1.0f / 6);
  }
  if constexpr (kAct == kSilu) v = v / (1.0f + exponential(-v));
  return v;
}

// The gradient of the pre-activation, from that of the output. `at` is the output for ReLU and ReLU6, which are told
// from it, and the pre-activation for the others.
template <int kAct, class V>
FUSED_RESNET_BOTH inline V activate_grad(V g, V at) {
  if constexpr (kAct == kRelu || kAct == kRelu6) g = at <= 0.0f ? V{} : g;
  if constexpr (kAct == kRelu6) g = at >= 6.0f ? V{} : g;
  if constexpr (kAct == kHardswish) {
    V inside = g * (at * (1.0f / 3) + 0.5f);
    inside = at <= -3.0f ? V{} : inside;
    g = at >= 3.0f ? g : inside;
  }
  if constexpr (kAct == kSilu) {
    const V gate = 1.0f / (1.0f + exponential(-at));
    g = g * gate * (1.0f + at * (1.0f - gate));
  }
  return g;
}

// Batch norm's output before residual and activation, of x - centre.
template <class V>
FUSED_RESNET_BOTH inline V batch_norm(V centred, V scale, V shift) {
  return centred * scale + shift;
}

// Batch norm's input gradient: mean_g is the mean of g, slope that of g * (x - mean), over the variance.
template <class V>
FUSED_RESNET_BOTH inline V batch_norm_grad(V g, V centred, V scale, V mean_g, V slope) {
  return scale * (g - mean_g - centred * slope);
}

// The larger one in a max pool. NaN wins, as in aten: as `v` it is asked for by name, as `best` it fails the comparison
// and stays.
template <class V>
FUSED_RESNET_BOTH inline V larger(V v, V best) {
  best = v > best ? v : best;
  return v == v ? best : v;
}

#undef FUSED_RESNET_BOTH
