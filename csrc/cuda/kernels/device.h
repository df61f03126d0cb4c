// The few words that CUDA does not have, or has under names of its own. nvcc and NVRTC take them from here; the tests'
// emulator (csrc/tests/cuda/emulator.h, included before any kernel) brings its own, so that g++ compiles the same text.
#pragma once
#include "arguments.h"

#ifdef __CUDACC__
// The block's dynamic shared memory.
#define DYNAMIC_SHARED(type, name)                                 \
    extern __shared__ __align__(16) unsigned char bnfast_shared[]; \
    type* name = reinterpret_cast<type*>(bnfast_shared)
#define UNROLL _Pragma("unroll")

namespace bnfast::cuda {

struct __align__(16) Raw {  // one vector: 16 bytes as they lie in memory
    unsigned w[4];
};

__device__ __forceinline__ Raw load16(const void* at) { return *static_cast<const Raw*>(at); }
__device__ __forceinline__ void store16(void* at, const Raw& raw) { *static_cast<Raw*>(at) = raw; }
template <class U> __device__ __forceinline__ U load1(const void* base, Index i) {
    return static_cast<const U*>(base)[i];
}
template <class U> __device__ __forceinline__ void store1(void* base, Index i, U value) {
    static_cast<U*>(base)[i] = value;
}

// Explicit, because -fmad=false turns off the compiler's own.
__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ double square_root(double v) { return __dsqrt_rn(v); }

__device__ __forceinline__ double double_of(unsigned low, unsigned high) {
    return __hiloint2double(int(high), int(low));
}
__device__ __forceinline__ unsigned low_word(double v) { return unsigned(__double2loint(v)); }
__device__ __forceinline__ unsigned high_word(double v) { return unsigned(__double2hiint(v)); }

// Half types by their conversion instructions: cuda_fp16.h is not there under NVRTC. NaN becomes 0x7fff in both.
__device__ __forceinline__ float float_of_half(unsigned bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<unsigned short>(bits)));
    return f;
}
__device__ __forceinline__ unsigned half_of_float(float f) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}
__device__ __forceinline__ unsigned bfloat_of_float(float f) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

// A counter of the grid. arrive adds 1 once all is visible that this thread has written or has seen written; wait_for
// returns when the counter is at least `value`, and then sees what those wrote who arrived.
__device__ __forceinline__ void arrive(unsigned* counter) {
    asm volatile("red.release.gpu.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned value) {
    unsigned seen;
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    while (seen < value);
}

// All threads of all blocks of a cluster. Without clusters (below sm_90) nobody calls it.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

}  // namespace bnfast::cuda
#endif
