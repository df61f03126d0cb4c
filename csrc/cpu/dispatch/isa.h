// Chooses the kernel table. The tables that this processor supports are listed best first, and the first one runs.
// The environment variable BNFAST_ISA, read once at load, can name another one; so can set_isa, in tests.
#pragma once
#include <string>
#include <vector>

#include "kernel_table.h"

namespace bnfast {

const KernelTable& kernels();
std::string isa_reason();                // why kernels() was chosen at load
std::vector<std::string> usable_isas();  // best first
void set_isa(const std::string& name);  // tests only; "" restores the choice made at load; throws std::invalid_argument

const char* last_isa();  // the isa of the table that the calling thread's last call used
void record_isa(const KernelTable& table);

}  // namespace bnfast
