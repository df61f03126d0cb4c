// TensorFlow's C API for one kernel call, as C++: tensors release themselves, and errors are exceptions. A Failure
// never leaves this library: `guarded` turns it into a TensorFlow status with the same code and message.
#pragma once
#include <cstring>
#include <initializer_list>
#include <string>

#include "core_api.h"
#include "tf_api.h"

namespace bnfast::tf {

extern const CoreApi* core;  // null until connected

struct Failure {
    int code;
    std::string message;
};

class Status {
public:
    Status() : status_(TF_NewStatus()) {}
    ~Status() { TF_DeleteStatus(status_); }
    Status(const Status&) = delete;
    Status& operator=(const Status&) = delete;
    operator TF_Status*() const { return status_; }
    bool fine() const { return TF_GetCode(status_) == TF_OK; }
    void check() const {
        if (!fine()) throw Failure{TF_GetCode(status_), TF_Message(status_)};
    }

private:
    TF_Status* const status_;
};

struct Dims {
    static constexpr int max_rank = 254;  // TensorFlow's own limit
    int rank = 0;
    std::int64_t extents[max_rank];
    std::int64_t size() const {
        std::int64_t product = 1;
        for (int i = 0; i < rank; ++i) product *= extents[i];
        return product;
    }
    bool operator==(const Dims& other) const {
        return rank == other.rank && std::memcmp(extents, other.extents, sizeof *extents * rank) == 0;
    }
    std::string text() const {  // as Python writes it: (2, 3), (2,), ()
        std::string result = "(";
        for (int i = 0; i < rank; ++i) result += (i ? ", " : "") + std::to_string(extents[i]);
        return result + (rank == 1 ? ",)" : ")");
    }
};

class Tensor {
public:
    explicit Tensor(TF_Tensor* tensor = nullptr) : tensor_(tensor) {}
    Tensor(Tensor&& other) noexcept : tensor_(other.tensor_) { other.tensor_ = nullptr; }
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(tensor_, other.tensor_);
        return *this;
    }
    ~Tensor() {
        if (tensor_) TF_DeleteTensor(tensor_);
    }
    explicit operator bool() const { return tensor_; }
    void* data() const { return tensor_ ? TF_TensorData(tensor_) : nullptr; }
    int type() const { return TF_TensorType(tensor_); }
    Dims dims() const {
        Dims result;
        result.rank = TF_NumDims(tensor_);
        for (int i = 0; i < result.rank; ++i) result.extents[i] = TF_Dim(tensor_, i);
        return result;
    }
    bool is_vector_of(std::int64_t C) const { return TF_NumDims(tensor_) == 1 && TF_Dim(tensor_, 0) == C; }

private:
    TF_Tensor* tensor_;
};

DType dtype_of(int type);        // type: a TF_DataType that the op definitions allow
std::size_t bytes_of(int type);  // of one element

class Call {
public:
    explicit Call(TF_OpKernelContext* context) : context_(context) {
        if (!core)
            throw Failure{
                TF_FAILED_PRECONDITION,
                "the op is not connected to bnfast._core (bnfast.tensorflow connects it when it loads the op)"};
    }
    Tensor input(int i) const {
        TF_Tensor* tensor = nullptr;
        TF_GetInput(context_, i, &tensor, status_);
        status_.check();
        return Tensor(tensor);
    }
    Tensor output(int i, int type, const std::int64_t* dims, int rank) const;
    // The output, in the buffer of a candidate input if nothing else holds that buffer. A Tensor of this call that
    // holds the buffer also prevents the reuse.
    Tensor output_in(int i, std::initializer_list<int> candidates, const Dims& dims) const;
    Shape shape(const Dims& dims, std::int64_t axis) const;
    void run(const TrainArgs& args) const;
    void run(const InferArgs& args) const;
    void run(const GradArgs& args) const;

private:
    TF_OpKernelContext* const context_;
    Status status_;
};

// "gamma must have shape (64,) to match axis -1 of x. Received: (32,)"
void require_vector(const Tensor& tensor, const char* name, std::int64_t C, std::int64_t axis);
void require_like(const Tensor& tensor, const char* name, const Dims& x);
double require_scalar(const Tensor& tensor, const char* name);  // its value, a float64

// Calls f and reports its exceptions through `fail` (TF_OpKernelContext_Failure or TF_OpKernelConstruction_Failure).
template <class Context, class F> void guarded(Context* context, void (*fail)(Context*, TF_Status*), F f) noexcept {
    const auto failed = [&](int code, const char* message) {
        const Status status;
        TF_SetStatus(status, code, message);
        fail(context, status);
    };
    try {
        f();
    } catch (const Failure& failure) {
        failed(failure.code, failure.message.c_str());
    } catch (const std::exception& error) {
        failed(TF_INTERNAL, error.what());
    }
}

}  // namespace bnfast::tf
