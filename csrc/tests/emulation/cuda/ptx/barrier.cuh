#pragma once

#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

class alignas(8) CopyBarrier {
 public:
  void init(int num_arrivals) {
    if (reinterpret_cast<uintptr_t>(this) % 8 != 0) emulation::fail("a barrier is misaligned");
    num_expected_ = num_pending_ = static_cast<int16_t>(num_arrivals);
    num_bytes_ = 0;
    phase_ = 0;
  }

  void arrive() {
    if (num_pending_ == 0) emulation::fail("arrives at a barrier more often than expected");
    --num_pending_;
    end_phase();
  }

  void arrive_and_expect(int num_bytes) {
    change_bytes(num_bytes);
    arrive();
  }

  void wait(int phase) {
    while ((phase_ & 1) == (phase & 1)) emulation::wait("a copy barrier");
  }

  /// Of the copy engine: so many bytes have come.
  void complete(int num_bytes) {
    change_bytes(-num_bytes);
    end_phase();
  }

 private:
  // Bytes may come before they are expected: then the count is negative for a while.
  void change_bytes(int num_bytes) { num_bytes_ = num_bytes_ + num_bytes / 16; }

  void end_phase() {
    if (num_pending_ > 0 || num_bytes_ != 0) return;
    num_pending_ = num_expected_;
    phase_ ^= 1;
    emulation::made_progress();
  }

  int16_t num_expected_, num_pending_;
  int32_t num_bytes_ : 31;  // in sixteens
  uint32_t phase_ : 1;
};
static_assert(sizeof(CopyBarrier) == 8);

inline void fence_barriers() {}
inline void fence_async_copies() { emulation::publish_shared_memory(); }
inline void barrier_wait(int idx, int num_threads) { emulation::barrier(idx, num_threads); }
template <int kRegisters>
void raise_registers() {
  emulation::set_registers(kRegisters);
}
template <int kRegisters>
void lower_registers() {
  emulation::set_registers(kRegisters);
}

}  // namespace pdiff::cuda
