"""The kernels in Triton. Imported only where they run, so that the package loads where Triton is not."""
