// AVX2 with FMA and F16C: 32-byte vectors.
#define BNFAST_VBYTES 32
#include "table.inl.h"
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__) || defined(__AVX512F__)
#error "avx2 must be compiled with -mavx2 -mfma -mf16c"
#endif
BNFAST_KERNEL_TABLE(avx2_kernels, "avx2")
