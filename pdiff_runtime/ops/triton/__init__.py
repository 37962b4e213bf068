"""The ops in Triton: the portable way onto a GPU. Imported when it is asked for, never before."""

from pdiff_runtime.ops.triton.hybrid_attention import hybrid_attention
from pdiff_runtime.ops.triton.hybrid_attention_backward import hybrid_attention_backward
from pdiff_runtime.ops.triton.rope_kv_write import rope_kv_write
from pdiff_runtime.ops.triton.unmask import unmask
