// The instructions that every processor of the architecture has: SSE2 on x86-64, NEON on aarch64. 16-byte vectors.
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
