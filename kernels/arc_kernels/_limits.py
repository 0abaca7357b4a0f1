"""Size limits of the Triton kernels. Public functions check them before they import triton."""

MAX_NORM_WIDTH = 16384  # a program keeps a whole row in registers
MAX_POOL_WIDTH = 8192  # backward keeps 7 float32 values per column, which fill all registers
