"""What the Triton kernels take at most; public functions check it before they import triton."""

MAX_NORM_WIDTH = 16384  # a row is held in registers
MAX_POOL_WIDTH = 8192  # backward holds seven float32 values a column: of this width they fill a processor's registers
