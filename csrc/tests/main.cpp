#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

// Read by LeakSanitizer, where there is one: a team that was outgrown stays, as its last workers may still look at it.
extern "C" const char* __lsan_default_suppressions() { return "leak:pool_for"; }
