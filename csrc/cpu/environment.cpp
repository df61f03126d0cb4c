#include "environment.h"

#include <cstdio>
#include <cstring>

namespace bnfast {

std::string shown(const char* value) {
    std::string text(value, ::strnlen(value, 80));
    for (char& c : text)
        if (c < ' ' || c > '~') c = '?';
    if (::strnlen(value, 81) > 80) text += "...";
    return text;
}

void report(const std::string& text) { std::fprintf(stderr, "bnfast: %s\n", text.c_str()); }

}  // namespace bnfast
