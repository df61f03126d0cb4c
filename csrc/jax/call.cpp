#include "call.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace bnfast::jax {
namespace {

constexpr std::size_t metadata_bytes = offsetof(Metadata, traits) + sizeof(std::uint32_t);
constexpr std::size_t new_error_bytes = offsetof(NewError, code) + sizeof(int);

std::size_t bytes_of(int type) { return type == type_f64 ? 8 : type == type_f32 || type == type_u32 ? 4 : 2; }

template <class Struct> std::string size_fault(const Struct& s, const char* name, std::size_t wanted = sizeof(Struct)) {
    if (s.bytes >= wanted) return "";
    return std::string(name) + " must have " + std::to_string(wanted) +
           " bytes or more. Received: " + std::to_string(s.bytes);
}

// Why the frame's table of functions can't be used, or "".
std::string api_fault(const Frame& frame) {
    if (std::string fault = size_fault(frame, "XLA's call frame", offsetof(Frame, stage)); !fault.empty()) return fault;
    if (!frame.api) return "XLA's call frame has no table of functions";
    if (std::string fault = size_fault(frame.api->version, "XLA's API version"); !fault.empty()) return fault;
    const Version& v = frame.api->version;
    if (v.major_number != known_major)
        return "XLA's API for foreign functions has version " + std::to_string(v.major_number) + "." +
               std::to_string(v.minor_number) + ", and only " + std::to_string(known_major) + ".x is known";
    return size_fault(*frame.api, "XLA's table of functions");
}

std::string frame_fault(const Frame& frame) {
    if (std::string fault = api_fault(frame); !fault.empty()) return fault;
    for (const std::string& fault :
         {size_fault(frame, "XLA's call frame"), size_fault(frame.arguments, "XLA's list of arguments"),
          size_fault(frame.results, "XLA's list of results"), size_fault(frame.attributes, "XLA's list of attributes")})
        if (!fault.empty()) return fault;
    if (frame.stage != stage_execute)
        return "the handler must be called in the stage of execution. Received: stage " + std::to_string(frame.stage);
    return "";
}

std::mutex mutex;
Query query;                          // guarded by mutex
const Api* registered_api = nullptr;  // guarded by mutex; XLA's table lives as long as the process

// Answers a frame that asks for the metadata. Version 0.1 wants its own number back and sends no table of functions to
// read it from; later versions send theirs, and accept it. Of an unknown major version nothing is known but where its
// number stands: XLA then gets no answer, and refuses the registration.
Query answer_to(const Extension& extension, const Frame& frame) {
    Query answer{true, known_major, 1, size_fault(extension, "XLA's query for metadata", sizeof(MetadataExtension))};
    if (!answer.reason.empty()) return answer;
    Metadata& metadata = *reinterpret_cast<const MetadataExtension&>(extension).metadata;
    answer.reason = size_fault(metadata, "XLA's metadata", metadata_bytes);
    if (answer.reason.empty()) answer.reason = size_fault(frame, "XLA's call frame", offsetof(Frame, stage));
    if (answer.reason.empty() && frame.api) {
        answer.reason = api_fault(frame);
        answer.major_number = frame.api->version.major_number;
        answer.minor_number = frame.api->version.minor_number;
    }
    if (!answer.reason.empty()) return answer;
    metadata.version = {sizeof(Version), nullptr, answer.major_number, answer.minor_number};
    metadata.traits = 0;
    return answer;
}

bool answer_metadata(const Frame& frame) {
    for (const Extension* e = frame.extensions; e; e = e->next) {
        if (e->type != extension_metadata) continue;
        const Query answer = answer_to(*e, frame);
        const std::lock_guard<std::mutex> lock(mutex);
        query = answer;
        if (answer.reason.empty()) registered_api = frame.api;
        return true;
    }
    return false;
}

// A frame whose table can't be used is answered through the table that the handlers were registered with.
Error* make_error(const Frame& frame, int code, const char* message) noexcept {
    const Api* api = frame.api;
    if (!api_fault(frame).empty()) {
        const std::lock_guard<std::mutex> lock(mutex);
        api = registered_api;
    }
    if (!api) {  // no way to say it, and null would say that the results are there
        std::fprintf(stderr, "bnfast.jax: %s\n", message);
        std::abort();
    }
    NewError error{new_error_bytes, nullptr, message, code};
    return api->new_error(&error);
}

}  // namespace

