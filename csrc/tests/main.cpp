#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdio>

// For LeakSanitizer: when a larger team replaces a team, the old one is never freed, because its last workers may still
// access it.
extern "C" const char* __lsan_default_suppressions() { return "leak:pool_for"; }

int main(int argc, char** argv) {
    const int status = doctest::Context(argc, argv).run();
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
    // The workers never end, and some may still be starting. Exit handlers of libomp and its tool archer free what a
    // starting worker uses: a crash or a false race in 1 of 16 runs on a busy machine. _exit runs no handlers;
    // ThreadSanitizer still turns its reports into an exit status.
    std::fflush(nullptr);
    _exit(status);
#endif
#endif
    return status;
}
