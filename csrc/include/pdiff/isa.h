#pragma once

/// Which instruction set the CPU kernels use. Asked once per process, then a plain read.
/// Order   a level includes those below it: `selected_isa() >= Isa::kAvx512` is a valid question.
/// Built   the compiler knew its flags; PDIFF_HAVE_<LEVEL> says so to csrc/cpu/*.cpp.
/// Choice  the highest level both built and detected; PDIFF_CPU_ISA and select_isa lower it.
namespace pdiff {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
inline constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);        // "generic", "avx2", "avx512", "avx512_bf16", "amx"
Isa isa_from_name(const char* name);  // throws pdiff::Error on a name that is none of these

bool isa_built(Isa isa);
Isa detected_isa();  // what this processor and its operating system allow, built or not
Isa selected_isa();  // throws pdiff::Error when PDIFF_CPU_ISA holds an unknown name

/// Lower the choice by name; one that is not built or not detected gives the next lower one that
/// is. nullptr or "" goes back to the default. Not for use while a kernel runs.
void select_isa(const char* name);

}  // namespace pdiff
