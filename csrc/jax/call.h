// One call of a handler, as C++: operands by name, attributes by name and type, results by position. Every struct's
// size, type and shape is checked before it is used. An error is a Failure, which never leaves this library: `handle`
// turns it into an error of XLA with the same code and message.
//
// Under jax.vmap (vmap_method="expand_dims") all arrays have the same number of additional leading axes, whose extents
// are 1 where an operand isn't mapped. A call then runs once per item; `at` finds an item's values.
#pragma once
#include <memory>
#include <new>
#include <string>

#include "bnfast/bnfast.h"
#include "ffi_api.h"

namespace bnfast::jax {

struct Failure {
    int code;
    std::string message;
};

[[noreturn]] void fail_argument(const std::string& message);

// A row-major operand or result; without data, it is absent.
class Array {
public:
    Array() = default;
    Array(const Buffer& buffer, std::string name);
    explicit operator bool() const { return buffer_; }
    int type() const { return buffer_->type; }
    int rank() const { return int(buffer_->rank); }
    const std::int64_t* dims() const { return buffer_->dims; }
    const void* data() const { return buffer_->data; }
    const std::string& name() const { return name_; }
    std::string text() const;  // of the shape, as Python writes it

    DType dtype() const;  // of x
    // Splits the axes: the last `rank` are those of an item, the first ones must be those of `mapped` or 1.
    void require_item(int rank, const Array& mapped);
    void require_items_like(const Array& x) const;
    void require_vectors(std::int64_t C) const;  // (C,) of float32 or float64
    void require_values(int type, std::int64_t count) const;

    const std::int64_t* item_dims() const { return dims() + leading_; }
    std::int64_t num_items() const;
    std::int64_t item_size() const;
    void* at(std::int64_t item, const Array& mapped) const;
    // Null vectors for absent arrays.
    ConstVector const_vector(std::int64_t item, const Array& mapped) const;
    Vector vector(std::int64_t item, const Array& mapped) const;

private:
    const Buffer* buffer_ = nullptr;
    std::string name_;
    int leading_ = 0;
};

class Call {
public:
    explicit Call(const Frame& frame);
    Array input(const char* name) const;  // absent if the attribute "inputs" doesn't name it
    Array output(int i, const char* name) const;
    int num_outputs() const { return int(frame_.results.count); }
    std::int64_t integer(const char* name) const;
    double real(const char* name) const;

private:
    const void* attribute(const char* name, int type) const;
    const void* scalar(const char* name, int type) const;
    const Frame& frame_;
    std::string inputs_;  // the operands' names in their order, separated by spaces
};

// What the last query for a handler's metadata brought: XLA sends one when a handler is registered.
struct Query {
    bool asked = false;
    int major_number = 0, minor_number = 0;
    std::string reason;  // "" or why the handlers can't run with this XLA
};
Query last_query();

// The handler that calls `run`.
Error* handle(Frame* frame, void (*run)(const Call&)) noexcept;

}  // namespace bnfast::jax
