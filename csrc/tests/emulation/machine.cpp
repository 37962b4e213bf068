#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <typeindex>

#include "pdiff/error.h"
#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call preserves and the stack, and goes on with another one.
extern "C" void pdiff_emulation_switch(void** save_stack, void* load_stack);

#if !defined(__x86_64__)
#error "the emulation of CUDA kernels is written for x86-64"
#endif
asm(R"(
.text
.globl pdiff_emulation_switch
.type pdiff_emulation_switch, @function
pdiff_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pdiff_emulation_switch, .-pdiff_emulation_switch
)");

namespace pdiff::emulation {
namespace {

constexpr int kWarpSize = 32, kNumBarriers = 16, kResidentBlocks = 3;
constexpr size_t kStackBytes = 256 * 1024, kMaxStacks = kResidentBlocks * 1024;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int num_bytes;
};

struct Meeting {  // of the lanes of a mask
  uint32_t mask, arrived;
  const char* what;
  void* data[kWarpSize];
  bool* released[kWarpSize];
};

constexpr int kWarpgroupSize = 128;

struct GroupMeeting {  // of a warpgroup
  const char* what = nullptr;
  int num_arrived = 0;
  void* data[kWarpgroupSize] = {};
  bool* released[kWarpgroupSize] = {};
};

struct Barrier {
  int arrived = 0, num_threads = 0;
  int64_t generation = 0;
  Clock told[2];  // by those who have arrived, of this generation and the one before
};

struct Warp {
  std::vector<Meeting> meetings;
};

struct Block {
  Dim idx;
  unsigned char* shared = nullptr;
  std::vector<unsigned char> shared_of_engines;
  std::vector<Warp> warps;
  std::vector<GroupMeeting> group_meetings;
  std::vector<std::function<void()>> deferred;
  Barrier barriers[kNumBarriers];
  int num_running = 0;
  int free_registers = 0;

  ~Block() { std::free(shared); }
};

struct Fiber {
  Block* block = nullptr;
  int thread = 0;
  Witness witness;
  char* stack_memory = nullptr;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool done = false;
  int num_registers = 0;
  const char* waits_for = "";
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Copy> open_copies;
  std::map<std::type_index, std::any> states;
};

struct Machine {
  Dim grid, block;
  int64_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  Fiber* fiber = nullptr;
  int64_t progress = 0;
  std::string error;
};

thread_local Machine* machine = nullptr;
thread_local char* stacks = nullptr;  // [kMaxStacks, kStackBytes], taken up when they are used
thread_local std::vector<char*> free_stacks;

char* take_stack() {
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, kMaxStacks * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    PDIFF_CHECK(memory != MAP_FAILED, "emulation: no memory for stacks");
    stacks = static_cast<char*>(memory);
    for (size_t i = kMaxStacks; i > 0; --i) free_stacks.push_back(stacks + (i - 1) * kStackBytes);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

bool is_on_a_stack(const void* at) {
  const auto offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(stacks);
  return stacks != nullptr && offset < kMaxStacks * kStackBytes;
}

void to_scheduler() {
  Fiber& fiber = *machine->fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, machine->stack_bottom,
                                 machine->stack_size);
#endif
  pdiff_emulation_switch(&fiber.stack, machine->stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine->stack_bottom, &machine->stack_size);
#endif
}

void resume(Fiber& fiber) {
  machine->fiber = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine->fake_stack, fiber.stack_memory, kStackBytes);
#endif
  pdiff_emulation_switch(&machine->stack, fiber.stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine->fake_stack, nullptr, nullptr);
#endif
}

struct Stop {};  // unwinds a fiber whose run has failed

// The first function of a fiber. It never returns.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine->stack_bottom, &machine->stack_size);
#endif
  try {
    (*machine->body)();
    Fiber& fiber = *machine->fiber;
    if (!fiber.open_copies.empty() || !fiber.copy_groups.empty()) {
      for (const auto& group : fiber.copy_groups) {
        if (!group.empty()) fail("ends with copies that it never waited for");
      }
      if (!fiber.open_copies.empty()) fail("ends with copies that it never committed");
    }
  } catch (const Stop&) {
  } catch (const std::exception& error) {
    machine->error = error.what();
  }
  machine->fiber->done = true;
  --machine->fiber->block->num_running;
  ++machine->progress;
  to_scheduler();
  std::abort();
}

