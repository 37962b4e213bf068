#ifndef PDIFF_C_API_H_
#define PDIFF_C_API_H_

/* The C interface of libpdiff. Every function that can fail returns a status; the message of the
 * last failure on this thread is pdiff_last_error(). No C++ exception leaves the library. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pdiff_status {
  PDIFF_OK = 0,
  PDIFF_INVALID_ARGUMENT = 1, /* what pdiff::Error says in C++ */
  PDIFF_OUT_OF_MEMORY = 2,
  PDIFF_INTERNAL_ERROR = 3
} pdiff_status;

/* "0.1.0" */
const char* pdiff_version(void);

/* Message of the last failed call on this thread, "" if there was none. Valid until the next failed
 * call. */
const char* pdiff_last_error(void);

/* Writes "generic", "avx2", "avx512", "avx512_bf16" or "amx": what the CPU kernels use. The string
 * is static. */
pdiff_status pdiff_isa_name(const char** name);

/* Lowers it by name; NULL goes back to the default. */
pdiff_status pdiff_select_isa(const char* name);

/* 1 or 0. */
int pdiff_built_with_cuda(void);

/* 0 without a driver or in a build without CUDA. */
int pdiff_cuda_device_count(void);

#ifdef __cplusplus
}
#endif

#endif /* PDIFF_C_API_H_ */
