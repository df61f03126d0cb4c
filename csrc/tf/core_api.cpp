// The core's side of the TensorFlow op's table (core_api.h). Compiled into _core.
#include "core_api.h"

#include <dlfcn.h>

#include <cstdio>
#include <new>

namespace bnfast::tf {
namespace {

template <class F> Outcome guarded(Message& message, F f) noexcept {
    const auto report = [&](Outcome outcome, const char* text) {
        std::snprintf(message.text, sizeof message.text, "%s", text);
        return outcome;
    };
    try {
        f();
        return Outcome::fine;
    } catch (const std::invalid_argument& error) {
        return report(Outcome::bad_argument, error.what());
    } catch (const std::bad_alloc&) {
        return report(Outcome::out_of_memory, "bnfast is out of memory");
    } catch (const std::exception& error) {
        return report(Outcome::failed, error.what());
    } catch (...) {
        return report(Outcome::failed, "bnfast failed without a message");
    }
}

constexpr CoreApi api{
    BNFAST_VERSION,
    sizeof(TrainArgs),
    sizeof(InferArgs),
    sizeof(GradArgs),
    [](const std::int64_t* dims, int rank, int axis, Shape& shape, Message& message) noexcept {
        return guarded(message, [&] { shape = bnfast::shape_of(dims, rank, axis); });
    },
    [](const TrainArgs& args, Message& message) noexcept { return guarded(message, [&] { bnfast::train(args); }); },
    [](const InferArgs& args, Message& message) noexcept { return guarded(message, [&] { bnfast::infer(args); }); },
    [](const GradArgs& args, Message& message) noexcept { return guarded(message, [&] { bnfast::grad(args); }); },
};

}  // namespace

std::string connect(const char* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return std::string(path) + " is not loaded";
    const auto f = reinterpret_cast<Connect>(dlsym(library, "bnfast_connect"));
    const char* const reason = f ? f(&api) : "it has no bnfast_connect";
    dlclose(library);  // drops the reference taken here; TensorFlow keeps its own
    return reason ? reason : "";
}

}  // namespace bnfast::tf
