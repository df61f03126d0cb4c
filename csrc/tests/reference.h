// The oracle of the C++ tests: the formulas of batch normalization in long double, and arrays of every dtype. Their
// conversions use ldexp and nearbyint, and so share no code with the kernels.
#pragma once
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "bnfast/bnfast.h"

namespace bnfast::test {

using Wide = std::vector<long double>;

constexpr DType all_dtypes[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
const char* name_of(DType dtype);
DType compute_type(DType dtype);  // float64 for float64, else float32

double widen(DType dtype, const void* at);
void narrow(DType dtype, double value, void* at);            // rounds to nearest, ties to even
bool equal_bits(DType dtype, const void* a, const void* b);  // any NaN equals any NaN

template <class T> struct LineAligned {  // an allocator with 64-byte alignment
    using value_type = T;
    LineAligned() = default;
    template <class U> LineAligned(const LineAligned<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const LineAligned&) const { return true; }
    bool operator!=(const LineAligned&) const { return false; }
};

// Values of one dtype. The memory ends with the last value, so that AddressSanitizer detects a read past the end. For
// outputs, `guard` bytes on both sides detect a write out of bounds in every build. `shift` moves the first value that
// many values off its 64-byte line.
class Array {
public:
    DType dtype = DType::float32;
    std::int64_t size = 0;

    Array() = default;
    Array(DType dtype, std::int64_t size, int shift = 0, int guard = 0);
    void* data() { return bytes_.data() + front_; }
    const void* data() const { return bytes_.data() + front_; }
    double get(std::int64_t i) const;
    void set(std::int64_t i, double value);
    Array shifted() const;  // a copy, moved one value off its 64-byte line
    bool guards_intact() const;
    bool same_bits(const Array& other) const;

private:
    std::vector<unsigned char, LineAligned<unsigned char>> bytes_;
    std::size_t front_ = 0, guard_ = 0;
};

// For flat index i: its channel, and the position n*S + s of its weight.
inline std::int64_t channel_of(Shape s, std::int64_t i) { return i / s.S % s.C; }
inline std::int64_t weight_of(Shape s, std::int64_t i) { return i / (s.C * s.S) * s.S + i % s.S; }

struct Moments {
    long double count = 0;
    Wide mean, variance;
};
Moments moments_of(Shape shape, const Array& x, const Array* mask);

// gamma*(x - mean)*invstd + beta + residual; a null gamma is 1, a null beta or residual is 0.
Wide preactivation(Shape shape, const Array& x, const Wide& mean, const Wide& invstd, const Array* gamma,
                   const Array* beta, const Array* residual);
long double activated(long double z, Activation a, long double negative_slope);
long double activation_slope(long double z, Activation a, long double negative_slope);
double smooth_function(double z, Activation a, bool gradient);  // either, in double: faster

}  // namespace bnfast::test
