// Choice of the instruction set: order of preference, the error for an unknown name, and BNFAST_ISA.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>

#include "cases.h"
#include "cpu/dispatch/isa.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

std::string isa_that_ran() {
    const Case c{{64, 70, 1}};
    run_train(c, Inputs(c));
    return last_isa();
}

}  // namespace

TEST_CASE("baseline is always available and last; set_isa chooses the instruction set that runs") {
    const auto isas = usable_isas();
    REQUIRE_FALSE(isas.empty());
#if defined(__x86_64__)
    CHECK(isas.back() == "baseline");
#endif
    for (const std::string& isa : isas) {
        const Settings settings(isa, 0);
        CHECK(isa_name() == isa);
        CHECK(isa_that_ran() == isa);
    }
}

TEST_CASE("set_isa throws for an unknown name, lists the choices and changes nothing") {
    const std::string before = isa_name();
    CHECK_THROWS_WITH_AS(set_isa("sse9"), doctest::Contains(smallest_isa().c_str()), std::invalid_argument);
    CHECK_THROWS_WITH_AS(set_isa("sse9"), doctest::Contains("Received: sse9"), std::invalid_argument);
    CHECK(isa_name() == before);
}

// CTest runs this once per name, with BNFAST_ISA set to it.
TEST_CASE(
    "environment: the instruction set in BNFAST_ISA runs, or where it can't the best one, and the reason says so" *
    doctest::skip()) {
    const char* wanted = std::getenv("BNFAST_ISA");
    REQUIRE(wanted != nullptr);
    const auto isas = usable_isas();
    if (std::find(isas.begin(), isas.end(), wanted) != isas.end()) {
        CHECK(isa_name() == wanted);
        CHECK(isa_reason().find("BNFAST_ISA") != std::string::npos);
        CHECK(isa_that_ran() == wanted);
    } else {
        CHECK(isa_name() == isas.front());
        CHECK(isa_reason() == std::string("best of this processor; BNFAST_ISA=") + wanted + " can't be used");
        CHECK(isa_that_ran() == isas.front());
    }
}
