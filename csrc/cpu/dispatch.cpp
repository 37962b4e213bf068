#include <atomic>
#include <cstdlib>
#include <cstring>

#include "pdiff/error.h"
#include "pdiff/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pdiff {
namespace {

constexpr const char* kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

struct CpuidRegisters {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(unsigned leaf, unsigned subleaf) {
  CpuidRegisters r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

constexpr bool has_bit(unsigned word, int bit) { return (word >> bit) & 1u; }

// Which register files the operating system saves on a context switch.
unsigned long long extended_control_register() {
  unsigned lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

// Linux hands out tile registers on request, once per process and for all its threads, later ones
// too. Without the request the first tile instruction is SIGILL, whatever cpuid says.
bool request_amx_tiles() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  constexpr unsigned long long kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;

  const CpuidRegisters leaf1 = cpuid(1, 0);
  const bool has_xgetbv = has_bit(leaf1.ecx, 27), has_avx = has_bit(leaf1.ecx, 28);
  if (!has_xgetbv || !has_avx) return Isa::kGeneric;
  const unsigned long long saved = extended_control_register();
  const CpuidRegisters leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);

  const bool fma = has_bit(leaf1.ecx, 12), f16c = has_bit(leaf1.ecx, 29),
             avx2 = has_bit(leaf7.ebx, 5);
  if (!(fma && f16c && avx2 && (saved & kYmmState) == kYmmState)) return Isa::kGeneric;

  const bool f = has_bit(leaf7.ebx, 16), dq = has_bit(leaf7.ebx, 17);
  const bool bw = has_bit(leaf7.ebx, 30), vl = has_bit(leaf7.ebx, 31);
  if (!(f && dq && bw && vl && (saved & kZmmState) == kZmmState)) return Isa::kAvx2;

  if (!has_bit(leaf7_1.eax, 5)) return Isa::kAvx512;  // AVX512_BF16

  const bool amx_bf16 = has_bit(leaf7.edx, 22), amx_tile = has_bit(leaf7.edx, 24);
  if (!(amx_bf16 && amx_tile && (saved & kTileState) == kTileState && request_amx_tiles())) {
    return Isa::kAvx512Bf16;
  }
  return Isa::kAmx;
}

#else

Isa detect() { return Isa::kGeneric; }

#endif

// The highest level at or below `wanted` that is built and that this machine runs.
Isa clamp(Isa wanted) {
  int level = static_cast<int>(wanted);
  const int detected = static_cast<int>(detected_isa());
  if (level > detected) level = detected;
  while (level > 0 && !isa_built(static_cast<Isa>(level))) --level;
  return static_cast<Isa>(level);
}

Isa parse(const char* name, const char* source) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Isa>(i);
  }
  detail::throw_error(source, ": expected generic, avx2, avx512, avx512_bf16 or amx, got ", name);
}

Isa default_isa() {
  const char* name = std::getenv("PDIFF_CPU_ISA");
  const bool is_set = name != nullptr && name[0] != '\0';
  return clamp(is_set ? parse(name, "PDIFF_CPU_ISA") : Isa::kAmx);
}

std::atomic<Isa>& selection() {
  static std::atomic<Isa> isa{default_isa()};  // a throwing initialiser runs again at the next call
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const char* name) { return parse(name, "isa"); }

bool isa_built(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return PDIFF_HAVE_AVX2;
    case Isa::kAvx512:
      return PDIFF_HAVE_AVX512;
    case Isa::kAvx512Bf16:
      return PDIFF_HAVE_AVX512_BF16;
    case Isa::kAmx:
      return PDIFF_HAVE_AMX;
  }
  return false;
}

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa selected_isa() { return selection().load(std::memory_order_relaxed); }

void select_isa(const char* name) {
  const bool reset = name == nullptr || name[0] == '\0';
  const Isa isa = reset ? default_isa() : clamp(isa_from_name(name));
  selection().store(isa, std::memory_order_relaxed);
}

}  // namespace pdiff
