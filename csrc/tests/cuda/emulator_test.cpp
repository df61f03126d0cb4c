// The emulator itself: what it runs gives the right result, and every planted bug is found.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "tests/cuda/emulator.h"
#include "cuda/kernels/grid_barrier.cuh"
#include "tests/reference.h"

using namespace bnfast;
using namespace bnfast::test;
using emu::Order;

namespace {

constexpr unsigned threads = 64;

// Every thread writes its number, thread t reads that of t + 1.
struct Neighbours {
    std::vector<int> out = std::vector<int>(threads * 3);
    void run(emu::Launch launch, bool barrier = true) {
        launch.threads = threads;
        launch.shared_bytes = threads * sizeof(int);
        emu::launch(launch, [&] {
            DYNAMIC_SHARED(int, shared);
            shared[threadIdx.x] = int(threadIdx.x);
            if (barrier) __syncthreads();
            out[blockIdx.x * threads + threadIdx.x] = shared[(threadIdx.x + 1) % threads];
        });
    }
};

std::string error_of(emu::Launch launch, const std::function<void()>& kernel) {
    try {
        emu::launch(launch, kernel);
    } catch (const emu::Error& e) {
        return e.what();
    }
    return "";
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Adds one per block to a total that block 0 starts; the grid barrier lets the others see it.
int count_blocks(Order order, int skip) {
    int total = -1, seen = 0;
    unsigned arrived = 0;
    emu::Launch launch;
    launch.blocks = 3;
    launch.cooperative = true;
    launch.order = order;
    launch.skip_wait = skip;
    emu::launch(launch, [&] {
        if (blockIdx.x == 1 && threadIdx.x == 0) total = 3;
        cuda::grid_barrier(&arrived, 1);
        if (blockIdx.x == (order == Order::backward ? 2 : 0) && threadIdx.x == 0) seen = total;
    });
    return seen;
}

// Each block of two clusters of three adds up what its cluster's blocks have written.
std::vector<int> sum_over_cluster(Order order, int skip) {
    std::vector<int> values(6), sums(6);
    emu::Launch launch;
    launch.blocks = 6;
    launch.cluster = 3;
    launch.order = order;
    launch.skip_barrier = skip;
    emu::launch(launch, [&] {
        const unsigned first = blockIdx.x / 3 * 3;
        if (threadIdx.x == 0) values[blockIdx.x] = int(blockIdx.x);
        cuda::cluster_barrier();
        if (threadIdx.x == 31)
            for (unsigned i = first; i < first + 3; ++i) sums[blockIdx.x] += values[i];
    });
    return sums;
}

}  // namespace

TEST_CASE("barriers, shuffles and grid barriers work in every order") {
    for (Order order : emu::all_orders) {
        emu::Launch launch;
        launch.blocks = 3;
        launch.order = order;
        Neighbours n;
        n.run(launch);
        for (unsigned i = 0; i < n.out.size(); ++i) REQUIRE(n.out[i] == int((i + 1) % threads));
        std::vector<double> sums(3);
        launch.threads = 96;
        launch.blocks = 1;
        emu::launch(launch, [&] {
            double v = threadIdx.x;
            for (int d = 16; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
            if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
        });
        CHECK(sums == std::vector<double>{496, 1520, 2544});
        CHECK(count_blocks(order, -1) == 3);
        CHECK(sum_over_cluster(order, -1) == std::vector<int>{3, 3, 3, 12, 12, 12});
    }
}

TEST_CASE("grid barriers follow one another") {
    for (Order order : emu::all_orders) {
        constexpr unsigned blocks = 3, rounds = 40;
        std::vector<unsigned> values(blocks);
        std::vector<unsigned> wrong(blocks);
        unsigned arrived = 0;
        emu::Launch launch;
        launch.blocks = blocks;
        launch.threads = threads;
        launch.cooperative = true;
        launch.order = order;
        emu::launch(launch, [&] {
            for (unsigned r = 0; r < rounds; ++r) {
                if (threadIdx.x == 7) values[blockIdx.x] = r;
                cuda::grid_barrier(&arrived, 2 * r + 1);
                if (threadIdx.x == 50) wrong[blockIdx.x] += values[(blockIdx.x + r) % blocks] != r;
                cuda::grid_barrier(&arrived, 2 * r + 2);
            }
        });
        CHECK(wrong == std::vector<unsigned>(blocks));
        CHECK(arrived == 2 * rounds * blocks);
    }
}

#ifndef BNFAST_TSAN  // which reports them: planted_test.cpp
TEST_CASE("a missing barrier changes results") {
    for (Order order : emu::all_orders) {
        Neighbours n;
        n.run({1, threads, 0, order}, false);
        CHECK(std::count_if(n.out.begin(), n.out.end(), [](int v) { return v == -1; }) > 0);  // unwritten: NaN's bits
    }
}

TEST_CASE("a missing grid barrier changes results") {
    CHECK(count_blocks(Order::forward, 0) == -1);
    CHECK(count_blocks(Order::backward, 0) == -1);
}

TEST_CASE("a missing cluster barrier changes results") {
    CHECK(sum_over_cluster(Order::forward, 0) != sum_over_cluster(Order::forward, -1));
}
#endif

TEST_CASE("divergence is found") {
    emu::Launch launch;
    launch.threads = threads;
    CHECK(contains(error_of(launch,
                            [] {
                                if (threadIdx.x != 5) __syncthreads();
                            }),
                   "divergence"));
    CHECK(contains(error_of(launch,
                            [] {
                                if (threadIdx.x < 40) __shfl_down_sync(0xffffffffu, 1, 1);
                                else __syncthreads();
                            }),
                   "divergence"));
    CHECK(contains(error_of(launch, [] { __shfl_down_sync(0xffffu, 1, 1); }), "less than a warp"));
    launch.blocks = 2;
    launch.cooperative = true;
    CHECK(contains(error_of(launch,
                            [] {
                                if (blockIdx.x == 1) cuda::cluster_barrier();
                            }),
                   "outside of a cluster"));
    unsigned arrived = 0;
    CHECK(contains(error_of(launch,
                            [&] {
                                if (blockIdx.x == 1) cuda::grid_barrier(&arrived, 1);
                            }),
                   "waits for blocks that don't come"));
    launch.cooperative = false;
    CHECK(contains(error_of(launch, [&] { cuda::grid_barrier(&arrived, 1); }), "outside of a cooperative launch"));
    launch.cluster = 2;
    CHECK(contains(error_of(launch,
                            [] {
                                if (blockIdx.x == 1) cuda::cluster_barrier();
                            }),
                   "waits for blocks that don't come"));
    launch.blocks = 3;
    CHECK(contains(error_of(launch, [] {}), "whole clusters"));
}

TEST_CASE("misaligned accesses and a full stack are found") {
    emu::Launch launch;
    alignas(16) unsigned char bytes[64] = {};
    CHECK(contains(error_of(launch, [&] { cuda::load16(bytes + 4); }), "misaligned access (block 0, thread 0)"));
    CHECK(contains(error_of(launch, [&] { cuda::store16(bytes + 8, {}); }), "misaligned"));
    CHECK(contains(error_of(launch, [&] { cuda::load1<double>(bytes + 4, 0); }), "misaligned"));
    CHECK(error_of(launch, [&] { cuda::load16(bytes + 16); }).empty());
    launch.threads = 33;
    CHECK(contains(error_of(launch, [] {}), "whole warps"));
}

TEST_CASE("conversions of the half types are those of the oracle") {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const std::uint16_t h = std::uint16_t(bits);
        const double expected = widen(DType::float16, &h);
        const float f = cuda::float_of_half(bits);
        if (std::isnan(expected)) {
            REQUIRE(std::isnan(f));
            continue;
        }
        REQUIRE(double(f) == expected);
        REQUIRE(std::signbit(f) == std::signbit(expected));
        for (float v : {f, std::nextafter(f, HUGE_VALF), std::nextafter(f, -HUGE_VALF), f * 1.00048828125f,
                        f * 1.00390625f, f + 0x1p-25f}) {
            std::uint16_t half, bfloat;
            narrow(DType::float16, v, &half);
            narrow(DType::bfloat16, v, &bfloat);
            REQUIRE(cuda::half_of_float(v) == half);
            REQUIRE(cuda::bfloat_of_float(v) == bfloat);
        }
    }
    CHECK(cuda::half_of_float(NAN) == 0x7fff);
    CHECK(cuda::bfloat_of_float(NAN) == 0x7fff);
}
