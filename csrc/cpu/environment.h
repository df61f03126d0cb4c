// What is said about an environment variable that can't be used: one line on stderr, and what would be used without it
// is used.
#pragma once
#include <string>

namespace bnfast {

// A value as one line shows it: its first 80 bytes, with "?" for those that aren't printable ASCII.
std::string shown(const char* value);
void report(const std::string& text);  // "bnfast: " and the text

}  // namespace bnfast
