#include "cuda/compiler.h"

#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <iterator>

#include "cuda/sha256.h"

namespace bnfast::cuda {
namespace {

using Program = void*;

// The functions of nvrtc.h that are used, with its C types.
struct Nvrtc {
    int (*nvrtcVersion)(int*, int*);
    int (*nvrtcGetNumSupportedArchs)(int*);
    int (*nvrtcGetSupportedArchs)(int*);
    int (*nvrtcCreateProgram)(Program*, const char*, const char*, int, const char* const*, const char* const*);
    int (*nvrtcDestroyProgram)(Program*);
    int (*nvrtcCompileProgram)(Program, int, const char* const*);
    int (*nvrtcGetProgramLogSize)(Program, std::size_t*);
    int (*nvrtcGetProgramLog)(Program, char*);
    int (*nvrtcGetCUBINSize)(Program, std::size_t*);
    int (*nvrtcGetCUBIN)(Program, char*);
    int (*nvrtcGetPTXSize)(Program, std::size_t*);
    int (*nvrtcGetPTX)(Program, char*);
    const char* (*nvrtcGetErrorString)(int);
};

std::string& chosen_path() {
    static std::string path;
    return path;
}

// NVRTC opens libnvrtc-builtins by name, which the loader finds only if it is loaded already or on its path.
void load_builtins(const std::string& library) {
    const std::size_t slash = library.rfind('/');
    if (slash == std::string::npos) return;
    glob_t found{};
    if (glob((library.substr(0, slash) + "/libnvrtc-builtins.so*").c_str(), 0, nullptr, &found) == 0)
        for (std::size_t i = 0; i < found.gl_pathc; ++i) dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_GLOBAL);
    globfree(&found);
}

void* open_library() {
    std::vector<std::string> names = {"libnvrtc.so.13", "libnvrtc.so.12"};
    if (!chosen_path().empty()) names = {chosen_path()};
    std::string reasons;
    for (const std::string& name : names) {
        load_builtins(name);
        if (void* library = dlopen(name.c_str(), RTLD_NOW)) return library;
        reasons += std::string("\n  ") + dlerror();
    }
    throw CompilerError("NVRTC, which compiles CUDA kernels, was not found. pip install \"bnfast[cuda]\" brings it." +
                        reasons);
}

template <class F> void find(void* library, F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw CompilerError(std::string("this NVRTC is too old: it has no ") + name);
}

Nvrtc load() {
    void* library = open_library();
    Nvrtc n{};
#define BNFAST_FIND(name) find(library, n.name, #name)
    BNFAST_FIND(nvrtcVersion);
    BNFAST_FIND(nvrtcGetNumSupportedArchs);
    BNFAST_FIND(nvrtcGetSupportedArchs);
    BNFAST_FIND(nvrtcCreateProgram);
    BNFAST_FIND(nvrtcDestroyProgram);
    BNFAST_FIND(nvrtcCompileProgram);
    BNFAST_FIND(nvrtcGetProgramLogSize);
    BNFAST_FIND(nvrtcGetProgramLog);
    BNFAST_FIND(nvrtcGetCUBINSize);
    BNFAST_FIND(nvrtcGetCUBIN);
    BNFAST_FIND(nvrtcGetPTXSize);
    BNFAST_FIND(nvrtcGetPTX);
    BNFAST_FIND(nvrtcGetErrorString);
#undef BNFAST_FIND
    return n;
}

const Nvrtc& nvrtc() {
    static const Nvrtc loaded = load();  // tried again in the next call if it throws
    return loaded;
}

void check(int status, const char* what) {
    if (status) throw CompilerError(std::string("NVRTC, ") + what + ": " + nvrtc().nvrtcGetErrorString(status));
}

// A text of the program: its log, its machine code.
std::string text_of(Program program, int (*size)(Program, std::size_t*), int (*get)(Program, char*), const char* what) {
    std::size_t bytes = 0;
    check(size(program, &bytes), what);
    std::string text(bytes, '\0');
    if (bytes) check(get(program, text.data()), what);
    return text;
}

struct ProgramOwner {
    Program program = nullptr;
    ~ProgramOwner() {
        if (program) nvrtc().nvrtcDestroyProgram(&program);
    }
};

// -fmad=false: the bits of every device and of the emulator.
const char* const fixed_options[] = {"--std=c++17", "--fmad=false"};

struct Target {
    std::string option;
    bool exact;  // machine code; else PTX
};

Target target_for(int architecture) {
    const std::vector<int> known = compiler_architectures();
    if (std::find(known.begin(), known.end(), architecture) != known.end())
        return {"--gpu-architecture=sm_" + std::to_string(architecture), true};
    int below = 0;
    for (int k : known)
        if (k < architecture) below = std::max(below, k);
    if (!below)
        throw CompilerError("this NVRTC compiles for sm_" + std::to_string(known.empty() ? 0 : known.front()) +
                            " and newer. Received: sm_" + std::to_string(architecture));
    return {"--gpu-architecture=compute_" + std::to_string(below), false};
}

void create(ProgramOwner& owner, const KernelId& kernel) {
    std::vector<const char*> names, texts;
    for (const KernelSource& s : kernel_sources()) {
        names.push_back(s.name);
        texts.push_back(s.text);
    }
    const std::string source = "#include \"instances.cuh\"\n" + kernel.source() + "\n";
    check(nvrtc().nvrtcCreateProgram(&owner.program, source.c_str(), "bnfast.cu", int(names.size()), texts.data(),
                                     names.data()),
          "creating a program");
}

}  // namespace

void set_compiler_library(const std::string& path) { chosen_path() = path; }

std::pair<int, int> compiler_version() {
    std::pair<int, int> v{0, 0};
    check(nvrtc().nvrtcVersion(&v.first, &v.second), "asking its version");
    return v;
}

std::vector<int> compiler_architectures() {
    int count = 0;
    check(nvrtc().nvrtcGetNumSupportedArchs(&count), "asking its architectures");
    std::vector<int> all(static_cast<std::size_t>(count));
    check(nvrtc().nvrtcGetSupportedArchs(all.data()), "asking its architectures");
    return all;
}

std::string compile(const KernelId& kernel, int architecture) {
    const Target target = target_for(architecture);
    ProgramOwner owner;
    create(owner, kernel);
    std::vector<const char*> options = {target.option.c_str()};
    options.insert(options.end(), std::begin(fixed_options), std::end(fixed_options));
    const int status = nvrtc().nvrtcCompileProgram(owner.program, int(options.size()), options.data());
    if (status)
        throw CompilerError("NVRTC could not compile " + kernel.name() + ":\n" +
                            text_of(owner.program, nvrtc().nvrtcGetProgramLogSize, nvrtc().nvrtcGetProgramLog, "log"));
    return target.exact ? text_of(owner.program, nvrtc().nvrtcGetCUBINSize, nvrtc().nvrtcGetCUBIN, "machine code")
                        : text_of(owner.program, nvrtc().nvrtcGetPTXSize, nvrtc().nvrtcGetPTX, "PTX");
}

std::string compilation_key(const KernelId& kernel, int architecture) {
    const std::pair<int, int> version = compiler_version();
    std::string text = std::to_string(version.first) + "." + std::to_string(version.second) + "\n" +
                       target_for(architecture).option + "\n";
    for (const char* option : fixed_options) text += std::string(option) + "\n";
    for (const KernelSource& s : kernel_sources()) text += std::string(s.name) + "\n" + s.text;
    return sha256(text + kernel.source());
}

}  // namespace bnfast::cuda
