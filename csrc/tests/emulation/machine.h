#pragma once

// A CUDA machine on the CPU, to run kernels where there is no GPU: for tests, not for speed.
//
// Every thread of a block is a fiber. A fiber runs until it must wait: for the other lanes of its
// warp, for a barrier, for a copy. Blocks are resident a few at a time, and which warp runs next is
// drawn at random, and so is the order of its lanes, so that a missing barrier shows; where sources
// tell of their accesses, every race is an error (races.h). What a kernel may not count on is made
// bad: shared memory starts as NaN, an asynchronous copy leaves NaN until it is waited for, engines
// see no stores before a fence, and a wait that nothing can end is an error.

#include <any>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <typeinfo>
#include <vector>

namespace pdiff::emulation {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

/// What launches ask about; a test may change it.
struct Device {
  int num_sms = 3;
  int max_shared_bytes = 227 * 1024;  // of a block; sm_90's
};
Device& device();

/// Runs one grid. Throws pdiff::Error on a deadlock, on diverged lanes, on a misaligned address.
void run(Dim grid, Dim block, int64_t shared_bytes, const std::function<void()>& body);

/// Of the thread that runs.
Dim thread_idx();
Dim block_idx();
Dim block_dim();
Dim grid_dim();
int lane();
unsigned char* shared_memory();
int64_t shared_memory_bytes();

/// Shared memory as engines beside the threads see it: what a thread stores is not there before a
/// thread of the block has called publish_shared_memory.
unsigned char* shared_memory_of_engines();
void publish_shared_memory();

/// One object of each type for the thread that runs, made when it is first asked for.
std::any& thread_state(const std::type_info& type);
template <typename T>
T& thread_local_state() {
  std::any& state = thread_state(typeid(T));
  if (!state.has_value()) state = T{};
  return *std::any_cast<T>(&state);
}

/// Ends the run with an error that names the thread.
[[noreturn]] void fail(const char* message);

/// Lets other threads run, then returns; `what` is waited for, to be told on a deadlock. A wait is
/// a loop: while (!condition) wait("...").
void wait(const char* what);
void made_progress();  // something that others may wait for has changed

/// Hands `mine` to the other lanes of `mask`, waits until all of them have come, and lets the last
/// run `operation` on everyone's (null for lanes that are not in the mask).
using LaneData = void* const (&)[32];
void together(uint32_t mask, const char* what, void* mine,
              const std::function<void(LaneData)>& operation);

/// The same for the 128 threads of a warpgroup, in the order of threads.
using GroupData = void* const (&)[128];
void together_in_warpgroup(const char* what, void* mine,
                           const std::function<void(GroupData)>& operation);

/// Runs later, at a time drawn at random, but before the block ends: what an engine beside the
/// threads does.
void defer(std::function<void()> operation);

/// Barrier `idx` of the block; `num_threads` of them must come.
void barrier(int idx, int num_threads);

/// What orders accesses of memory beside barriers: __syncwarp, and fences with atomics.
void sync_lanes(uint32_t mask);
void fence();
struct Atomic {  // while it lives, accesses are those of an atomic
  explicit Atomic(const void* at);
  ~Atomic();
};
struct Constant {  // the same of loads of what nobody writes
  Constant();
  ~Constant();
};

/// An access that the instruction at `code` makes; nothing outside a kernel.
void access_memory(const void* at, int num_bytes, bool writes, const void* code);

void copy_async(void* shared, const void* global, int num_bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int num_groups);

/// Changes how many registers the thread holds. A block begins with an even share of 64 K for each
/// thread; more must have been given back by others, or the wait for it never ends.
void set_registers(int num);

/// Shared memory accesses that collide in a bank; summed over all runs until it is reset.
struct Statistics {
  int64_t matrix_loads = 0, matrix_load_conflicts = 0;
};
Statistics& statistics();
void count_matrix_load(bool collides);

}  // namespace pdiff::emulation
