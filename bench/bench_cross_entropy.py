"""pytest bench/bench_cross_entropy.py --benchmark-only -s"""

from conftest import bench_of

from pdiff_runtime.bench import weighted_cross_entropy

bench_cross_entropy = bench_of(weighted_cross_entropy.cases())
