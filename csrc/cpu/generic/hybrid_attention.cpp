#include "cpu/vec/generic.h"

#include "cpu/kernels/hybrid_attention.h"
