// NVRTC compiles the kernels' own files: every kernel for sm_90, a sample for others. Skipped by name where NVRTC isn't
// installed; BNFAST_NVRTC is its path, and then it must be found.
#include <doctest/doctest.h>

#include <cstdlib>
#include <set>

#include "cuda/compiler.h"

using namespace bnfast;
using cuda::Act;
using cuda::CompilerError;
using cuda::Family;
using cuda::KernelId;

namespace {

bool has_compiler() {
    const char* path = std::getenv("BNFAST_NVRTC");
    if (path) cuda::set_compiler_library(path);
    try {
        cuda::compiler_version();
    } catch (const CompilerError& e) {
        CHECK_MESSAGE(!path, e.what());
        const std::string reason = e.what();
        MESSAGE("SKIPPED: ", reason);
        return false;
    }
    return true;
}

std::vector<KernelId> all_kernels() {
    std::vector<KernelId> all;
    std::set<std::string> names;
    for (int family = 0; family < cuda::family_count; ++family)
        for (int dtype = 0; dtype < 4; ++dtype)
            for (int act = 0; act < 3; ++act) {
                const KernelId id{Family(family), DType(dtype), Act(act)};
                if (names.insert(id.name()).second) all.push_back(id);
            }
    return all;
}

}  // namespace

TEST_CASE("every kernel has a name and a line of source") {
    CHECK(all_kernels().size() == 96);
    CHECK(KernelId{Family::sweep_apply, DType::bfloat16, Act::relu}.name() == "bnfast_sweep_apply_bfloat16_relu");
    CHECK(KernelId{Family::sweep_apply, DType::bfloat16, Act::relu}.source() ==
          "BNFAST_sweep_apply(BF16, bfloat16, relu)");
    CHECK(KernelId{Family::sweep_finalize_train, DType::float16}.source() ==
          "BNFAST_sweep_finalize_train(F16, float16)");
    const KernelId finalize{Family::sweep_finalize_gradient, DType::float16, Act::relu};
    CHECK(finalize.name() == "bnfast_sweep_finalize_gradient_float32");
    CHECK(finalize.source() == "BNFAST_sweep_finalize_gradient(float, float32)");
    CHECK(finalize.image() == DType::float32);
}

TEST_CASE("the kernel headers include one another alone") {
    std::set<std::string> names;
    for (const cuda::KernelSource& s : cuda::kernel_sources()) {
        const std::string text = s.text;
        for (std::size_t at = text.find("#include"); at != std::string::npos; at = text.find("#include", at + 1)) {
            const std::string line = text.substr(at, text.find('\n', at) - at);
            INFO(s.name << ": " << line);
            CHECK(line.substr(0, 10) == "#include \"");
            CHECK(names.count(line.substr(10, line.size() - 11)) == 1);  // one that came before: no circles
        }
        names.insert(s.name);
    }
}

TEST_CASE("a missing NVRTC is an error that says what brings it") {
    if (std::getenv("BNFAST_NVRTC")) return;  // the library that was found first stays
    cuda::set_compiler_library("/nowhere/libnvrtc.so.13");
    CHECK_THROWS_WITH_AS(cuda::compiler_version(), doctest::Contains("pip install \"bnfast[cuda]\""), CompilerError);
    cuda::set_compiler_library("");
}

TEST_CASE("NVRTC compiles every kernel for sm_90, a sample for others, and PTX for an unknown one") {
    if (!has_compiler()) return;
    for (const KernelId& id : all_kernels()) {
        const std::string cubin = cuda::compile(id, 90);
        CHECK(cubin.substr(1, 3) == "ELF");
        CHECK(cubin.find(id.name()) != std::string::npos);
    }
    for (int architecture : {80, 100, 120})
        for (Family family : {Family::channel_train, Family::resident_gradient})
            CHECK(cuda::compile({family, DType::bfloat16, Act::relu}, architecture).substr(1, 3) == "ELF");
    const std::string ptx = cuda::compile({Family::sweep_moments, DType::float32}, 999);
    CHECK(ptx.find(".visible .entry bnfast_sweep_moments_float32") != std::string::npos);
    CHECK_THROWS_WITH_AS(cuda::compile({Family::sweep_moments, DType::float32}, 10),
                         doctest::Contains("Received: sm_10"), CompilerError);
}
