#pragma once

#include <cstdint>

#include "common/macros.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pdiff {

/// Whether this process was forked from one that had this library. OpenMP's threads stayed in the
/// parent, and GNU's waits for them for ever where it had some.
bool is_forked();

/// Calls body(task), or body(task, worker) with worker < max(1, num_threads), for every task in
/// [0, num_tasks) on up to `num_threads` threads that take `grain` tasks at a time. The caller
/// passes the count (Python: torch.get_num_threads(), which a fresh thread does not inherit); 1
/// thread, a forked process or a build without OpenMP runs the plain loop. Tasks share nothing, so
/// no result depends on the number of threads. `body` must not throw.
template <typename Body>
PDIFF_INLINE void parallel_for(int64_t num_tasks, int num_threads, int64_t grain,
                               const Body& body) {
  const auto run = [&](int64_t begin, int64_t end, [[maybe_unused]] int worker) {
    for (int64_t task = begin; task < end; ++task) {
      if constexpr (requires { body(task, worker); }) {
        body(task, worker);
      } else {
        body(task);
      }
    }
  };
#if defined(_OPENMP)
  const int64_t num_chunks = (num_tasks + grain - 1) / grain;
  if (num_threads > num_chunks) num_threads = static_cast<int>(num_chunks);
  if (num_threads > 1 && !omp_in_parallel() && !is_forked()) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t begin = chunk * grain;
      const int64_t end = begin + grain < num_tasks ? begin + grain : num_tasks;
      run(begin, end, omp_get_thread_num());
    }
    return;
  }
#else
  (void)num_threads;
  (void)grain;
#endif
  run(0, num_tasks, 0);
}

}  // namespace pdiff
