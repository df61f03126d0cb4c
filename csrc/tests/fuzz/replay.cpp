// Runs a target on the inputs of a corpus, one per line in hexadecimal, where libFuzzer isn't: every build replays
// them.
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "input.h"

int main(int argc, char** argv) {
    if (argc != 2) return std::cerr << "usage: " << argv[0] << " CORPUS\n", 2;
    std::ifstream file(argv[1]);
    int inputs = 0;
    for (std::string line; std::getline(file, line); ++inputs) {
        std::vector<std::uint8_t> bytes;
        for (std::size_t i = 0; i + 1 < line.size(); i += 2)
            bytes.push_back(std::uint8_t(std::stoi(line.substr(i, 2), nullptr, 16)));
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    if (inputs == 0) return std::cerr << argv[1] << " holds no input\n", 1;
    std::cout << inputs << " inputs\n";
    return 0;
}
