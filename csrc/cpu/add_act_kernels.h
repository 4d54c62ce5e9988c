// The passes of add_act over elements [begin, end). Read by per_isa.h inside the namespace of each instruction set.

// Calls body<kN>(index) over the range.
template <class Body>
inline void for_elements(std::int64_t begin, std::int64_t end, Body body) {
  for (; begin + kLanes <= end; begin += kLanes)
    body.template operator()<kLanes>(begin);
  for (; begin < end; ++begin)
    body.template operator()<1>(begin);
}

// out = act(x + residual)
inline void add_act(const AddActArgs& args, std::int64_t begin, std::int64_t end) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
    T* out = static_cast<T*>(args.out);
    for_elements(begin, end, [=]<int kN>(std::int64_t i) {
      store<kN>(out + i, activate<kAct>(load<kN>(x + i) + load<kN>(residual + i)));
    });
  });
}

// out = dy * act'(x + residual), told from y = act(x + residual) for ReLU and ReLU6.
inline void add_act_grad(const AddActArgs& args, std::int64_t begin, std::int64_t end) {
  with_types(args.bf16, args.act, [&]<class T, int kAct>() {
    constexpr bool kFromOutput = kAct == kRelu || kAct == kRelu6;
    const T *dy = static_cast<const T*>(args.dy), *y = static_cast<const T*>(args.y);
    const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
    T* out = static_cast<T*>(args.out);
    for_elements(begin, end, [=]<int kN>(std::int64_t i) {
      Vec<kN> at{};
      if constexpr (kFromOutput) at = load<kN>(y + i);
      if constexpr (!kFromOutput && kAct != kNone) at = load<kN>(x + i) + load<kN>(residual + i);
      store<kN>(out + i, activate_grad<kAct>(load<kN>(dy + i), at));
    });
  });
}
