// bnfast_exhaustive: every activation function and its gradient over all 2^32 float32 values, on every usable
// instruction set: the largest error, and a hash of the result's bits, which must be the same on all of them. The
// float64 columns are a sample. Prints a Markdown table (docs/activations.md). Some minutes per core.
//
//   bnfast_exhaustive [name ...]     these functions alone: silu, silu', ...
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include "cpu/dispatch/isa.h"
#include "function_errors.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

constexpr std::uint64_t block = 1 << 20, blocks = (1ull << 32) / block;

// The function in double. Where it is nearly a polynomial or constant, which is 11/12 of all float32 values, it costs
// an interpolation instead of libm's functions.
class Reference {
public:
    explicit Reference(const Function& f) : f_(f), divides_(at(0) == 0) {
        for (int negative : {0, 1}) {
            for (int i = 0; i < 4; ++i) {
                const double z = (negative ? -near : near) * (i + 1) / 4;
                nodes_[negative][i] = divides_ ? at(z) / z : at(z);
            }
            far_value_[negative] = at(negative ? -far : far);
            grows_[negative] = far_value_[negative] != 0 &&
                               std::fabs(at(negative ? -2 * far : 2 * far)) > 1.5 * std::fabs(far_value_[negative]);
        }
    }
    double operator()(double z) const {
        const double magnitude = std::fabs(z);
        const bool negative = z < 0;
        if (magnitude >= far) return grows_[negative] ? far_value_[negative] / far * magnitude : far_value_[negative];
        if (magnitude >= near) return at(z);
        const double t = 4 * magnitude / near, *v = nodes_[negative];  // nodes at 1, 2, 3, 4
        const double value = -v[0] * (t - 2) * (t - 3) * (t - 4) / 6 + v[1] * (t - 1) * (t - 3) * (t - 4) / 2 -
                             v[2] * (t - 1) * (t - 2) * (t - 4) / 2 + v[3] * (t - 1) * (t - 2) * (t - 3) / 6;
        return divides_ ? value * z : value;
    }

private:
    static constexpr double near = 0x1p-12, far = 128;
    double at(double z) const { return smooth_function(z, f_.activation, f_.gradient); }
    const Function f_;
    const bool divides_;
    double nodes_[2][4], far_value_[2];
    bool grows_[2];
};

struct Result {
    double ulp = 0;
    float at = 0;
    std::uint64_t hash = 0;
    bool nan_passes = true, same_bits = true;
};

std::uint64_t hash_of(const Array& y, std::uint64_t number) {
    std::uint64_t hash = 0x9e3779b97f4a7c15 * (number + 1);
    for (std::int64_t i = 0; i < y.size; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, static_cast<const char*>(y.data()) + 4 * i, 4);
        if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000;  // a NaN's payload is not part of the bits
        hash = (hash ^ bits) * 0x100000001b3;
    }
    return hash;
}

double unit_of(double value) {
    const int exponent = value == 0 ? -126 : std::max(std::ilogb(value), -126);
    return std::ldexp(1.0, exponent - 23);
}

void run_block(const Function& f, const Reference& reference, std::uint64_t number, Result& result) {
    Array x(DType::float32, block);
    for (std::uint64_t i = 0; i < block; ++i) {
        const auto bits = std::uint32_t(number * block + i);
        std::memcpy(static_cast<char*>(x.data()) + 4 * i, &bits, 4);
    }
    Array y = result_of(f, x);
    result.hash += hash_of(y, number);  // a sum, so that blocks may come in any order
    for (std::uint64_t i = 0; i < block; ++i) {
        float z, got;
        std::memcpy(&z, static_cast<const char*>(x.data()) + 4 * i, 4);
        std::memcpy(&got, static_cast<const char*>(y.data()) + 4 * i, 4);
        if (std::isnan(z)) {
            result.nan_passes = result.nan_passes && std::isnan(got);
            continue;
        }
        if (std::isinf(z)) continue;
        const double expected = reference(z);
        double got_or_limit = got;
        // Infinity counts as the next number after the largest.
        if (std::isinf(got) && float(expected) == got) continue;
        if (std::isinf(got)) got_or_limit = std::copysign(0x1p128, double(got));
        const bool crosses = f.gradient && std::fabs(z) < 3 && std::fabs(expected) < 0.0625;
        const double error = std::fabs(got_or_limit - expected) / unit_of(crosses ? 0.0625 : expected);
        if (error <= result.ulp) continue;
        result.ulp = error;
        result.at = z;
    }
}

template <class Run> void on_all_cores(Run run) {
    std::atomic<std::uint64_t> next{0};
    std::vector<std::thread> threads;
    const unsigned count = std::max(1u, std::thread::hardware_concurrency());
    for (unsigned t = 0; t < count; ++t)
        threads.emplace_back([&] {
            for (std::uint64_t number; (number = next++) < blocks;) run(number);
        });
    for (std::thread& thread : threads) thread.join();
}

Result run_all(const Function& f) {
    Result result;
    std::mutex mutex;
    const Reference reference(f);
    bool first = true;
    for (const std::string& isa : usable_isas()) {
        set_isa(isa);
        std::uint64_t hash = 0;
        on_all_cores([&](std::uint64_t number) {
            Result mine;
            if (first) {
                run_block(f, reference, number, mine);
            } else {
                Array x(DType::float32, block);
                for (std::uint64_t i = 0; i < block; ++i) {
                    const auto bits = std::uint32_t(number * block + i);
                    std::memcpy(static_cast<char*>(x.data()) + 4 * i, &bits, 4);
                }
                mine.hash = hash_of(result_of(f, x), number);
            }
            const std::lock_guard<std::mutex> lock(mutex);
            hash += mine.hash;
            result.nan_passes = result.nan_passes && mine.nan_passes;
            if (mine.ulp <= result.ulp) return;
            result.ulp = mine.ulp;
            result.at = mine.at;
        });
        if (first) result.hash = hash;
        result.same_bits = result.same_bits && hash == result.hash;
        first = false;
    }
    set_isa("");
    return result;
}

}  // namespace

int main(int argc, char** argv) {
    set_num_threads(1);  // the threads here call the core side by side
    bool fine = true;
    std::uint64_t all = 0;
    std::printf("| function | float32: largest error | at | float64 (sample) | bits |\n|---|---|---|---|---|\n");
    for (const Function& f : all_functions()) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) wanted = wanted || f.name == argv[i];
        if (!wanted) continue;
        const Result r = run_all(f);
        const std::vector<double> sample = sample_of_doubles(4000000);
        const Errors wide = errors_of(f, DType::float64, sample, values_of(f, DType::float64, sample));
        std::printf("| `%s` | %.2f ulp | %.9g | %.2f ulp | `%016llx` |\n", f.name.c_str(), r.ulp, double(r.at),
                    wide.ulp, static_cast<unsigned long long>(r.hash));
        std::fflush(stdout);
        if (!r.same_bits) std::printf("%s: the bits differ between instruction sets\n", f.name.c_str());
        if (!r.nan_passes) std::printf("%s: NaN does not pass\n", f.name.c_str());
        fine = fine && r.same_bits && r.nan_passes && r.ulp <= f.bound(DType::float32) &&
               wide.ulp <= f.bound(DType::float64);
        all = (all ^ r.hash) * 0x100000001b3;
    }
    std::printf("\nAll bits: `%016llx`\n", static_cast<unsigned long long>(all));
    return fine ? 0 : 1;
}
