// The bytes of one input, read as fields. Whatever is read past the end is 0, so every input is a whole case.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace bnfast::fuzz {

class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}

    template <class T> T raw() {
        T value{};
        const std::size_t n = std::size_t(end_ - at_) < sizeof value ? std::size_t(end_ - at_) : sizeof value;
        if (n) std::memcpy(&value, at_, n);
        at_ += n;
        return value;
    }
    std::uint8_t byte() { return raw<std::uint8_t>(); }
    bool flag() { return byte() & 1; }
    int below(int n) { return byte() % n; }
    // Mostly small; else any value, near a power of two or not.
    std::int64_t extent(int most) {
        const int kind = below(16);
        if (kind < 13) return below(most + 1);
        if (kind == 13) return (std::int64_t(1) << below(63)) + below(3) - 1;
        if (kind == 14) return -std::int64_t(byte());
        return raw<std::int64_t>();
    }
    double number() {
        switch (below(8)) {
            case 0: return raw<double>();
            case 1: return -1;
            case 2: return 1e300;
            default: return below(17) / 16.0;
        }
    }

private:
    const std::uint8_t *at_, *end_;
};

// A broken promise ends the process, which libFuzzer and CTest report.
inline void expect(bool kept, const char* promise) {
    if (kept) return;
    std::fprintf(stderr, "broken: %s\n", promise);
    std::abort();
}

}  // namespace bnfast::fuzz
