"""Use the same machine code on every x86-64 processor with AVX2, so that the last bits are the same.

torch and its libraries choose kernels by what the processor offers, and each kernel adds up in another order. They look
at these variables once, when they are loaded or first used, so the package sets them before it imports anything.
"""

import os

SETTINGS = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "COMPATIBLE",  # MKL also asks who made the processor, so nothing that makes an output calls it
    "OMP_DYNAMIC": "false",  # else fewer threads than `threads` could share the work
    "GOMP_SPINCOUNT": "1000",  # for speed alone: a thread that waits soon leaves its core to other programs
    "THP_MEM_ALLOC_ENABLE": "1",  # for speed alone: large pages for torch's large tensors
}


def pin_kernels() -> None:
    """Set the variables for this process and those that it starts."""
    os.environ |= SETTINGS
