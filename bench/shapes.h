// The shapes of shapes.csv: set, name, N, C and the spatial extents ("56x56"; empty for dense layers).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct NamedShape {
    std::string set, name;
    std::int64_t N, C, spatial;
};

inline std::vector<NamedShape> read_shapes(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("can't read " + path);
    std::vector<NamedShape> shapes;
    std::string line;
    std::getline(file, line);  // the header
    while (std::getline(file, line)) {
        std::stringstream fields(line);
        std::string set, name, n, c, spatial, extent;
        std::getline(fields, set, ',');
        std::getline(fields, name, ',');
        std::getline(fields, n, ',');
        std::getline(fields, c, ',');
        std::getline(fields, spatial, ',');
        std::int64_t product = 1;
        for (std::stringstream extents(spatial); std::getline(extents, extent, 'x');) product *= std::stoll(extent);
        shapes.push_back({set, name, std::stoll(n), std::stoll(c), product});
    }
    return shapes;
}
