// The public functions with any arguments: each either throws std::invalid_argument and has written nothing, or
// computes within its arrays (AddressSanitizer sees their ends), leaves its inputs as they were, and gives the same
// bits on two threads. Of every array the arguments claim there is as much as they claim, or a null pointer.
#include <memory>
#include <stdexcept>
#include <vector>

#include "bnfast/bnfast.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "input.h"

using namespace bnfast;
using fuzz::expect;
using fuzz::Input;
using std::int64_t;

namespace {

constexpr int64_t most_bytes = 1 << 16;

// The arrays of one call.
class Arrays {
public:
    explicit Arrays(Input& in) : in_(in), seed_(in.raw<std::uint32_t>()) {}

    // Some values of the input's choice, or null: for what isn't wanted and for what has no size or too many bytes.
    void* make(int64_t values, int item, bool wanted, bool output) {
        int64_t bytes = 0;
        if (!wanted || values < 0 || __builtin_mul_overflow(values, item, &bytes) || bytes > most_bytes) return nullptr;
        all_.push_back({std::make_unique<unsigned char[]>(std::size_t(bytes)), std::size_t(bytes), output, {}});
        unsigned char* const p = all_.back().data.get();
        const std::uint64_t pattern = in_.flag() ? in_.raw<std::uint64_t>() : 0;
        for (int64_t i = 0; i < bytes; ++i) p[i] = byte(i, item, pattern);
        return p;
    }
    void remember() {
        for (Array& a : all_) a.before.assign(a.data.get(), a.data.get() + a.bytes);
    }
    // Whether the inputs, or with `all` the outputs too, are as they were. In place, x is both.
    bool unchanged(bool all) const {
        for (const Array& a : all_)
            if ((all || !a.output) && a.bytes && std::memcmp(a.before.data(), a.data.get(), a.bytes) != 0) return false;
        return true;
    }
    void becomes_output(const void* p) {
        for (Array& a : all_) a.output = a.output || a.data.get() == p;
    }
    void restore() {
        for (Array& a : all_)
            if (a.bytes) std::memcpy(a.data.get(), a.before.data(), a.bytes);
    }
    std::vector<unsigned char> contents() const {
        std::vector<unsigned char> joined;
        for (const Array& a : all_) joined.insert(joined.end(), a.data.get(), a.data.get() + a.bytes);
        return joined;
    }

private:
    struct Array {
        std::unique_ptr<unsigned char[]> data;
        std::size_t bytes;
        bool output;
        std::vector<unsigned char> before;
    };
    // Usual values, or the input's own bits: NaN, infinity, subnormals.
    unsigned char byte(int64_t i, int item, std::uint64_t pattern) {
        if (pattern && i / item % 3 == 0) return static_cast<unsigned char>(pattern >> (i % 8 * 8));
        seed_ = seed_ * 1664525 + 1013904223;
        if (i % item == item - 1) return static_cast<unsigned char>(0x3e + (seed_ >> 31) * 0x80);  // 0.1 to 2, signed
        return static_cast<unsigned char>(seed_ >> 24);
    }
    Input& in_;
    std::uint32_t seed_;
    std::vector<Array> all_;
};

class Fuzzer {
public:
    explicit Fuzzer(Input& input) : in(input), arrays(input) {
        dtype = DType(in.below(16) ? in.below(4) : in.raw<std::int32_t>());
        const int most = in.below(4) ? 9 : 70;
        shape = {in.extent(most), in.extent(9), in.extent(most)};
        const int odd = in.below(8);
        if (odd == 0) shape.S = in.extent(255);
        if (odd < 4) shape.S = 1;
        item = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
        // No size if the extents overflow: then every array is null.
        values = product(product(shape.N, shape.C), shape.S);
        weights = product(shape.N, shape.S);
    }

