// A folder that stands for the root of the file system, with files that look like /proc and /sys.
#pragma once
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace bnfast::test {

class FakeRoot {
public:
    FakeRoot() {
        std::string name = std::filesystem::temp_directory_path() / "bnfast-root-XXXXXX";
        path_ = mkdtemp(name.data());
    }
    FakeRoot(const FakeRoot&) = delete;
    ~FakeRoot() { std::filesystem::remove_all(path_); }
    void write(const std::string& file, const std::string& text) const {
        const std::filesystem::path path = path_ + file;
        std::filesystem::create_directories(path.parent_path());
        std::ofstream(path) << text << "\n";
    }
    const std::string& path() const { return path_; }

private:
    std::string path_;
};

}  // namespace bnfast::test
