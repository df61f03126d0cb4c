// AVX-512 as in x86-64-v4: 64-byte vectors.
#define BNFAST_VBYTES 64
#include "table.inl.h"
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512DQ__)
#error "avx512 must be compiled with -march=x86-64-v4"
#endif
BNFAST_KERNEL_TABLE(avx512_kernels, "avx512")
