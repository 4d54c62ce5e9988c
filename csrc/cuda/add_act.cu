// act(x + residual) and its gradient: one pass over memory each, 16 bytes an access, kVectors of them in flight a
// thread, in fp32.

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fused_resnet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;

// The elements of a block lie side by side: kVectors rounds of kThreads accesses of kN elements. Calls load(i, v) for
// this thread's accesses, then finish(i, v): what is loaded first is on its way while the next is asked for.
template <int kN, class Load, class Finish>
FUSED_RESNET_DEVICE void for_vectors(std::int64_t count, const Load& load, const Finish& finish) {
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kVectors * kThreads + threadIdx.x) * kN;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (const std::int64_t i = first + static_cast<std::int64_t>(v) * kThreads * kN; i < count) load(i, v);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    if (const std::int64_t i = first + static_cast<std::int64_t>(v) * kThreads * kN; i < count) finish(i, v);
}

// y = act(x + residual); count is a multiple of kN.
template <class T, int kN, int kAct>
__global__ void __launch_bounds__(kThreads)
    add_act_fwd_kernel(const T* x, const T* residual, T* y, std::int64_t count) {
  Pack<T, kN> a[kVectors], b[kVectors];
  for_vectors<kN>(
      count,
      [&](std::int64_t i, int v) {
        a[v] = load_pack<T, kN>(x + i);
        b[v] = load_pack<T, kN>(residual + i);
      },
      [&](std::int64_t i, int v) {
        Pack<T, kN> out;
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float sum = static_cast<float>(a[v].data[e]) + static_cast<float>(b[v].data[e]);
          out.data[e] = static_cast<T>(activate<kAct>(sum));
        }
        store_global(y + i, out);
      });
}

// dx = dy * act'(x + residual), told from y = act(x + residual) for ReLU and ReLU6.
template <class T, int kN, int kAct>
__global__ void __launch_bounds__(kThreads)
    add_act_bwd_kernel(const T* dy, const T* y, const T* x, const T* residual, T* dx, std::int64_t count) {
  constexpr bool kFromOutput = kAct == kRelu || kAct == kRelu6;
  Pack<T, kN> g[kVectors], a[kVectors], b[kVectors];
  for_vectors<kN>(
      count,
      [&](std::int64_t i, int v) {
        g[v] = load_pack<T, kN>(dy + i);
        a[v] = load_pack<T, kN>((kFromOutput ? y : x) + i);
        if constexpr (!kFromOutput) b[v] = load_pack<T, kN>(residual + i);
      },
      [&](std::int64_t i, int v) {
        Pack<T, kN> out;
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          float at = static_cast<float>(a[v].data[e]);
          if constexpr (!kFromOutput) at += static_cast<float>(b[v].data[e]);
          out.data[e] = static_cast<T>(activate_grad<kAct>(static_cast<float>(g[v].data[e]), at));
        }
        store_global(dx + i, out);
      });
}

std::int64_t blocks(std::int64_t count, int width) {
  return ceil_div(count, static_cast<std::int64_t>(kThreads) * kVectors * width);
}

}  // namespace

void add_act_fwd(Tensor x, Tensor residual, std::int64_t act, Tensor y) {
  const Arguments args("add_act_fwd", x);
  args.image(x, "x");
  args.like(residual, x, "residual");
  args.activation(act);
  args.like(y, x, "y");
  const Launcher launch(x);
  with_dtype(x, [&](auto t) {
    using T = decltype(t);
    with_width<T>(x.numel(), [&](auto width) {
      with_act(act, [&](auto code) {
        launch(add_act_fwd_kernel<T, width(), code()>, blocks(x.numel(), width()), kThreads, 0,
               static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(residual.const_data_ptr()),
               static_cast<T*>(y.mutable_data_ptr()), x.numel());
      });
    });
  });
}

void add_act_bwd(Tensor dy, std::optional<Tensor> y, std::optional<Tensor> x, std::optional<Tensor> residual,
                 std::int64_t act, Tensor dx) {
  const Arguments args("add_act_bwd", dy);
  args.image(dy, "dy");
  args.number(act, kRelu, "act", kSilu);
  if (act == kRelu || act == kRelu6) {
    args.given(y, "y", "the output, which tells the slope of a clamp");
  } else {
    args.given(x, "x", "the inputs, which tell the slope");
    args.given(residual, "residual", "the inputs, which tell the slope");
  }
  args.like(y, dy, "y");
  args.like(x, dy, "x");
  args.like(residual, dy, "residual");
  args.like(dx, dy, "dx");
  const Launcher launch(dy);
  with_dtype(dy, [&](auto t) {
    using T = decltype(t);
    with_width<T>(dy.numel(), [&](auto width) {
      with_act(act, [&](auto code) {
        if constexpr (code() != kNone)  // whose gradient is dy itself
          launch(add_act_bwd_kernel<T, width(), code()>, blocks(dy.numel(), width()), kThreads, 0,
                 static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(data_or_null(y)),
                 static_cast<const T*>(data_or_null(x)), static_cast<const T*>(data_or_null(residual)),
                 static_cast<T*>(dx.mutable_data_ptr()), dy.numel());
      });
    });
  });
}

}  // namespace fused_resnet::cuda