std::unique_ptr<Block> make_block(unsigned idx, std::vector<std::unique_ptr<Fiber>>& fibers) {
  auto block = std::make_unique<Block>();
  block->idx = {idx, 0, 0};
  void* shared = nullptr;
  const size_t bytes = machine->shared_bytes > 0 ? machine->shared_bytes : 1;
  PDIFF_CHECK(posix_memalign(&shared, 1024, bytes) == 0, "emulation: no shared memory");
  std::memset(shared, 0xff, bytes);
  forget_accesses(shared, machine->shared_bytes);
  block->shared = static_cast<unsigned char*>(shared);
  block->shared_of_engines.assign(bytes, 0xff);
  const int num_threads = static_cast<int>(machine->block.x);
  block->warps.resize((num_threads + kWarpSize - 1) / kWarpSize);
  block->group_meetings.resize((num_threads + kWarpgroupSize - 1) / kWarpgroupSize);
  block->num_running = num_threads;
  for (int thread = 0; thread < num_threads; ++thread) {
    auto fiber = std::make_unique<Fiber>(block.get(), thread, Witness(idx, thread));
    fiber->num_registers = 64 * 1024 / num_threads / 8 * 8;
    fiber->stack_memory = take_stack();
    void** top = reinterpret_cast<void**>(fiber->stack_memory + kStackBytes);
    *--top = nullptr;  // a return address, so that the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
    fiber->stack = top;
    fibers.push_back(std::move(fiber));
  }
  return block;
}

std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  text << "block " << fiber.block->idx.x << ", thread " << fiber.thread;
  return text.str();
}

void run_blocks(std::mt19937& random) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::vector<std::unique_ptr<Fiber>>> fibers;
  unsigned next_block = 0;
  int idle_passes = 0;
  std::array<size_t, kWarpSize> lanes;
  std::iota(lanes.begin(), lanes.end(), size_t{0});
  while (machine->error.empty()) {
    for (size_t i = 0; i < blocks.size();) {  // make room
      if (blocks[i]->num_running > 0) {
        ++i;
        continue;
      }
      if (!blocks[i]->deferred.empty()) {
        machine->error = "kernel: a block ends before its copies do";
        break;
      }
      for (const auto& fiber : fibers[i]) free_stacks.push_back(fiber->stack_memory);
      fibers.erase(fibers.begin() + static_cast<std::ptrdiff_t>(i));
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
    }
    while (blocks.size() < kResidentBlocks && next_block < machine->grid.x) {
      fibers.emplace_back();
      blocks.push_back(make_block(next_block++, fibers.back()));
    }
    if (blocks.empty() || !machine->error.empty()) break;

    const int64_t before = machine->progress;
    for (const auto& block : blocks) {
      std::vector<std::function<void()>> due;
      for (size_t i = 0; i < block->deferred.size();) {
        if (idle_passes == 0 && random() % 2 == 0) {
          ++i;
          continue;
        }
        due.push_back(std::move(block->deferred[i]));
        block->deferred.erase(block->deferred.begin() + static_cast<std::ptrdiff_t>(i));
      }
      for (const auto& operation : due) {
        operation();
        ++machine->progress;
      }
    }
    std::vector<std::pair<size_t, size_t>> warps;
    for (size_t b = 0; b < blocks.size(); ++b) {
      for (size_t w = 0; w < blocks[b]->warps.size(); ++w) warps.emplace_back(b, w);
    }
    std::shuffle(warps.begin(), warps.end(), random);
    for (const auto& [b, w] : warps) {
      if (idle_passes == 0 && random() % 4 == 0) continue;  // a warp falls behind
      std::shuffle(lanes.begin(), lanes.end(), random);
      for (const size_t lane : lanes) {
        const size_t thread = w * kWarpSize + lane;
        const bool runs = thread < fibers[b].size() && !fibers[b][thread]->done;
        if (runs && machine->error.empty()) resume(*fibers[b][thread]);
      }
    }
    idle_passes = machine->progress == before ? idle_passes + 1 : 0;
    if (idle_passes > 2 && machine->error.empty()) {
      // Told of the first block that hangs: who waits for what.
      for (const auto& of_block : fibers) {
        std::ostringstream text;
        const char* last = "";
        for (const auto& fiber : of_block) {
          const char* what = fiber->done ? "nothing: ended" : fiber->waits_for;
          if (std::strcmp(what, last) != 0)
            text << "; " << describe(*fiber) << " waits for " << what;
          last = what;
        }
        if (machine->error.empty()) machine->error = "deadlock: " + text.str().substr(2);
      }
    }
  }
  // A failed run: unwind what is left, so that nothing of the fibers' frames leaks.
  for (const auto& of_block : fibers) {
    for (const auto& fiber : of_block) {
      const bool started = fiber->waits_for[0] != '\0';
      if (!fiber->done && started) resume(*fiber);
      free_stacks.push_back(fiber->stack_memory);
    }
  }
}

