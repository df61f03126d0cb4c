#include "call.h"

namespace bnfast::tf {
namespace {

void require_fine(Outcome outcome, const Message& message) {
    if (outcome == Outcome::fine) return;
    const int code = outcome == Outcome::bad_argument    ? TF_INVALID_ARGUMENT
                     : outcome == Outcome::out_of_memory ? TF_RESOURCE_EXHAUSTED
                                                         : TF_INTERNAL;
    throw Failure{code, message.text};
}

}  // namespace

DType dtype_of(int type) {
    switch (type) {
        case TF_FLOAT: return DType::float32;
        case TF_DOUBLE: return DType::float64;
        case TF_HALF: return DType::float16;
        case TF_BFLOAT16: return DType::bfloat16;
    }
    throw Failure{TF_INTERNAL, "no kernel for TF_DataType " + std::to_string(type)};
}

std::size_t bytes_of(int type) { return type == TF_DOUBLE ? 8 : type == TF_FLOAT ? 4 : 2; }

Tensor Call::output(int i, int type, const std::int64_t* dims, int rank) const {
    std::size_t bytes = bytes_of(type);
    for (int k = 0; k < rank; ++k) bytes *= std::size_t(dims[k]);
    TF_Tensor* const tensor = TF_AllocateOutput(context_, i, type, dims, rank, bytes, status_);
    status_.check();
    return Tensor(tensor);
}

Tensor Call::output_in(int i, std::initializer_list<int> candidates, const Dims& dims) const {
    int forwarded = -1;
    TF_Tensor* const tensor = TF_ForwardInputOrAllocateOutput(context_, candidates.begin(), int(candidates.size()), i,
                                                              dims.extents, dims.rank, &forwarded, status_);
    status_.check();
    return Tensor(tensor);
}

Shape Call::shape(const Dims& dims, std::int64_t axis) const {
    if (axis < -dims.rank || axis >= dims.rank)  // before it is an int: 2**32 would be 0
        throw Failure{TF_INVALID_ARGUMENT, "axis must lie in [-" + std::to_string(dims.rank) + ", " +
                                               std::to_string(dims.rank) + "). Received: " + std::to_string(axis)};
    Shape shape;
    Message message;
    require_fine(core->shape_of(dims.extents, dims.rank, int(axis), shape, message), message);
    return shape;
}

void Call::run(const TrainArgs& args) const {
    Message message;
    require_fine(core->train(args, message), message);
}

void Call::run(const InferArgs& args) const {
    Message message;
    require_fine(core->infer(args, message), message);
}

void Call::run(const GradArgs& args) const {
    Message message;
    require_fine(core->grad(args, message), message);
}

void require_vector(const Tensor& tensor, const char* name, std::int64_t C, std::int64_t axis) {
    if (tensor.is_vector_of(C)) return;
    throw Failure{TF_INVALID_ARGUMENT, std::string(name) + " must have shape (" + std::to_string(C) +
                                           ",) to match axis " + std::to_string(axis) +
                                           " of x. Received: " + tensor.dims().text()};
}

void require_like(const Tensor& tensor, const char* name, const Dims& x) {
    if (tensor.dims() == x) return;
    throw Failure{TF_INVALID_ARGUMENT,
                  std::string(name) + " must have the shape of x, " + x.text() + ". Received: " + tensor.dims().text()};
}

double require_scalar(const Tensor& tensor, const char* name) {
    const Dims dims = tensor.dims();
    if (dims.rank != 0)
        throw Failure{TF_INVALID_ARGUMENT, std::string(name) + " must be a scalar. Received: shape " + dims.text()};
    return *static_cast<const double*>(tensor.data());
}

}  // namespace bnfast::tf