void fail_argument(const std::string& message) { throw Failure{code_invalid_argument, message}; }

Query last_query() {
    const std::lock_guard<std::mutex> lock(mutex);
    return query;
}

Error* handle(Frame* frame, void (*run)(const Call&)) noexcept {
    const auto report = [&](int code, const char* text) { return make_error(*frame, code, text); };
    try {
        if (answer_metadata(*frame)) return nullptr;
        if (const std::string fault = frame_fault(*frame); !fault.empty())
            throw Failure{code_failed_precondition, fault};
        run(Call(*frame));
        return nullptr;
    } catch (const Failure& failure) {
        return report(failure.code, failure.message.c_str());
    } catch (const std::invalid_argument& error) {
        return report(code_invalid_argument, error.what());
    } catch (const NonFiniteError& error) {
        return report(code_invalid_argument, error.what());
    } catch (const std::bad_alloc&) {
        return report(code_resource_exhausted, "bnfast is out of memory");
    } catch (const std::exception& error) {
        return report(code_internal, error.what());
    } catch (...) {
        return report(code_internal, "bnfast failed without a message");
    }
}

// ---- arrays
// ----------------------------------------------------------------------------------------------------------

Array::Array(const Buffer& buffer, std::string name) : buffer_(&buffer), name_(std::move(name)) {
    if (std::string fault = size_fault(buffer, "XLA's buffer"); !fault.empty())
        throw Failure{code_failed_precondition, fault};
}

std::string Array::text() const {
    std::string result = "(";
    for (int i = 0; i < rank(); ++i) result += (i ? ", " : "") + std::to_string(dims()[i]);
    return result + (rank() == 1 ? ",)" : ")");
}

DType Array::dtype() const {
    switch (type()) {
        case type_f32: return DType::float32;
        case type_f64: return DType::float64;
        case type_f16: return DType::float16;
        case type_bf16: return DType::bfloat16;
    }
    fail_argument(name_ + " must be float32, float64, float16 or bfloat16. Received: XLA's type " +
                  std::to_string(type()));
}

void Array::require_item(int rank_of_item, const Array& mapped) {
    leading_ = rank() - rank_of_item;
    const bool fits = leading_ >= 0 && (this == &mapped || leading_ == mapped.leading_);
    bool same = fits;
    for (int i = 0; same && i < leading_; ++i) same = dims()[i] == 1 || dims()[i] == mapped.dims()[i];
    if (!same)
        fail_argument(name_ + " must have " + std::to_string(rank_of_item) + " axes after those of vmap. Received: " +
                      text() + ", where " + mapped.name_ + " is " + mapped.text());
}

void Array::require_items_like(const Array& x) const {
    const int n = x.rank() - x.leading_;
    if (rank() - leading_ == n && std::memcmp(item_dims(), x.item_dims(), sizeof(std::int64_t) * n) == 0 &&
        type() == x.type())
        return;
    fail_argument(name_ + " must have the shape and dtype of " + x.name_ + ", " + x.text() + ". Received: " + text());
}

void Array::require_vectors(std::int64_t C) const {
    if (rank() - leading_ != 1 || *item_dims() != C)
        fail_argument(name_ + " must have shape (" + std::to_string(C) + ",). Received: " + text());
    if (type() != type_f32 && type() != type_f64)
        fail_argument(name_ + " must be float32 or float64. Received: XLA's type " + std::to_string(type()));
}

