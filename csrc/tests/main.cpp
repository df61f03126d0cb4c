#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

// For LeakSanitizer: when a larger team replaces a team, the old one is never freed, because its last workers may still
// access it.
extern "C" const char* __lsan_default_suppressions() { return "leak:pool_for"; }
