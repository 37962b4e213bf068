#include "cuda/hybrid_attention_backward/launch.cuh"

namespace pdiff::cuda::attention_backward {

template void launch_kernels<bfloat16, 128>(const Problem&, const CudaQueue&);
template int64_t max_block_bytes<bfloat16, 128>();

}  // namespace pdiff::cuda::attention_backward
