// A barrier of all blocks of a cooperative launch. Its counter lies in the call's scratch memory and begins as 0, so
// that calls on two streams have one each and a graph can be replayed.
#pragma once
#include "layout.cuh"

namespace bnfast::cuda {

// round: 1 for the first barrier of the launch, 2 for the second. What a thread of any block wrote before it is visible
// to every thread behind it: __syncthreads orders the block's writes before thread 0 arrives, and its wait before
// theirs.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        arrive(arrived);
        wait_for(arrived, round * gridDim.x);
    }
    __syncthreads();
}

}  // namespace bnfast::cuda
