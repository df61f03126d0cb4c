// Every kernel, for a compiler at build time. A file of one dtype: BNFAST_DTYPE 0 to 3, as in bnfast.h, so that four
// compilers can work at once. The finalize kernels of a compute type go with float32 and float64.
#include "instances.cuh"

#define BNFAST_EACH_ACT(kernel, X, type) kernel(X, type, none) kernel(X, type, relu) kernel(X, type, leaky)
#define BNFAST_EACH_KERNEL(X, type)                                                                                 \
    BNFAST_sweep_moments(X, type) BNFAST_sweep_finalize_train(X, type) BNFAST_EACH_ACT(BNFAST_sweep_apply, X, type) \
        BNFAST_EACH_ACT(BNFAST_sweep_gradient, X, type) BNFAST_EACH_ACT(BNFAST_sweep_apply_gradient, X, type)       \
            BNFAST_EACH_ACT(BNFAST_channel_train, X, type) BNFAST_EACH_ACT(BNFAST_channel_gradient, X, type)        \
                BNFAST_EACH_ACT(BNFAST_resident_train, X, type) BNFAST_EACH_ACT(BNFAST_resident_gradient, X, type)
#define BNFAST_EACH_FINALIZE(T, type) BNFAST_sweep_finalize_inference(T, type) BNFAST_sweep_finalize_gradient(T, type)

#if BNFAST_DTYPE == 0
BNFAST_EACH_KERNEL(F32, float32)
BNFAST_EACH_FINALIZE(float, float32)
#elif BNFAST_DTYPE == 1
BNFAST_EACH_KERNEL(F64, float64)
BNFAST_EACH_FINALIZE(double, float64)
#elif BNFAST_DTYPE == 2
BNFAST_EACH_KERNEL(F16, float16)
#elif BNFAST_DTYPE == 3
BNFAST_EACH_KERNEL(BF16, bfloat16)
#endif
