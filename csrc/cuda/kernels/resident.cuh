// The form `resident`: one cooperative launch takes the tensor through all steps, with two grid barriers between them.
// A block keeps its first vectors in shared memory, as far as that goes, and reads the others twice, last ones first,
// because they are still in L2. If all is kept, traffic is 2 units for train and 3 for the gradient, in either layout.
//
// Items, threads and the order of every sum are those of `sweeps`, so the bits are too. All blocks must be on the
// device at once: the plan takes no more than it can hold, and the launcher asks the driver.
#pragma once
#include "grid_barrier.cuh"
#include "sweeps.cuh"

namespace bnfast::cuda {

// What lies in front of the kept vectors in shared memory.
template <class X> union ResidentShared {
    MomentsShared<X> moments;
    GradientStepShared<X> gradient;
    FinalizeShared finalize;
};
template <class X> __device__ __forceinline__ constexpr Index resident_kept_at() {
    return (sizeof(ResidentShared<X>) + 15) / 16 * 16;
}

// The items of a block: blockIdx.x, blockIdx.x + gridDim.x, ...; `place` numbers them. Each has the room of a full one,
// the last one that fits what is left.
struct ResidentWalk {
    const Grid& grid;
    Index item;
    int place, slots, kept_slots;

    __device__ __forceinline__ explicit ResidentWalk(const Grid& g, const LaunchArgs& launch)
        : grid(g), item(blockIdx.x), place(0), slots(item_slots(g)), kept_slots(launch.kept_slots) {}
    __device__ __forceinline__ bool more() const { return item >= 0 && item < items_of(grid); }
    __device__ __forceinline__ void forth() {
        item += gridDim.x;
        ++place;
    }
    __device__ __forceinline__ void back() {
        item -= gridDim.x;
        --place;
    }
    __device__ __forceinline__ Kept kept(Raw* room) const {
        const Index begin = Index(place) * slots, left = kept_slots - begin;
        if (left <= 0) return {};
        return {room + begin * block_threads, unsigned(least(left, Index(slots)) * block_threads)};
    }
};

template <class X, Act act> __device__ void resident_train(const ForwardArgs& a) {
    DYNAMIC_SHARED(unsigned char, bytes);
    ResidentShared<X>& shared = *reinterpret_cast<ResidentShared<X>*>(bytes);
    Raw* const room = reinterpret_cast<Raw*>(bytes + resident_kept_at<X>());
    ResidentWalk walk(a.grid, a.launch);
    for (; walk.more(); walk.forth()) reduce_item<X>(a, walk.item, shared.moments, walk.kept(room));
    grid_barrier(a.launch.arrived, 1);
    finalize_channels<X>(a, shared.finalize);
    grid_barrier(a.launch.arrived, 2);
    for (walk.back(); walk.more(); walk.back()) apply_item<X, act>(a, walk.item, walk.kept(room));
}

template <class X, Act act> __device__ void resident_gradient(const GradientArgs& a) {
    DYNAMIC_SHARED(unsigned char, bytes);
    ResidentShared<X>& shared = *reinterpret_cast<ResidentShared<X>*>(bytes);
    Raw* const room = reinterpret_cast<Raw*>(bytes + resident_kept_at<X>());
    Raw* const room_dy = room + Index(a.launch.kept_slots) * block_threads;
    ResidentWalk walk(a.grid, a.launch);
    for (; walk.more(); walk.forth())
        reduce_item<X, act>(a, walk.item, shared.gradient, KeptPair{walk.kept(room_dy), walk.kept(room)});
    grid_barrier(a.launch.arrived, 1);
    finalize_channels<typename X::T>(a, shared.finalize);
    grid_barrier(a.launch.arrived, 2);
    for (walk.back(); walk.more(); walk.back())
        apply_item<X, act>(a, walk.item, KeptPair{walk.kept(room_dy), walk.kept(room)});
}

}  // namespace bnfast::cuda
