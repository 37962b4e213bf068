"""pytest bench/bench_unmask.py --benchmark-only -s"""

from conftest import bench_of

from pdiff_runtime.bench import unmask

bench_unmask = bench_of(unmask.cases())
