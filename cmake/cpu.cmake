# Which instruction sets the compiler can build. Sets PDIFF_HAVE_<ISA> to 0 or 1 and PDIFF_FLAGS_<ISA>.

include(CheckCXXCompilerFlag)

set(PDIFF_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(PDIFF_FLAGS_AVX512 ${PDIFF_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(PDIFF_FLAGS_AVX512_BF16 ${PDIFF_FLAGS_AVX512} -mavx512bf16)
set(PDIFF_FLAGS_AMX ${PDIFF_FLAGS_AVX512_BF16} -mamx-tile -mamx-bf16)

set(built_isas generic)
foreach(isa IN ITEMS AVX2 AVX512 AVX512_BF16 AMX)
  set(PDIFF_HAVE_${isa} 0)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
    list(JOIN PDIFF_FLAGS_${isa} " " flags)
    check_cxx_compiler_flag("${flags}" PDIFF_COMPILER_KNOWS_${isa})
    if(PDIFF_COMPILER_KNOWS_${isa})
      set(PDIFF_HAVE_${isa} 1)
      string(TOLOWER ${isa} name)
      list(APPEND built_isas ${name})
    endif()
  endif()
endforeach()
message(STATUS "CPU instruction sets: ${built_isas}")
