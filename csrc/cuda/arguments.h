// What every CUDA operator refuses, before anything is divided or launched: a kernel believes its arguments, and would
// read and write outside of the tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace fused_resnet::cuda {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

// The arguments of one operator. A message has the argument, what it was, and what was expected.
class Arguments {
 public:
  static constexpr std::int64_t kMostNumber = INT32_MAX;
  static constexpr int kAligned = 16;  // bytes, of an address that whole accesses start from
  static constexpr const char* kWhole = " at a multiple of 16 bytes";
#if defined(FUSED_RESNET_EMULATED)
  static constexpr const char* kDevice = "cpu";
#else
  static constexpr const char* kDevice = "a GPU";
#endif
  using Sizes = std::array<std::int64_t, 4>;

  // All tensors are where `first` is.
  Arguments(const char* op, const Tensor& first) : op_(op), device_(first.get_device_index()) {}

  void number(std::int64_t value, std::int64_t least, const char* name, std::int64_t most = kMostNumber) const {
    if (value < least || value > most)
      refuse(name, std::to_string(value), std::to_string(least) + (least == most ? "" : " to " + std::to_string(most)));
  }

  void activation(std::int64_t act) const { number(act, kNone, "act", kSilu); }

  // [N, C, H, W] in one of the three types, which lies in memory as [N, H, W, C] without gaps.
  void image(const Tensor& t, const char* name) const {
    const auto type = t.scalar_type();
    const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
    if (!known || !Layout(t).dense() || !lies_here(t, kAligned))
      refuse(name, t, "a dense channels_last tensor [N, C, H, W], not empty, of Float, BFloat16 or Half");
  }

  // One more of another's type, and of these sizes.
  void image(const Tensor& t, const Tensor& other, const Sizes& sizes, const char* name) const {
    const Layout layout(t);
    if (!layout.dense() || !layout.is(sizes) || dtype(t) != dtype(other) || !lies_here(t, kAligned))
      refuse(name, t, "a dense channels_last " + text(other.scalar_type(), sizes));
  }

  void like(const Tensor& t, const Tensor& other, const char* name) const { image(t, other, sizes_of(other), name); }

  void like(const std::optional<Tensor>& t, const Tensor& other, const char* name) const {
    if (t) like(*t, other, name);
  }

  // Bytes that lie as the elements of an image do.
  void bytes_like(const Tensor& t, const Tensor& image, const char* name) const {
    const Sizes sizes = sizes_of(image);
    const Layout layout(t);
    if (!layout.dense() || !layout.is(sizes) || dtype(t) != aoti_torch_dtype_uint8() || !lies_here(t, kAligned))
      refuse(name, t, "a dense channels_last " + text(ScalarType::Byte, sizes));
  }

  void bytes_like(const std::optional<Tensor>& t, const Tensor& image, const char* name) const {
    if (t) bytes_like(*t, image, name);
  }

  // rows x columns elements of a type, side by side in a tensor of any sizes.
  void matrix(const Tensor& t, ScalarType type, std::int64_t rows, std::int64_t columns, const char* name,
              int alignment = kAligned) const {
    const std::int64_t count = t.numel();
    if (count == 0 || count / columns != rows || count % columns || !has_dtype(t, type) || !t.is_contiguous() ||
        !lies_here(t, alignment))
      refuse(name, t,
             "contiguous " + text(type, rows == 1 ? std::vector{columns} : std::vector{rows, columns}) +
                 (alignment == kAligned ? kWhole : ""));
  }

  // A number for each channel.
  void vector(const Tensor& t, std::int64_t count, const char* name, int alignment = kAligned) const {
    matrix(t, ScalarType::Float, 1, count, name, alignment);
  }

  void vector(const std::optional<Tensor>& t, std::int64_t count, const char* name, int alignment = kAligned) const {
    if (t) vector(*t, count, name, alignment);
  }

  // `sums` numbers for each channel of x and each tile of tile_rows of its pixels.
  void partials(const Tensor& t, const Tensor& x, std::int64_t tile_rows, std::int64_t sums) const {
    number(tile_rows, 1, "tile_rows");
    const std::int64_t channels = x.size(1);
    matrix(t, ScalarType::Float, ceil_div(x.numel() / channels, tile_rows), sums * channels, "partials");
  }

  void given(const std::optional<Tensor>& t, const char* name, const char* expected) const {
    if (!t) refuse(name, "None", expected);
  }

