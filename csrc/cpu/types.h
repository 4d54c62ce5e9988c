// Read by per_isa.h inside the namespace of each instruction set.

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
