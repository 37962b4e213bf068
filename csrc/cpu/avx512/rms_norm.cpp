#include "cpu/vec/avx512.h"
// The body, written against the vector layer, comes after it.
#include "cpu/kernels/rms_norm.h"