  // The height and width of the output of a window that goes over x; geometry begins with window, stride, padding and
  // dilation, each (down, across).
  std::array<std::int64_t, 2> map(const Tensor& x, const std::vector<std::int64_t>& geometry, std::size_t count) const {
    length(geometry, count, "geometry");
    for (int d = 0; d < 4; ++d)
      number(x.size(d), 1, "a size of x");
    std::array<std::int64_t, 2> sizes;
    for (int i = 0; i < 2; ++i) {
      number(geometry[i], 1, "geometry's window");
      number(geometry[2 + i], 1, "geometry's stride");
      number(geometry[4 + i], 0, "geometry's padding");
      number(geometry[6 + i], 1, "geometry's dilation");
      const std::int64_t padded = x.size(2 + i) + 2 * geometry[4 + i];
      const std::int64_t reach = (geometry[i] - 1) * geometry[6 + i] + 1;
      number(padded, 1, "x's padded height or width");
      number(reach, 1, "the reach of geometry's window", padded);
      sizes[i] = (padded - reach) / geometry[2 + i] + 1;
    }
    return sizes;
  }

  void length(const std::vector<std::int64_t>& numbers, std::size_t count, const char* name) const {
    if (numbers.size() != count) refuse(name, std::to_string(numbers.size()) + " numbers", std::to_string(count));
  }

  [[noreturn]] void refuse(const char* name, const std::string& was, const std::string& expected) const {
    throw std::runtime_error(std::string(op_) + ": " + name + " is " + was + "; expected " + expected);
  }

  [[noreturn]] void refuse(const char* name, const Tensor& t, const std::string& expected) const {
    std::ostringstream was;
    was << text(t.scalar_type(), t.sizes()) << " with strides" << list(t.strides()) << " on ";
    if (t.is_cuda())
      was << "cuda:" << t.get_device_index();
    else
      was << (t.is_cpu() ? "cpu" : "another device");
    if (reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % kAligned) was << ", not" << kWhole;
    refuse(name, was.str(), expected + " on " + (device_ < 0 ? kDevice : "cuda:" + std::to_string(device_)));
  }

 private:
  // The plain numbers of the C interface, each of which is a call: there are up to eighteen tensors to a launch.
  struct Layout {
    std::int64_t dim, *sizes, *strides;

    explicit Layout(const Tensor& t) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    }

    bool is(const Sizes& wanted) const { return std::equal(wanted.begin(), wanted.end(), sizes); }

    // Four sizes, none of them 0, as channels_last; the stride of a size of 1 means nothing.
    bool dense() const {
      if (dim != 4) return false;
      std::int64_t stride = 1;
      for (const int d : {1, 3, 2, 0}) {
        if (sizes[d] != 1 && strides[d] != stride) return false;
        stride *= sizes[d];
      }
      return stride > 0;
    }
  };

  static Sizes sizes_of(const Tensor& image) {
    std::int64_t* sizes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(image.get(), &sizes));
    return {sizes[0], sizes[1], sizes[2], sizes[3]};
  }

  static std::int32_t dtype(const Tensor& t) {
    std::int32_t number;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
    return number;
  }

  static bool has_dtype(const Tensor& t, ScalarType type) {
    return type == ScalarType::Float ? dtype(t) == aoti_torch_dtype_float32() : t.scalar_type() == type;
  }

  static std::int32_t device_type(const Tensor& t) {
    std::int32_t number;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &number));
    return number;
  }

  // The library has kernels of one type of device.
  static std::int32_t needed_device_type() {
#if defined(FUSED_RESNET_EMULATED)
    return aoti_torch_device_type_cpu();
#else
    return aoti_torch_device_type_cuda();
#endif
  }

  bool lies_here(const Tensor& t, int alignment) const {
    return device_type(t) == needed_device_type() && t.get_device_index() == device_ &&
           reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % alignment == 0;
  }

  // Such as " [2, 16, 5, 3]".
  template <class Numbers>
  static std::string list(const Numbers& numbers) {
    std::string text = " [";
    for (const std::int64_t number : numbers)
      text += (text.size() > 2 ? ", " : "") + std::to_string(number);
    return text + "]";
  }

  template <class Numbers>
  static std::string text(ScalarType type, const Numbers& sizes) {
    return toString(type) + list(sizes);
  }

  const char* op_;
  std::int32_t device_;
};

}  // namespace fused_resnet::cuda
