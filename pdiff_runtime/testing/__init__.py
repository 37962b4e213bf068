"""Problems, oracles and tolerances that tests and benches share."""

from pdiff_runtime.testing.backends import BACKENDS, Backend
from pdiff_runtime.testing.isa import ISAS, use_cuda_kernels, use_isa
from pdiff_runtime.testing.tolerances import assert_within_budget
