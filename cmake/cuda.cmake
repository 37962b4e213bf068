# Decides whether CUDA is built. Sets PDIFF_CUDA, PDIFF_CUDA_ARCHITECTURES, PDIFF_CUDA_SM90A, PDIFF_NVCC_FLAGS
# and PDIFF_CUDA_SUMMARY.

set(PDIFF_CUDA OFF)
set(PDIFF_CUDA_SM90A OFF)
set(PDIFF_CUDA_SUMMARY "")
set(PDIFF_CUDA_ARCHITECTURES "80-real;90-real;90-virtual" CACHE STRING "Architectures of the portable CUDA kernels")

string(TOUPPER "${WITH_CUDA}" with_cuda)
if(with_cuda MATCHES "^(ON|1|YES|TRUE)$")
  set(with_cuda ON)
elseif(with_cuda MATCHES "^(OFF|0|NO|FALSE)$")
  set(with_cuda OFF)
elseif(NOT with_cuda STREQUAL "AUTO")
  message(FATAL_ERROR "WITH_CUDA: expected AUTO, ON or OFF, got ${WITH_CUDA}")
endif()

set(cuda_reason "WITH_CUDA=OFF")
if(NOT with_cuda STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # a NOTFOUND of an earlier run would stay
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${PDIFF_CUDA_ARCHITECTURES}")  # before check_language, which compiles
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(PDIFF_CUDA ON)
  else()
    set(cuda_reason "no nvcc found; set CUDACXX or CUDA_HOME")
  endif()
endif()

if(PDIFF_CUDA)
  set(PDIFF_NVCC_FLAGS -std=c++20 --expt-relaxed-constexpr -lineinfo)  # CMake 3.25 knows no CUDA20
  if(PDIFF_WERROR)  # a register spill is a warning, too
    list(APPEND PDIFF_NVCC_FLAGS -Werror=all-warnings -Xptxas=--warn-on-spills,--warning-as-error)
  endif()
  set(PDIFF_CUDA_SM90A ON)
  list(JOIN PDIFF_CUDA_ARCHITECTURES " " PDIFF_CUDA_SUMMARY)
  set(PDIFF_CUDA_SUMMARY "${PDIFF_CUDA_SUMMARY} 90a-real")
  message(STATUS "")
  message(STATUS "======== CUDA: YES, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, for ${PDIFF_CUDA_SUMMARY} ========")
  message(STATUS "")
elseif(with_cuda STREQUAL "ON")
  message(FATAL_ERROR "WITH_CUDA=ON, but ${cuda_reason}")
else()
  message(STATUS "")
  message(STATUS "======== CUDA: NO (${cuda_reason}); only the CPU kernels are built ========")
  message(STATUS "")
endif()
