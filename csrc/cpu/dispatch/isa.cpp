#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "bnfast/bnfast.h"
#include "cpu/environment.h"
#include "cpu/thread_state.h"

namespace bnfast {

extern const KernelTable baseline_kernels;
#if defined(BNFAST_HAS_AVX2)
extern const KernelTable avx2_kernels;
#endif
#if defined(BNFAST_HAS_AVX512)
extern const KernelTable avx512_kernels;
#endif

namespace {

std::vector<const KernelTable*> usable_tables() {
    std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(BNFAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2"))
        tables.push_back(&avx512_kernels);
#endif
#if defined(BNFAST_HAS_AVX2)
    // AVX2 implies F16C: every processor with AVX2 has it (Haswell, Excavator and later).
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2_kernels);
#endif
    tables.push_back(&baseline_kernels);
    return tables;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

struct Choice {
    std::vector<const KernelTable*> tables = usable_tables();
    const KernelTable* at_load = tables.front();
    std::string reason = "best of this processor";
    std::atomic<const KernelTable*> now{nullptr};

    const KernelTable* find(const std::string& name) const {
        for (const KernelTable* table : tables)
            if (name == table->isa) return table;
        return nullptr;
    }
    std::vector<std::string> names() const {
        std::vector<std::string> list;
        for (const KernelTable* table : tables) list.push_back(table->isa);
        return list;
    }
    std::string refusal(const std::string& what, const std::string& name) const {
        return what + " must be one of " + joined(names()) + " on this processor. Received: " + name;
    }
    Choice() {
        const char* wanted = std::getenv("BNFAST_ISA");
        if (wanted && *wanted) {
            if (const KernelTable* table = find(wanted)) {
                at_load = table;
                reason = "set by BNFAST_ISA";
            } else {
                reason += "; BNFAST_ISA=" + shown(wanted) + " can't be used";
                report(refusal("BNFAST_ISA", "'" + shown(wanted) + "'") + ". " + at_load->isa + " is used.");
            }
        }
        now = at_load;
    }
};

Choice& choice() {
    static Choice c;
    return c;
}
const bool read_at_load = (choice(), true);

}  // namespace

const KernelTable& kernels() { return *choice().now.load(std::memory_order_relaxed); }
std::string isa_reason() { return choice().reason; }
std::vector<std::string> usable_isas() { return choice().names(); }
std::string isa_name() { return kernels().isa; }

void set_isa(const std::string& name) {
    Choice& c = choice();
    const KernelTable* table = name.empty() ? c.at_load : c.find(name);
    if (!table) throw std::invalid_argument(c.refusal("isa", name));
    c.now = table;
}

const char* last_isa() {
    const ThreadState* const state = thread_state();
    return state ? state->isa : "";
}
void record_isa(const KernelTable& table) {
    if (ThreadState* const state = thread_state()) state->isa = table.isa;
}

}  // namespace bnfast
