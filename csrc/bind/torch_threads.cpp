#include "torch_threads.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

namespace bnfast::bind {
namespace {

const OpenmpLibrary* lender = nullptr;

// The kernels take some 40 KiB of a thread's stack, which PyTorch's own operations don't: with OMP_STACKSIZE=24k they
// run and a kernel crashes. A number without a unit counts KiB.
bool has_stack(const char* variable) {
    const char* const text = std::getenv(variable);
    if (!text || !*text) return true;
    char* end = nullptr;
    const double number = std::strtod(text, &end);
    while (*end == ' ') ++end;
    const char* const units = "bBkKmMgG";
    const char* const unit = *end ? std::strchr(units, *end) : units + 2;
    if (!unit) return true;  // no size, so the library takes its default
    static const double bytes[] = {1, 1024, 1048576, 1073741824};
    return number * bytes[(unit - units) / 2] >= 262144;
}

// The OpenMP library that PyTorch was linked with, of which a process may have others.
const OpenmpLibrary* openmp_of_torch() {
    static OpenmpLibrary found{};
    void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    if (!torch || !find_openmp(torch, found) || !has_stack("OMP_STACKSIZE") || !has_stack("GOMP_STACKSIZE"))
        return nullptr;
    // at::get_num_threads(). OpenMP itself would tell its default in a thread that has run no operation of
    // PyTorch's yet: torch.set_num_threads(n) reaches a thread when it first asks PyTorch.
    found.most = reinterpret_cast<decltype(found.most)>(dlsym(torch, "_ZN2at15get_num_threadsEv"));
    return found.most ? &found : nullptr;
}

}  // namespace

bool borrow_torch_threads(bool wanted) {
    lender = wanted ? openmp_of_torch() : nullptr;
    return lender != nullptr;
}
const OpenmpLibrary* lender_of_threads() { return lender; }

}  // namespace bnfast::bind
