#include "files.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <new>

namespace bnfast {
namespace {

// The parts of `text` between any of `separators`, without the empty ones.
std::vector<std::string> split(const std::string& text, const char* separators) {
    std::vector<std::string> parts;
    for (std::size_t at = 0; (at = text.find_first_not_of(separators, at)) != std::string::npos;) {
        const std::size_t end = std::min(text.find_first_of(separators, at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end;
    }
    return parts;
}

}  // namespace

std::optional<std::string> contents(const std::string& path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), &std::fclose);
    if (!file && errno == ENOMEM) throw std::bad_alloc();
    if (!file) return {};
    std::string text;
    char buffer[4096];
    while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, file.get())) text.append(buffer, n);
    if (std::ferror(file.get())) return {};
    return text;
}

std::string first_line(const std::string& path) {
    const std::string text = contents(path).value_or("");
    return text.substr(0, text.find('\n'));
}

std::vector<std::string> lines_of(const std::string& path) { return split(contents(path).value_or(""), "\n"); }
std::vector<std::string> words_of(const std::string& line) { return split(line, " \t"); }

}  // namespace bnfast
