#include "cuda/hybrid_attention_backward/launch.cuh"

namespace pdiff::cuda::attention_backward {

template void launch_kernels<float16, 64>(const Problem&, const CudaQueue&);

}  // namespace pdiff::cuda::attention_backward
