// The scheduler of tests/emulator/device.h, and the kernels' registration for CPU tensors.

#include <ucontext.h>
#include <csetjmp>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace emulator {
namespace {

constexpr std::size_t kStack = 64 << 10;
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  Wait wait = Wait::kNothing;
  Exchange* exchange = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

std::mutex one_launch;  // everything below is of the launch that runs
std::vector<Thread> threads;
std::vector<unsigned char> stacks, shared_memory;
const std::function<void()>* kernel = nullptr;
Thread* running = nullptr;
jmp_buf scheduler;
std::string failure;
int order = 0;  // 0: the first warp first; 1: the last one

// Back to the scheduler, until it comes back here.
void leave(Wait wait) {
  running->wait = wait;
  if (_setjmp(running->at) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const std::string& what) {
  if (failure.empty())
    failure = what + " (block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread_index.x) + ")";
  running->wait = Wait::kDone;
  _longjmp(scheduler, 1);
}

void fiber() {
  (*kernel)();
  running->wait = Wait::kDone;
  _longjmp(scheduler, 1);
}

void resume(int i) {
  running = &threads[i];
  thread_index.x = static_cast<unsigned>(i);
  if (_setjmp(scheduler) != 0) return;
  running->wait = Wait::kNothing;
  if (running->started) _longjmp(running->at, 1);
  running->started = true;
  getcontext(&running->start);
  running->start.uc_stack.ss_sp = stacks.data() + i * kStack;
  running->start.uc_stack.ss_size = kStack;
  running->start.uc_link = nullptr;
  makecontext(&running->start, fiber, 0);
  setcontext(&running->start);
}

// Runs a warp until all of it waits for the block or is done.
void run_warp(int first) {
  while (failure.empty()) {
    for (int lane = 0; lane < kWarp; ++lane)
      if (threads[first + lane].wait == Wait::kNothing) resume(first + lane);
    int together = 0;
    Exchange* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      lanes[lane] = threads[first + lane].exchange;
      together += threads[first + lane].wait == Wait::kWarp && lanes[lane]->run == lanes[0]->run;
    }
    if (!failure.empty()) return;
    if (together == 0) return;
    if (together < kWarp) {
      failure = std::string("a warp parted at ") + lanes[0]->name + ", warp " + std::to_string(first / kWarp);
      return;
    }
    lanes[0]->run(lanes);
    for (int lane = 0; lane < kWarp; ++lane)
      threads[first + lane].wait = Wait::kNothing;
  }
}

void run_block(int count) {
  for (int i = 0; i < count; ++i) {
    threads[i].started = false;
    threads[i].wait = Wait::kNothing;
    threads[i].exchange = nullptr;
    threads[i].groups.clear();
    threads[i].open.clear();
  }
  while (failure.empty()) {
    for (int warp = 0; warp < count / kWarp; ++warp)
      run_warp((order ? count / kWarp - 1 - warp : warp) * kWarp);
    int waiting = 0;
    for (int i = 0; i < count; ++i)
      waiting += threads[i].wait == Wait::kBlock;
    if (waiting == 0) break;
    if (waiting < count && failure.empty()) failure = "some threads missed a barrier of their block";
    for (int i = 0; i < count; ++i)
      threads[i].wait = Wait::kNothing;
  }
  for (int i = 0; i < count && failure.empty(); ++i)
    if (!threads[i].groups.empty() || !threads[i].open.empty())
      for (auto& group : threads[i].groups)
        if (!group.empty()) failure = "a block ended before its copies were waited for";
}

}  // namespace

void launch(int blocks, int count, std::size_t shared, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (count % kWarp || count > 1024) throw std::runtime_error("a block must be whole warps, at most 32");
  if (shared > kMostShared)
    throw std::runtime_error("emulator: a block takes " + std::to_string(shared) + " bytes of shared memory, of " +
                             std::to_string(kMostShared));
  const char* wanted = std::getenv("FUSED_RESNET_EMULATOR_ORDER");
  order = wanted ? std::atoi(wanted) : 0;
  threads.resize(count);
  stacks.resize(count * kStack);
  kernel = &body;
  failure.clear();
  block_size.x = static_cast<unsigned>(count);
  grid_size.x = static_cast<unsigned>(blocks);
  const char* last = std::getenv("FUSED_RESNET_EMULATOR_LAST");  // so many blocks of the grid, the last ones
  const int first = last && std::atoi(last) < blocks ? blocks - std::atoi(last) : 0;
  for (int b = first; b < blocks && failure.empty(); ++b) {
    block_index.x = static_cast<unsigned>(order ? blocks - 1 - (b - first) : b);
    shared_memory.assign(shared + 128, 0xff);  // NaN in every type
    run_block(count);
  }
  if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
}

unsigned char* block_memory() {
  const auto address = reinterpret_cast<std::uintptr_t>(shared_memory.data());
  return shared_memory.data() + (128 - address % 128) % 128;
}

void check_shared(const void* address, int bytes) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto* begin = block_memory();
  if (at < begin || at + bytes > begin + shared_memory.size() - 128) fail("an address outside of shared memory");
  if ((at - begin) % bytes) fail("an address in shared memory that is not aligned");
}

void fail_alignment() {
  fail("an access that is not aligned");
}

void wait_for_block() {
  leave(Wait::kBlock);
}

void wait_for_warp(Exchange& exchange) {
  running->exchange = &exchange;
  leave(Wait::kWarp);
}

void copy_later(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16) fail("a copy from an address that is not aligned");
  running->open.push_back({shared, global, valid});
}

void commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait_for_copies(int pending) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front())
      copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_C, CPU, m) {
  FUSED_RESNET_CUDA_OPERATORS(m);
}
