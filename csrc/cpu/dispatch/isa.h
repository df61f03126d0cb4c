// Which kernel table runs, and why: an ordered list, best first; the environment's BNFAST_ISA, read once at load, or a
// test's set_isa may take another that this processor can run.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

namespace bnfast {

const KernelTable& kernels();
std::string isa_reason();
std::vector<std::string> usable_isas();  // best first
void set_isa(const std::string& name);   // tests only; "" goes back to what load chose; std::invalid_argument
std::string isa_of_environment_error();  // empty, or why BNFAST_ISA can't be honoured

const char* last_isa();  // what the calling thread's last call ran on: the table's own word
void record_isa(const KernelTable& table);

}  // namespace bnfast
