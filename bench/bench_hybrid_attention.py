"""pytest bench/bench_hybrid_attention.py --benchmark-only -s"""

from conftest import bench_of

from pdiff_runtime.bench import hybrid_attention

bench_forward = bench_of(hybrid_attention.forward_cases())
bench_backward = bench_of(hybrid_attention.backward_cases())
