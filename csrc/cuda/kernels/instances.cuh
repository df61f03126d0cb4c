// The kernels by name, one macro per kernel: bnfast_sweep_moments_float32, bnfast_sweep_apply_bfloat16_relu, ... Each
// takes one struct by value. instances.cu makes them all; at run time NVRTC makes the one that a call needs.
#pragma once
#include "channel.cuh"
#include "resident.cuh"

// `blocks` per SM bound the registers: 2 leave 128 per thread, 3 leave 80.
#define BNFAST_KERNEL(name, blocks, Args, ...)                                        \
    extern "C" __global__ void __launch_bounds__(bnfast::cuda::block_threads, blocks) \
        bnfast_##name(const __grid_constant__ bnfast::cuda::Args args) {              \
        using namespace bnfast::cuda;                                                 \
        __VA_ARGS__(args);                                                            \
    }

// Per compute type: T, its name.
#define BNFAST_sweep_finalize_inference(T, type) \
    BNFAST_KERNEL(sweep_finalize_inference_##type, 2, ForwardArgs, sweep_finalize_inference<T>)
#define BNFAST_sweep_finalize_gradient(T, type) \
    BNFAST_KERNEL(sweep_finalize_gradient_##type, 2, GradientArgs, sweep_finalize_gradient<T>)

// Per dtype: X, its name.
#define BNFAST_sweep_moments(X, type) BNFAST_KERNEL(sweep_moments_##type, 2, ForwardArgs, sweep_moments<X>)
#define BNFAST_sweep_finalize_train(X, type) \
    BNFAST_KERNEL(sweep_finalize_train_##type, 2, ForwardArgs, sweep_finalize_train<X>)

// Per dtype and activation: X, its name, the activation.
#define BNFAST_sweep_apply(X, type, act) \
    BNFAST_KERNEL(sweep_apply_##type##_##act, 3, ForwardArgs, sweep_apply<X, Act::act>)
#define BNFAST_sweep_gradient(X, type, act) \
    BNFAST_KERNEL(sweep_gradient_##type##_##act, 2, GradientArgs, sweep_gradient<X, Act::act>)
#define BNFAST_sweep_apply_gradient(X, type, act) \
    BNFAST_KERNEL(sweep_apply_gradient_##type##_##act, 2, GradientArgs, sweep_apply_gradient<X, Act::act>)
#define BNFAST_channel_train(X, type, act) \
    BNFAST_KERNEL(channel_train_##type##_##act, 2, ForwardArgs, channel_train<X, Act::act>)
#define BNFAST_channel_gradient(X, type, act) \
    BNFAST_KERNEL(channel_gradient_##type##_##act, 2, GradientArgs, channel_gradient<X, Act::act>)
#define BNFAST_resident_train(X, type, act) \
    BNFAST_KERNEL(resident_train_##type##_##act, 2, ForwardArgs, resident_train<X, Act::act>)
#define BNFAST_resident_gradient(X, type, act) \
    BNFAST_KERNEL(resident_gradient_##type##_##act, 2, GradientArgs, resident_gradient<X, Act::act>)
