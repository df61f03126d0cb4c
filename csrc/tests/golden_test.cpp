// The bits of results, written down: equal on every processor, instruction set, number of threads and compiler. A
// change of the arithmetic changes them, and is then meant: run the test, read the new hashes from its failures, and
// say so in the change log.
#include <doctest/doctest.h>

#include <cstring>

#include "cases.h"
#include "cpu/dispatch/isa.h"
#include "cpu/plan.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

class Hash {  // FNV-1a, 64 bits
public:
    void add(const void* data, std::size_t bytes) {
        for (std::size_t i = 0; i < bytes; ++i)
            value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
    }
    void add(const Array& a) {
        if (a.size) add(a.data(), std::size_t(a.size * item_bytes(a.dtype)));
    }
    void add(const std::vector<double>& v) { add(v.data(), v.size() * sizeof(double)); }
    std::uint64_t value() const { return value_; }

private:
    std::uint64_t value_ = 0xcbf29ce484222325;
};

struct Golden {
    DType dtype;
    std::uint64_t train, grad;
};
constexpr Golden golden[] = {{DType::float32, 0xea7102bba970583f, 0x9017b70e02a97b33},
                             {DType::float64, 0x14ea5d3c16df4bc2, 0x1f6a4888d9a3b530},
                             {DType::float16, 0x5320355a70ccced5, 0xca343ec3ba6120bf},
                             {DType::bfloat16, 0x6369d36ab070546d, 0xde1265727ad8879f}};

}  // namespace

TEST_CASE("results have the bits that are written here") {
    for (const Golden& wanted : golden) {
        Hash train, grad;
        for (const Shape& shape : kernel_shapes())
            for (const Case& c : cases_of(shape, wanted.dtype)) {
                const Inputs in(c);
                const Forward forward = run_train(c, in);
                const Backward backward = run_grad(c, in, forward);
                train.add(forward.y);
                train.add(forward.moving_mean);
                train.add(forward.moving_variance);
                for (const auto* each : {&forward.mean, &forward.variance, &forward.invstd}) train.add(*each);
                for (const Array* each : {&backward.dx, &backward.dresidual, &backward.dgamma, &backward.dbeta})
                    grad.add(*each);
            }
        const std::string dtype = name_of(wanted.dtype);
        CAPTURE(dtype);
        CAPTURE(isa_name());
        CHECK(train.value() == wanted.train);
        CHECK(grad.value() == wanted.grad);
    }
}
