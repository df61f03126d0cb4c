#include "tf_api.h"

#include <dlfcn.h>

namespace bnfast::tf {

#define BNFAST_DEFINE(result, name, arguments) result(*name) arguments = nullptr;
BNFAST_TF_API(BNFAST_DEFINE)
#undef BNFAST_DEFINE

std::string find_tensorflow() {
    const char* const file = "libtensorflow_framework.so.2";
    void* const library = dlopen(file, RTLD_NOW | RTLD_NOLOAD);  // never closed: the ops live as long as the process
    if (!library) return std::string(file) + " is not loaded";
    const char* missing = nullptr;
#define BNFAST_FIND(result, name, arguments)                        \
    name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
    if (!name) missing = #name;
    BNFAST_TF_API(BNFAST_FIND)
#undef BNFAST_FIND
    return missing ? std::string(file) + " has no " + missing : "";
}

}  // namespace bnfast::tf
