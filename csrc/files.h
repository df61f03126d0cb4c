// Small files, read whole with the C library. std::ifstream would bring libstdc++'s locales with it, which each module
// of a wheel would carry (CMakeLists.txt links libstdc++ statically).
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace bnfast {

// Nothing where the file can't be read. Throws std::bad_alloc where memory is missing, which says nothing about the
// file.
std::optional<std::string> contents(const std::string& path);
std::string first_line(const std::string& path);             // "" where it can't be read
std::vector<std::string> lines_of(const std::string& path);  // none where it can't be read
std::vector<std::string> words_of(const std::string& line);  // what stands between spaces and tabs

}  // namespace bnfast
