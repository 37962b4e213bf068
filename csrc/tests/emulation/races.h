#pragma once

// Races: two accesses of one place, one of them a write, that nothing puts in an order. They are
// errors, also where the order in which the emulation happens to run them is the right one.
//
// Barriers and __syncwarp order accesses, and so do a fence and an atomic after it with an atomic
// elsewhere that comes later and a fence after that. Shuffles, votes and products let lanes meet,
// but order no memory. A load of constants, past the coherent caches, must not meet a write of the
// same grid in any order. Accesses are told of by sources that are compiled with -fsanitize=thread.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace pdiff::emulation {

/// Of the threads of all blocks: how far each had come when it was last heard of.
class Clock {
 public:
  uint32_t& of(uint32_t block, uint32_t thread);
  bool has_reached(uint32_t block, uint32_t thread, uint32_t time) const;
  void learn(const Clock& other);

 private:
  std::map<uint32_t, std::vector<uint32_t>> times_;  // of each block
};

enum class AccessKind : uint8_t { kPlain, kAtomic, kConstant };

/// A thread, as far as others may rely on what it did.
class Witness {
 public:
  Witness(uint32_t block, uint32_t thread) : block_(block), thread_(thread) { ++time(); }

  /// Of a barrier: everyone tells, then everyone learns.
  void tell(Clock& all);
  void learn(const Clock& all) { known_.learn(all); }

  void fence();
  void begin_atomic(const void* at);
  void begin_constant() { kind_ = AccessKind::kConstant; }
  void end_kind() { kind_ = AccessKind::kPlain; }

  /// Notes an access by the instruction at `code`, and tells what it races with: nothing if empty.
  std::string access(uintptr_t begin, int num_bytes, bool writes, const void* code);

 private:
  uint32_t& time() { return known_.of(block_, thread_); }

  uint32_t block_, thread_;
  Clock known_;   // what has happened before, for this thread
  Clock fenced_;  // what had when it last passed a fence: its atomics tell of it
  Clock heard_;   // of by atomics; known after the next fence
  AccessKind kind_ = AccessKind::kPlain;  // of what it does now
};

/// Whatever was accessed in a piece of memory, or anywhere, has not been.
void forget_accesses(const void* begin, int64_t num_bytes);
void forget_accesses();

}  // namespace pdiff::emulation
