// The handlers that bnfast.jax registers with XLA, for its CPU. They are called from any thread, several at once, and
// touch no Python.
//
//   train    x, [gamma], [beta], [moving_mean, moving_variance], [mask], [residual]
//         -> y, saved, statistics (3, C): mean, variance and invstd, [moving_mean, moving_variance: the updated ones]
//   infer    x, moving_mean, moving_variance, [gamma], [beta], [residual] -> y
//   grad     dy, x, {saved | mean, invstd | moving_mean, moving_variance}, [gamma], [beta], [mask], [residual | y],
//            [dmean, dvariance]
//         -> dx, dgamma, dbeta, [dresidual]
//   moments  x, [mask] -> statistics (2, C): mean and variance
//
// The attribute "inputs" names the operands in their order, separated by spaces. "rank" and "axis" are those of x
// without vmap's axes; axis counts from the end. Vectors are (C,) float32 or float64; results that are statistics, too.
// saved (4*C,) holds the bits of mean and invstd as float64, in words of 32 bits: float64 arrays exist in JAX only with
// x64 enabled. mask: N*S weights, float64 for float64 x and float32 otherwise.
#pragma once
#include "ffi_api.h"

namespace bnfast::jax {

Error* train(Frame* frame) noexcept;
Error* infer(Frame* frame) noexcept;
Error* grad(Frame* frame) noexcept;
Error* moments(Frame* frame) noexcept;

}  // namespace bnfast::jax
