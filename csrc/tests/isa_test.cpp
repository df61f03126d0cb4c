// Which instruction set runs: the order, a refusal that names the choices, and what the environment asked for.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>

#include "cases.h"
#include "cpu/dispatch/isa.h"

using namespace bnfast;
using namespace bnfast::test;

namespace {

std::string ran() {
    const Case c{{64, 70, 1}};
    run_train(c, Inputs(c));
    return last_isa();
}

}  // namespace

TEST_CASE("the baseline is always there, last; what is forced is what runs") {
    const auto isas = usable_isas();
    REQUIRE_FALSE(isas.empty());
#if defined(__x86_64__)
    CHECK(isas.back() == "baseline");
#endif
    for (const std::string& isa : isas) {
        const Settings settings(isa, 0);
        CHECK(isa_name() == isa);
        CHECK(ran() == isa);
    }
}

TEST_CASE("an unknown instruction set is refused with the choices, and nothing changes") {
    const std::string before = isa_name();
    CHECK_THROWS_WITH_AS(set_isa("sse9"), doctest::Contains("baseline"), std::invalid_argument);
    CHECK_THROWS_WITH_AS(set_isa("sse9"), doctest::Contains("Received: sse9"), std::invalid_argument);
    CHECK(isa_name() == before);
}

// CTest runs this with BNFAST_ISA set, to each name in turn.
TEST_CASE("environment: BNFAST_ISA is what runs, or every call says why not" * doctest::skip()) {
    const char* wanted = std::getenv("BNFAST_ISA");
    REQUIRE(wanted != nullptr);
    const auto isas = usable_isas();
    if (std::find(isas.begin(), isas.end(), wanted) != isas.end()) {
        CHECK(isa_name() == wanted);
        CHECK(isa_of_environment_error().empty());
        CHECK(isa_reason().find("BNFAST_ISA") != std::string::npos);
        CHECK(ran() == wanted);
    } else {
        CHECK(isa_of_environment_error().find(wanted) != std::string::npos);
        CHECK_THROWS_WITH_AS(isa_name(), doctest::Contains("BNFAST_ISA must be one of"), std::invalid_argument);
        CHECK_THROWS_AS(ran(), std::invalid_argument);
    }
}
