// The disk cache of compiled kernels: what was written is read, and nothing else is.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "cuda/image_cache.h"
#include "cuda/sha256.h"

using namespace bnfast::cuda;
namespace fs = std::filesystem;

namespace {

// A fresh XDG_CACHE_HOME.
struct Home {
    fs::path path;
    Home() {
        std::string name = (fs::temp_directory_path() / "bnfast-cache-XXXXXX").string();
        REQUIRE(mkdtemp(name.data()));
        path = name;
        setenv("XDG_CACHE_HOME", name.c_str(), 1);
    }
    ~Home() {
        fs::permissions(path, fs::perms::owner_all);
        fs::remove_all(path);
        unsetenv("XDG_CACHE_HOME");
    }
    fs::path only_file() const {
        std::vector<fs::path> all;
        for (const auto& entry : fs::directory_iterator(path / "bnfast" / "cuda")) all.push_back(entry.path());
        REQUIRE(all.size() == 1);
        return all[0];
    }
};

const std::string key = sha256("a key");
const std::string image(
    "\x7f"
    "ELF\0 with zeros",
    16);

bool reads(const std::string& name, const std::string& under) {
    std::string found;
    return read_image(name, under, found) && found == image;
}

}  // namespace

TEST_CASE("sha256 gives the values of FIPS 180-4") {
    CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("an image is read under its name and key alone, by its owner alone") {
    const Home home;
    CHECK(!reads("kernel", key));
    write_image("kernel", key, image);
    CHECK(reads("kernel", key));
    CHECK(!reads("kernel", sha256("another")));
    CHECK(!reads("other", key));
    struct stat s{};
    REQUIRE(stat(home.only_file().c_str(), &s) == 0);
    CHECK((s.st_mode & 0777) == 0600);
    REQUIRE(stat(cache_folder().c_str(), &s) == 0);
    CHECK((s.st_mode & 0777) == 0700);
}

TEST_CASE("a damaged, foreign or replaced file is not read, and is written anew") {
    const Home home;
    write_image("kernel", key, image);
    const fs::path file = home.only_file();
    SUBCASE("shortened") { fs::resize_file(file, fs::file_size(file) - 1); }
    SUBCASE("empty") { fs::resize_file(file, 0); }
    SUBCASE("a bit flipped") {
        std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
        f.seekp(-1, std::ios::end);
        f.put('!');
    }
    SUBCASE("of another key") {
        write_image("kernel", sha256("another"), image);
        for (const auto& entry : fs::directory_iterator(file.parent_path()))
            if (entry.path() != file) fs::rename(entry.path(), file);
    }
    SUBCASE("writable by others") { fs::permissions(file, fs::perms::others_write, fs::perm_options::add); }
    SUBCASE("a link") {
        fs::rename(file, home.path / "elsewhere");
        fs::create_symlink(home.path / "elsewhere", file);
    }
    CHECK(!reads("kernel", key));
    write_image("kernel", key, image);
    CHECK(reads("kernel", key));
}

TEST_CASE("without a usable folder nothing is read or written, and the reason is told") {
    const Home home;
    std::string reason;
    SUBCASE("others may write to it") {
        fs::permissions(cache_folder(), fs::perms::all);
        CHECK(cache_folder(&reason) == "");
        CHECK(reason.find("others may write to it") != std::string::npos);
    }
    SUBCASE("a file is in its place") {
        std::ofstream(home.path / "bnfast") << "a file";
        CHECK(cache_folder(&reason) == "");
        CHECK(reason.find("Not a directory") != std::string::npos);
    }
    SUBCASE("no home") {
        const std::string before = std::getenv("HOME") ? std::getenv("HOME") : "";
        setenv("XDG_CACHE_HOME", "relative", 1);
        unsetenv("HOME");
        CHECK(cache_folder(&reason) == "");
        CHECK(reason.find("HOME") != std::string::npos);
        setenv("HOME", before.c_str(), 1);
        setenv("XDG_CACHE_HOME", home.path.c_str(), 1);
        return;
    }
    write_image("kernel", key, image);
    CHECK(!reads("kernel", key));
}
