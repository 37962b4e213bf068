#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace pdiff::emulation {
namespace {

constexpr uintptr_t kWordBytes = 4;

struct Access {
  uint32_t block, thread, time;
  uint8_t bytes = 0;  // of the word, as bits; 0: there was none
  AccessKind kind;
  const void* code;
};

/// The last write of a word, and the last reads of two threads.
struct Word {
  Access write, reads[2];
};

thread_local std::unordered_map<uintptr_t, Word> words;
thread_local std::unordered_map<const void*, Clock> told_by_atomics;

/// For addr2line: a file, and where in it.
std::ostream& operator<<(std::ostream& text, const Access& access) {
  Dl_info file{};
  if (dladdr(access.code, &file) == 0) file = {"unknown", nullptr, nullptr, nullptr};
  const std::string path = file.dli_fname;
  const auto offset =
      reinterpret_cast<uintptr_t>(access.code) - reinterpret_cast<uintptr_t>(file.dli_fbase);
  return text << "block " << access.block << ", thread " << access.thread << " ("
              << path.substr(path.rfind('/') + 1) << "+0x" << std::hex << offset << std::dec << ")";
}

}  // namespace

uint32_t& Clock::of(uint32_t block, uint32_t thread) {
  std::vector<uint32_t>& times = times_[block];
  if (times.size() <= thread) times.resize(thread + 1);
  return times[thread];
}

bool Clock::has_reached(uint32_t block, uint32_t thread, uint32_t time) const {
  const auto found = times_.find(block);
  return found != times_.end() && thread < found->second.size() && found->second[thread] >= time;
}

void Clock::learn(const Clock& other) {
  for (const auto& [block, times] : other.times_) {
    std::vector<uint32_t>& mine = times_[block];
    mine.resize(std::max(mine.size(), times.size()));
    for (size_t i = 0; i < times.size(); ++i) mine[i] = std::max(mine[i], times[i]);
  }
}

void Witness::tell(Clock& all) {
  all.learn(known_);
  ++time();
}

void Witness::fence() {
  known_.learn(heard_);
  fenced_ = known_;
  ++time();
}

void Witness::begin_atomic(const void* at) {
  kind_ = AccessKind::kAtomic;
  Clock& told = told_by_atomics[at];
  heard_.learn(told);
  told.learn(fenced_);
}

std::string Witness::access(uintptr_t begin, int num_bytes, bool writes, const void* code) {
  const uintptr_t end = begin + static_cast<uintptr_t>(num_bytes);
  std::string race;
  for (uintptr_t at = begin / kWordBytes * kWordBytes; at < end; at += kWordBytes) {
    Access mine{block_, thread_, time(), 0, kind_, code};
    for (uintptr_t i = 0; i < kWordBytes; ++i) {
      if (at + i >= begin && at + i < end) mine.bytes |= static_cast<uint8_t>(1 << i);
    }
    Word& word = words[at];
    const auto check = [&](const Access& other) {
      if ((other.bytes & mine.bytes) == 0) return;
      const auto either_is = [&](AccessKind kind) { return other.kind == kind || kind_ == kind; };
      const bool is_own = other.block == block_ && other.thread == thread_;
      const bool both_atomic = other.kind == AccessKind::kAtomic && kind_ == AccessKind::kAtomic;
      const bool is_ordered =
          is_own || both_atomic || known_.has_reached(other.block, other.thread, other.time);
      const bool is_stale = either_is(AccessKind::kConstant);
      if (is_ordered && !is_stale) return;
      std::ostringstream text;
      text << (is_stale ? "a constant that is written: " : "a race of ") << mine << " with "
           << other;
      race = text.str();
    };
    check(word.write);
    if (writes) {
      for (const Access& read : word.reads) check(read);
      word.write = mine;
    } else {
      Access& own = word.reads[word.reads[0].bytes != 0 && word.reads[0].thread != thread_];
      own = mine;
    }
  }
  return race;
}

void forget_accesses(const void* begin, int64_t num_bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t i = 0; i < static_cast<uintptr_t>(num_bytes); i += kWordBytes) {
    words.erase(at + i);
  }
}

void forget_accesses() {
  words.clear();
  told_by_atomics.clear();
}

}  // namespace pdiff::emulation

// What the compiler calls.
extern "C" {

#define PDIFF_TSAN(name, ...)                                                      \
  void __tsan_##name(void* at) {                                                   \
    pdiff::emulation::access_memory(at, __VA_ARGS__, __builtin_return_address(0)); \
  }
#define PDIFF_TSAN_BYTES(bytes)                   \
  PDIFF_TSAN(read##bytes, bytes, false)           \
  PDIFF_TSAN(write##bytes, bytes, true)           \
  PDIFF_TSAN(unaligned_read##bytes, bytes, false) \
  PDIFF_TSAN(unaligned_write##bytes, bytes, true)
PDIFF_TSAN_BYTES(1)
PDIFF_TSAN_BYTES(2)
PDIFF_TSAN_BYTES(4)
PDIFF_TSAN_BYTES(8)
PDIFF_TSAN_BYTES(16)
#undef PDIFF_TSAN_BYTES
#undef PDIFF_TSAN

void __tsan_read_range(void* at, unsigned long num_bytes) {
  pdiff::emulation::access_memory(at, static_cast<int>(num_bytes), false,
                                  __builtin_return_address(0));
}
void __tsan_write_range(void* at, unsigned long num_bytes) {
  pdiff::emulation::access_memory(at, static_cast<int>(num_bytes), true,
                                  __builtin_return_address(0));
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