void complete(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    access_memory(copy.to, copy.num_bytes, true, __builtin_return_address(0));
    if (copy.from != nullptr) {
      std::memcpy(copy.to, copy.from, copy.num_bytes);
    } else {
      std::memset(copy.to, 0, copy.num_bytes);
    }
  }
  copies.clear();
}

}  // namespace

void run(Dim grid, Dim block, int64_t shared_bytes, const std::function<void()>& body) {
  PDIFF_CHECK(machine == nullptr, "emulation: a kernel can not start a kernel");
  PDIFF_CHECK(grid.x > 0 && block.x > 0 && block.x <= 1024, "launch: invalid configuration ",
              grid.x, " x ", block.x);
  PDIFF_CHECK(shared_bytes <= device().max_shared_bytes, "launch: ", shared_bytes,
              " bytes of shared memory");
  static std::mt19937 random(20240229);
  Machine here;
  here.grid = grid;
  here.block = block;
  here.shared_bytes = shared_bytes;
  here.body = &body;
  forget_accesses();
  machine = &here;
  run_blocks(random);
  machine = nullptr;
  PDIFF_CHECK(here.error.empty(), here.error);
}

Device& device() {
  static Device here;
  return here;
}

Dim thread_idx() { return {static_cast<unsigned>(machine->fiber->thread), 0, 0}; }
Dim block_idx() { return machine->fiber->block->idx; }
Dim block_dim() { return machine->block; }
Dim grid_dim() { return machine->grid; }
int lane() { return machine->fiber->thread % kWarpSize; }
unsigned char* shared_memory() { return machine->fiber->block->shared; }
int64_t shared_memory_bytes() { return machine->shared_bytes; }
unsigned char* shared_memory_of_engines() {
  return machine->fiber->block->shared_of_engines.data();
}
void publish_shared_memory() {
  Block& block = *machine->fiber->block;
  std::memcpy(block.shared_of_engines.data(), block.shared, block.shared_of_engines.size());
}

std::any& thread_state(const std::type_info& type) { return machine->fiber->states[type]; }

void fail(const char* message) {
  if (machine->error.empty()) {
    machine->error = "kernel: " + describe(*machine->fiber) + ": " + message;
  }
  throw Stop{};
}

void wait(const char* what) {
  machine->fiber->waits_for = what;
  to_scheduler();
  if (!machine->error.empty()) throw Stop{};
}

void made_progress() { ++machine->progress; }

void together(uint32_t mask, const char* what, void* mine,
              const std::function<void(LaneData)>& operation) {
  Fiber& fiber = *machine->fiber;
  std::vector<Meeting>& meetings = fiber.block->warps[fiber.thread / kWarpSize].meetings;
  const uint32_t me = 1u << lane();
  if ((mask & me) == 0) fail("is not in the mask of lanes that it passes");
  size_t i = 0;
  while (i < meetings.size() && meetings[i].mask != mask) ++i;
  if (i == meetings.size()) meetings.push_back({mask, 0, what, {}, {}});
  Meeting& meeting = meetings[i];
  if (std::strcmp(meeting.what, what) != 0) fail("meets lanes that are at another instruction");
  bool released = false;
  meeting.arrived |= me;
  meeting.data[lane()] = mine;
  meeting.released[lane()] = &released;
  if (meeting.arrived == mask) {
    const Meeting whole = meeting;
    meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(i));
    operation(whole.data);
    for (int l = 0; l < kWarpSize; ++l) {
      if ((mask >> l & 1) != 0) *whole.released[l] = true;
    }
    made_progress();
    return;
  }
  while (!released) wait(what);
}

void together_in_warpgroup(const char* what, void* mine,
                           const std::function<void(GroupData)>& operation) {
  Fiber& fiber = *machine->fiber;
  const int me = fiber.thread % kWarpgroupSize;
  GroupMeeting& meeting = fiber.block->group_meetings[fiber.thread / kWarpgroupSize];
  if (meeting.num_arrived > 0 && std::strcmp(meeting.what, what) != 0) {
    fail("meets threads of its warpgroup that are at another instruction");
  }
  bool released = false;
  meeting.what = what;
  meeting.data[me] = mine;
  meeting.released[me] = &released;
  if (++meeting.num_arrived == kWarpgroupSize) {
    const GroupMeeting whole = meeting;
    meeting = {};
    operation(whole.data);
    for (bool* other : whole.released) *other = true;
    made_progress();
    return;
  }
  while (!released) wait(what);
}

