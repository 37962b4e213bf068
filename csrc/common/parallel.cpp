#include "common/parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pdiff {
namespace {

bool forked = false;  // written between fork and the child's first instruction, with one thread

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool is_forked() { return forked; }

}  // namespace pdiff
