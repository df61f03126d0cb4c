// SHA-256 (FIPS 180-4): names and checks the images of the disk cache.
#pragma once
#include <string>

namespace bnfast::cuda {

std::string sha256(const std::string& text);  // 64 hexadecimal digits

}  // namespace bnfast::cuda