void defer(std::function<void()> operation) {
  machine->fiber->block->deferred.push_back(std::move(operation));
}

void barrier(int idx, int num_threads) {
  if (idx < 0 || idx >= kNumBarriers) fail("barrier: expected index 0 to 15");
  if (num_threads % kWarpSize != 0 && num_threads != static_cast<int>(machine->block.x)) {
    fail("barrier: expected a multiple of 32 threads");
  }
  Block& block = *machine->fiber->block;
  Barrier& barrier = block.barriers[idx];
  const int64_t generation = barrier.generation;
  if (barrier.arrived > 0 && barrier.num_threads != num_threads) {
    fail("barrier: expects another number of threads than those who came before");
  }
  barrier.num_threads = num_threads;
  Clock& told = barrier.told[generation % 2];
  if (barrier.arrived++ == 0) told = {};
  machine->fiber->witness.tell(told);
  // A thread that has ended counts as arrived at the barrier of the whole block.
  const auto is_full = [&] {
    const int ended = idx == 0 && num_threads == static_cast<int>(machine->block.x)
                          ? num_threads - block.num_running
                          : 0;
    return barrier.arrived + ended >= num_threads;
  };
  const auto release = [&] {
    barrier.arrived = 0;
    ++barrier.generation;
    made_progress();
  };
  if (is_full()) release();
  while (barrier.generation == generation) {
    wait("a barrier");
    if (barrier.generation == generation && is_full()) release();
  }
  machine->fiber->witness.learn(told);
}

void sync_lanes(uint32_t mask) {
  together(mask, "syncwarp", &machine->fiber->witness, [](LaneData lanes) {
    Clock told;
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Witness*>(lane)->tell(told);
    }
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Witness*>(lane)->learn(told);
    }
  });
}

void fence() { machine->fiber->witness.fence(); }

Atomic::Atomic(const void* at) { machine->fiber->witness.begin_atomic(at); }
Atomic::~Atomic() { machine->fiber->witness.end_kind(); }

Constant::Constant() { machine->fiber->witness.begin_constant(); }
Constant::~Constant() { machine->fiber->witness.end_kind(); }

// An error takes effect at the next wait: not every function may be left by an exception.
void access_memory(const void* at, int num_bytes, bool writes, const void* code) {
  if (machine == nullptr || is_on_a_stack(at) || !machine->error.empty()) return;
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const std::string race = machine->fiber->witness.access(begin, num_bytes, writes, code);
  if (!race.empty()) machine->error = "kernel: " + race;
}

void copy_async(void* shared, const void* global, int num_bytes, bool valid) {
  Fiber& fiber = *machine->fiber;
  const auto to = reinterpret_cast<uintptr_t>(shared);
  const auto from = reinterpret_cast<uintptr_t>(global);
  if (to % num_bytes != 0 || (valid && from % num_bytes != 0)) fail("copies a misaligned address");
  const auto begin = reinterpret_cast<uintptr_t>(shared_memory());
  if (to < begin || to + num_bytes > begin + static_cast<uintptr_t>(machine->shared_bytes)) {
    fail("copies out of shared memory");
  }
  access_memory(shared, num_bytes, true, __builtin_return_address(0));
  std::memset(shared, 0xff, num_bytes);  // not there before it is waited for
  fiber.open_copies.push_back({shared, valid ? global : nullptr, num_bytes});
}

void copy_async_commit() {
  Fiber& fiber = *machine->fiber;
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void copy_async_wait(int num_groups) {
  auto& groups = machine->fiber->copy_groups;
  while (groups.size() > static_cast<size_t>(num_groups)) {
    complete(groups.front());
    groups.pop_front();
  }
}

void set_registers(int num) {
  Fiber& fiber = *machine->fiber;
  if (num % 8 != 0 || num < 24 || num > 256) fail("asks for a number of registers there is not");
  const int wanted = num - fiber.num_registers;
  while (fiber.block->free_registers < wanted) wait("registers");
  fiber.block->free_registers -= wanted;
  fiber.num_registers = num;
  made_progress();
}

void count_matrix_load(bool collides) {
  ++statistics().matrix_loads;
  statistics().matrix_load_conflicts += collides;
}

Statistics& statistics() {
  static Statistics all;
  return all;
}

}  // namespace pdiff::emulation
