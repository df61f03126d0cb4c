// x86-64 as the ABI guarantees it (SSE2); on aarch64 the same 16-byte vectors are NEON.
#define BNFAST_VBYTES 16
#include "table.inl.h"
#if defined(__AVX__)
#error "baseline must be compiled without -march flags"
#endif
#if defined(__aarch64__)
BNFAST_KERNEL_TABLE(baseline_kernels, "neon")
#else
BNFAST_KERNEL_TABLE(baseline_kernels, "baseline")
#endif