void Array::require_values(int wanted, std::int64_t count) const {
    if (type() != wanted || item_size() != count)
        fail_argument(name_ + " must have " + std::to_string(count) + " values of XLA's type " +
                      std::to_string(wanted) + ". Received: " + text() + " of type " + std::to_string(type()));
}

std::int64_t Array::num_items() const {
    std::int64_t count = 1;
    for (int i = 0; i < leading_; ++i) count *= dims()[i];
    return count;
}

std::int64_t Array::item_size() const {
    std::int64_t size = 1;
    for (int i = leading_; i < rank(); ++i) size *= dims()[i];
    return size;
}

void* Array::at(std::int64_t item, const Array& mapped) const {
    std::int64_t own = 0, step = 1;
    for (int i = leading_ - 1; i >= 0; --i) {
        if (dims()[i] > 1) own += item % mapped.dims()[i] * step;
        step *= dims()[i];
        item /= mapped.dims()[i];
    }
    return static_cast<char*>(buffer_->data) + own * item_size() * std::int64_t(bytes_of(type()));
}

ConstVector Array::const_vector(std::int64_t item, const Array& mapped) const {
    if (!buffer_) return {};
    return {at(item, mapped), dtype()};
}

Vector Array::vector(std::int64_t item, const Array& mapped) const {
    if (!buffer_) return {};
    return {at(item, mapped), dtype()};
}

// ---- the call
// --------------------------------------------------------------------------------------------------------

Call::Call(const Frame& frame) : frame_(frame) {
    const Text& names = *static_cast<const Text*>(attribute("inputs", attribute_string));
    inputs_.assign(names.data, names.length);
    std::int64_t count = inputs_.empty() ? 0 : 1;
    for (const char c : inputs_) count += c == ' ';
    if (count != frame.arguments.count)
        fail_argument("the attribute inputs names " + std::to_string(count) +
                      " operands. Received: " + std::to_string(frame.arguments.count));
}

Array Call::input(const char* name) const {
    std::size_t begin = 0;
    for (int i = 0; i < frame_.arguments.count; ++i) {
        const std::size_t end = std::min(inputs_.find(' ', begin), inputs_.size());
        if (inputs_.compare(begin, end - begin, name) == 0) {
            if (frame_.arguments.types[i] != argument_buffer) fail_argument(std::string(name) + " must be an array");
            return Array(*static_cast<const Buffer*>(frame_.arguments.items[i]), name);
        }
        begin = end + 1;
    }
    return {};
}

Array Call::output(int i, const char* name) const {
    if (i >= frame_.results.count || frame_.results.types[i] != argument_buffer)
        fail_argument(std::string(name) + " must be result " + std::to_string(i) +
                      ". Received: " + std::to_string(frame_.results.count) + " results");
    return Array(*static_cast<const Buffer*>(frame_.results.items[i]), name);
}

const void* Call::attribute(const char* name, int type) const {
    for (std::int64_t i = 0; i < frame_.attributes.count; ++i) {
        const Text& given = *frame_.attributes.names[i];
        if (given.length != std::strlen(name) || std::memcmp(given.data, name, given.length) != 0) continue;
        if (frame_.attributes.types[i] == type) return frame_.attributes.items[i];
        fail_argument(std::string("the attribute ") + name + " has another kind of value");
    }
    fail_argument(std::string("the attribute ") + name + " is missing");
}

const void* Call::scalar(const char* name, int type) const {
    const Scalar& given = *static_cast<const Scalar*>(attribute(name, attribute_scalar));
    if (given.type != type)
        fail_argument(std::string("the attribute ") + name + " must have XLA's type " + std::to_string(type) +
                      ". Received: " + std::to_string(given.type));
    return given.value;
}

std::int64_t Call::integer(const char* name) const {
    std::int64_t value;
    std::memcpy(&value, scalar(name, type_s64), sizeof value);
    return value;
}

double Call::real(const char* name) const {
    double value;
    std::memcpy(&value, scalar(name, type_f64), sizeof value);
    return value;
}

}  // namespace bnfast::jax
