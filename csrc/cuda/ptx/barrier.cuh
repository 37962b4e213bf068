#pragma once

// Barriers in shared memory that copies complete, and barriers of some of a block's warps (sm_90).

#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

/// A barrier of threads and of copied bytes. Its phases alternate: a wait for phase p ends when
/// the p-th phase since the start has ended; only p % 2 counts.
class CopyBarrier {
 public:
  /// One thread, before a block barrier; `fence_barriers` comes between.
  __device__ void init(int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(num_arrivals)
                 : "memory");
  }

  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  /// Arrives, and lets the phase wait for that many bytes, too.
  __device__ void arrive_and_expect(int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(num_bytes)
                 : "memory");
  }

  __device__ void wait(int phase) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=; }\n" ::"r"(address()),
        "r"(phase & 1)
        : "memory");
  }

  __device__ uint32_t address() const { return shared_address(this); }

 private:
  uint64_t state_;
};

/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Lets the tensor cores and the copy engine see what this thread has stored to shared memory.
__device__ __forceinline__ void fence_async_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Waits for `num_threads` threads at barrier `idx`, 1 to 15; 0 is the block's own.
__device__ __forceinline__ void barrier_wait(int idx, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}

/// What a warpgroup's threads may use of the block's registers, from its first instruction on.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace pdiff::cuda
