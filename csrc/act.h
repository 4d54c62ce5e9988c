// Activations, as their codes in the schemas and in fused_resnet/backends.
#pragma once

namespace fused_resnet {

enum Act : int { kNone = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kSilu = 4 };

}  // namespace fused_resnet
