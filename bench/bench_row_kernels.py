"""pytest bench/bench_row_kernels.py --benchmark-only -s"""

from conftest import bench_of

from pdiff_runtime.bench import row_kernels

bench_rms_norm = bench_of(row_kernels.cases(row_kernels.RMS_NORM))
bench_swiglu = bench_of(row_kernels.cases(row_kernels.SWIGLU))
bench_rope_kv_write = bench_of(row_kernels.cases(row_kernels.ROPE))
