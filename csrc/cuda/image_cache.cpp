#include "cuda/image_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "cuda/sha256.h"

namespace bnfast::cuda {
namespace {

const std::string magic = "bnfast-cuda-image-1 ";

std::string base_folder() {
    const char* given = std::getenv("XDG_CACHE_HOME");
    if (given && given[0] == '/') return given;  // the specification ignores relative paths
    const char* home = std::getenv("HOME");
    return home && home[0] == '/' ? std::string(home) + "/.cache" : "";
}

bool is_private(const struct stat& s) { return s.st_uid == geteuid() && (s.st_mode & (S_IWGRP | S_IWOTH)) == 0; }

std::string file_of(const std::string& folder, const std::string& name, const std::string& key) {
    return folder + "/" + name + "-" + key.substr(0, 32) + ".bin";
}

struct File {  // closed also where memory is missing
    const int number;
    explicit File(int n) : number(n) {}
    ~File() {
        if (number >= 0) close(number);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
};

bool write_all(int file, const std::string& text) {
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t n = write(file, text.data() + at, text.size() - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += std::size_t(n);
    }
    return true;
}

bool read_all(int file, std::string& text) {
    char buffer[1 << 16];
    for (;;) {
        const ssize_t n = read(file, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        if (n == 0) return true;
        text.append(buffer, std::size_t(n));
    }
}

// checksum, key and image, as one text
std::string contents(const std::string& key, const std::string& image) {
    const std::string rest = key + "\n" + image;
    return magic + sha256(rest) + "\n" + rest;
}

}  // namespace

std::string cache_folder(std::string* reason, bool make) {
    const auto none = [&](const std::string& why) {
        if (reason) *reason = why;
        return std::string();
    };
    std::string folder = base_folder();
    if (folder.empty()) return none("neither XDG_CACHE_HOME nor HOME is an absolute path");
    for (const char* part : {"", "/bnfast", "/cuda"}) {
        folder += part;
        if (make && mkdir(folder.c_str(), 0700) && errno != EEXIST) return none(folder + ": " + std::strerror(errno));
    }
    struct stat s{};
    const bool found = lstat(folder.c_str(), &s) == 0;
    if (!found && !make && errno == ENOENT) return folder;
    if (!found || !S_ISDIR(s.st_mode)) return none(folder + " is not a folder");
    if (!is_private(s)) return none(folder + " belongs to somebody else, or others may write to it");
    return folder;
}

bool read_image(const std::string& name, const std::string& key, std::string& image) {
    const std::string folder = cache_folder();
    if (folder.empty()) return false;
    const File file(open(file_of(folder, name, key).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (file.number < 0) return false;
    struct stat s{};
    std::string text;
    const bool whole =
        fstat(file.number, &s) == 0 && S_ISREG(s.st_mode) && is_private(s) && read_all(file.number, text);
    const std::size_t begin = magic.size() + 64 + 1 + key.size() + 1;
    if (!whole || text.size() < begin) return false;
    image = text.substr(begin);
    return text == contents(key, image);
}

void write_image(const std::string& name, const std::string& key, const std::string& image) noexcept {
    try {
        const std::string folder = cache_folder();
        if (folder.empty()) return;
        const std::string text = contents(key, image), target = file_of(folder, name, key);
        std::string path = folder + "/.new-XXXXXX";
        const int file = mkostemp(path.data(), O_CLOEXEC);  // mode 0600
        if (file < 0) return;
        const bool written = write_all(file, text);
        if (close(file) || !written || rename(path.c_str(), target.c_str())) unlink(path.c_str());
    } catch (...) {  // out of memory: the kernel stays in memory alone, or doesn't
    }
}

}  // namespace bnfast::cuda
