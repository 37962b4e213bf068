"""pytest bench/bench_attention_plan.py --benchmark-only -s"""

from conftest import bench_of

from pdiff_runtime.bench import attention_plan

bench_attention_plan = bench_of(attention_plan.cases())