    void train() {
        TrainArgs a;
        forward(a);
        a.moving_mean = vector<Vector>(in.flag(), true);
        a.moving_variance = vector<Vector>(a.moving_mean.data != nullptr || in.below(4) == 0, true);
        a.momentum = in.number();
        a.correction = in.below(8) ? in.below(2) : in.raw<std::int32_t>();
        a.nan_policy = NanPolicy(in.below(8) ? in.below(3) : in.raw<std::int32_t>());
        a.mask = mask();
        a.mean = statistics(shape.C);
        a.variance = statistics(shape.C);
        a.invstd = statistics(shape.C);
        run([&] { return bnfast::train(a); });
    }
    void infer() {
        InferArgs a;
        forward(a);
        a.moving_mean = vector<ConstVector>(in.below(8), false);
        a.moving_variance = vector<ConstVector>(in.below(8), false);
        run([&] { return bnfast::infer(a), 0; });
    }
    void moments() {
        MomentsArgs a;
        a.shape = shape;
        a.dtype = dtype;
        a.x = tensor(in.below(8), false);
        a.mask = mask();
        a.mean = statistics(shape.C);
        a.variance = statistics(shape.C);
        run([&] { return bnfast::moments(a); });
    }
    void grad() {
        GradArgs a;
        backward(a);
        a.shape = shape;
        a.mean = vector<ConstVector>(in.below(8), false);
        a.invstd = vector<ConstVector>(in.below(8), false);
        a.mask = mask();
        a.y = tensor(in.below(4) == 0, false);
        a.training = in.flag();
        a.dmean = vector<ConstVector>(in.flag(), false);
        a.dvariance = vector<ConstVector>(in.flag(), false);
        run([&] { return bnfast::grad(a), 0; });
    }
    void group_norm() {
        GroupNormArgs a;
        forward(a);
        a.shape = groups();
        a.mean = statistics(product(a.shape.N, a.shape.G));
        a.invstd = statistics(product(a.shape.N, a.shape.G));
        run([&] { return bnfast::group_norm(a), 0; });
    }
    void group_norm_grad() {
        GroupNormGradArgs a;
        backward(a);
        a.shape = groups();
        a.mean = statistics(product(a.shape.N, a.shape.G), false);
        a.invstd = statistics(product(a.shape.N, a.shape.G), false);
        run([&] { return bnfast::group_norm_grad(a), 0; });
    }
    void view() {
        std::vector<int64_t> dims(std::size_t(in.below(7)));
        for (int64_t& d : dims) d = in.extent(9);
        const int axis = in.below(4) ? in.below(9) - 4 : in.raw<std::int32_t>();
        try {
            const Shape s = shape_of(dims.data(), int(dims.size()), axis);
            expect(axis >= -int(dims.size()) && axis < int(dims.size()), "shape_of takes axes of the array alone");
            expect(s.C == dims[std::size_t(axis < 0 ? axis + int(dims.size()) : axis)], "C is the axis's extent");
        } catch (const std::invalid_argument&) {
        }
    }

private:
    static int64_t product(int64_t a, int64_t b) {
        int64_t n = -1;
        return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &n) ? -1 : n;
    }
    void* tensor(bool wanted, bool output) { return arrays.make(values, item, wanted, output); }
    double* statistics(int64_t n, bool output = true) {
        return static_cast<double*>(arrays.make(n, 8, in.below(16), output));
    }
    const void* mask() { return arrays.make(weights, dtype == DType::float64 ? 8 : 4, in.below(4) == 0, false); }
    template <class V> V vector(bool wanted, bool output) {
        V v;
        v.dtype = in.below(16) ? (in.flag() ? DType::float64 : DType::float32) : DType(in.raw<std::int32_t>());
        v.data = arrays.make(shape.C, v.dtype == DType::float64 ? 8 : 4, wanted, output);
        return v;
    }
    Activation activation() { return Activation(in.below(8) ? in.below(15) : in.raw<std::int32_t>()); }
    GroupShape groups() {
        const bool last = in.flag();
        const int64_t G = in.below(4) ? (in.flag() ? 1 : shape.C) : in.extent(9);
        return {shape.N, last ? shape.S : 1, shape.C, last ? 1 : shape.S, G};
    }
    template <class Args> void forward(Args& a) {
        a.dtype = dtype;
        if constexpr (std::is_same_v<decltype(a.shape), Shape>) a.shape = shape;
        a.x = tensor(in.below(16), false);
        a.y = in.below(4) ? tensor(in.below(16), true) : const_cast<void*>(a.x);
        arrays.becomes_output(a.y);
        a.gamma = vector<ConstVector>(in.flag(), false);
        a.beta = vector<ConstVector>(in.flag(), false);
        a.epsilon = in.number();
        options(a);
    }
    template <class Args> void backward(Args& a) {
        a.dtype = dtype;
        a.dy = tensor(in.below(16), false);
        a.x = tensor(in.below(16), false);
        const int place = in.below(8);
        a.dx = place == 0 ? const_cast<void*>(a.dy) : place == 1 ? const_cast<void*>(a.x) : tensor(in.below(16), true);
        arrays.becomes_output(a.dx);
        a.gamma = vector<ConstVector>(in.flag(), false);
        a.beta = vector<ConstVector>(in.flag(), false);
        a.dresidual = tensor(in.flag(), true);
        a.dgamma = vector<Vector>(in.below(16), true);
        a.dbeta = vector<Vector>(in.below(16), true);
        options(a);
    }
    template <class Args> void options(Args& a) {
        a.activation = activation();
        a.negative_slope = in.below(4) ? 0.2 : in.number();
        a.residual = tensor(in.below(4) == 0, false);
    }
    template <class Call> void run(Call call) {
        set_serial_bytes(0);
        set_num_threads(1);
        arrays.remember();
        try {
            call();
        } catch (const std::invalid_argument&) {
            return expect(arrays.unchanged(true), "a refused call has written nothing");
        } catch (const NonFiniteError&) {
        }
        expect(arrays.unchanged(false), "no input is written");
        const auto alone = arrays.contents();
        arrays.restore();
        set_num_threads(2);
        try {
            call();
        } catch (const NonFiniteError&) {
        }
        expect(arrays.contents() == alone, "one and two threads give the same bits");
    }

    Input& in;
    Arrays arrays;
    DType dtype;
    Shape shape;
    int item;
    int64_t values, weights;
};

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input in(data, size);
    const int function = in.below(7);
    Fuzzer fuzzer(in);
    switch (function) {
        case 0: fuzzer.train(); break;
        case 1: fuzzer.infer(); break;
        case 2: fuzzer.moments(); break;
        case 3: fuzzer.grad(); break;
        case 4: fuzzer.group_norm(); break;
        case 5: fuzzer.group_norm_grad(); break;
        default: fuzzer.view(); break;
    }
    return 0;
}
