"""The kernels of this build against what a torch user would write instead: `pdiff bench`."""
