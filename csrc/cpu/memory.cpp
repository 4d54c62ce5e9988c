#include "cpu/memory.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 64;      // a cache line
constexpr int64_t kKeepFrom = 1 << 20;  // smaller blocks stay in malloc's own lists
constexpr int64_t kHuge = 2 << 20;      // a large page; kept blocks are whole ones
constexpr int64_t kChunk = 8 << 20;     // packed weights come in chunks of this size, larger ones alone

int64_t round_up(int64_t bytes, int64_t grain) {
  return (bytes + grain - 1) / grain * grain;
}

void* allocate(int64_t bytes, int64_t alignment) {
  void* data = std::aligned_alloc(alignment, round_up(std::max<int64_t>(bytes, 1), alignment));
  if (!data) throw std::bad_alloc();
  return data;
}

// Keeps so much that with what is in use it is never more than was in use at once.
class Cache {
 public:
  void* take(int64_t bytes) {
    bytes = round_up(bytes, kHuge);
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that holds it, unless half of it would lie idle; of equal ones the last, whose lines are in the
    // caches.
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == idle_.end() || it->bytes <= best->bytes)) best = it;
    Block block{nullptr, bytes};
    if (best != idle_.end()) {
      block = *best;
      idle_.erase(best);
      idle_bytes_ -= block.bytes;
    }
    const int64_t in_use = in_use_bytes_ + block.bytes;
    if (!block.data) {
      release(std::max(most_in_use_, in_use) - in_use);
      block.data = allocate(bytes, kHuge);
      advise_huge_pages(block.data, bytes);
    }
    in_use_[block.data] = block.bytes;
    in_use_bytes_ = in_use;
    most_in_use_ = std::max(most_in_use_, in_use);
    return block.data;
  }

  void put(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = in_use_.find(data);
    idle_.push_back({data, found->second});
    idle_bytes_ += found->second;
    in_use_bytes_ -= found->second;
    in_use_.erase(found);
  }

  int64_t clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = idle_bytes_;
    release(0);
    most_in_use_ = in_use_bytes_;
    return bytes;
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  // Frees the blocks that have been idle for longest until at most `most` bytes are.
  void release(int64_t most) {
    size_t count = 0;
    for (; idle_bytes_ > most; ++count) {
      std::free(idle_[count].data);
      idle_bytes_ -= idle_[count].bytes;
    }
    idle_.erase(idle_.begin(), idle_.begin() + count);
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the longest idle first
  std::unordered_map<void*, int64_t> in_use_;
  int64_t idle_bytes_ = 0, in_use_bytes_ = 0, most_in_use_ = 0;
};

Cache& cache() {
  static Cache* const value = new Cache;  // never destroyed: tensors may outlive every static object
  return *value;
}

// Lives as long as a tensor that lies in it, or until the next one is begun.
struct Chunk {
  explicit Chunk(int64_t bytes) : size(bytes), data(static_cast<char*>(allocate(bytes, kHuge))) {
    advise_huge_pages(data, size);
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { std::free(data); }

  int64_t size, used = 0;
  char* data;
};

struct Piece {
  std::shared_ptr<Chunk> chunk;
  char* data;
};

Piece piece(int64_t bytes) {
  static std::shared_ptr<Chunk>* const current = new std::shared_ptr<Chunk>;  // never destroyed, as above
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  bytes = round_up(bytes, kAlignment);
  if (!*current || (*current)->used + bytes > (*current)->size)
    *current = std::make_shared<Chunk>(std::max(kChunk, round_up(bytes, kHuge)));
  const Piece found{*current, (*current)->data + (*current)->used};
  (*current)->used += bytes;
  return found;
}

int64_t element_size(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be fp32 or bf16");
  return dtype == ScalarType::Float ? 4 : 2;
}

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
}

namespace {

Tensor kept_memory(int64_t bytes, torch::headeronly::IntHeaderOnlyArrayRef size,
                   torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  if (bytes < kKeepFrom)
    return torch::stable::from_blob(allocate(bytes, kAlignment), size, strides, kCpu, dtype,
                                    [](void* data) { std::free(data); });
  return torch::stable::from_blob(cache().take(bytes), size, strides, kCpu, dtype,
                                  [](void* data) { cache().put(data); });
}

}  // namespace

Tensor empty_channels_last(std::vector<int64_t> size, ScalarType dtype) {
  STD_TORCH_CHECK(size.size() == 4, "empty_channels_last: size must be [N, C, H, W]");
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  return kept_memory(n * c * h * w * element_size(dtype), size, {h * w * c, 1, w * c, c}, dtype);
}

bool is_channels_last(const Tensor& t) {
  const auto size = t.sizes(), stride = t.strides();
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (size[dim] != 1 && stride[dim] != expected) return false;
    expected *= size[dim];
  }
  return true;
}

Tensor empty_packed(int64_t numel, ScalarType dtype, bool lasting) {
  const int64_t bytes = numel * element_size(dtype);
  if (!lasting) return kept_memory(bytes, {numel}, {1}, dtype);
  Piece memory = piece(bytes);
  char* data = memory.data;
  return torch::stable::from_blob(data, {numel}, {1}, kCpu, dtype, [chunk = std::move(memory.chunk)](void*) {});
}

int64_t empty_cache() {
  return cache().clear();
}

}  // namespace fused_resnet::cpu
