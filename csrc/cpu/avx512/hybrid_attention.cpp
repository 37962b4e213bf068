#include "cpu/vec/avx512.h"

#include "cpu/kernels/hybrid_attention.h"
