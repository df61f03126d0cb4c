// Compiled kernels on disk, so that only the first process compiles: $XDG_CACHE_HOME/bnfast/cuda, or
// ~/.cache/bnfast/cuda.
//
// What lies there is machine code that a process will run, so a folder or file that belongs to somebody else, or that
// others may write, is not read. Files are written beside their place and moved there, and begin with a checksum: a
// reader sees a whole image or none. Where nothing can be written, kernels stay in memory alone.
#pragma once
#include <string>

namespace bnfast::cuda {

// "" and the reason in `reason` (if given) where there is no usable folder. make: makes the folder.
std::string cache_folder(std::string* reason = nullptr, bool make = true);

// Whether the cache has the image of that name and key.
bool read_image(const std::string& name, const std::string& key, std::string& image);
void write_image(const std::string& name, const std::string& key, const std::string& image) noexcept;

}  // namespace bnfast::cuda
