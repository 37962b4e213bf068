#include "cuda/hybrid_attention/kernel.cuh"

namespace pdiff::cuda::attention {
template void launch_forward<bfloat16, 64>(const ForwardParams&, const CudaQueue&);
}
