// Every allocation of the disk cache fails once: no file stays open or half-written.
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <new>

#include "cuda/image_cache.h"

extern "C" {
void failing_malloc_arm(long k, int all);
long failing_malloc_disarm();
}

using namespace bnfast::cuda;
namespace fs = std::filesystem;

namespace {

long entries(const fs::path& folder) { return std::distance(fs::directory_iterator(folder), fs::directory_iterator()); }

// Calls f with its first, second ... allocation failing, until none fails, and returns how many failed.
template <class F> long sweep(F f) {
    for (long k = 1;; ++k) {
        failing_malloc_arm(k, 0);
        try {
            f();
        } catch (const std::bad_alloc&) {
        }
        if (failing_malloc_disarm() < k) return k - 1;
    }
}

}  // namespace

TEST_CASE("the disk cache without memory leaves no file open and none half-written") {
    std::string home = (fs::temp_directory_path() / "bnfast-cache-XXXXXX").string();
    REQUIRE(mkdtemp(home.data()));
    setenv("XDG_CACHE_HOME", home.c_str(), 1);
    const std::string key(64, 'k'), image(1 << 18, 'i');
    write_image("kernel", key, image);
    const fs::path folder = fs::path(home) / "bnfast" / "cuda";
    const long open = entries("/proc/self/fd");
    REQUIRE(entries(folder) == 1);

    CHECK(sweep([&] { write_image("kernel", key, image); }) > 5);
    std::string read;
    CHECK(sweep([&] {
              read.clear();
              read_image("kernel", key, read);
          }) > 5);
    CHECK(read == image);
    CHECK(entries("/proc/self/fd") == open);
    CHECK(entries(folder) == 1);
    fs::remove_all(home);
    unsetenv("XDG_CACHE_HOME");
}
