"""What counts as covered, on a report of four lines."""

from typing import Any

import cpp_coverage


def line(number: int, count: int, *branches: tuple[int, int], **more: Any) -> dict[str, Any]:
    found = [
        {"branchno": n, "count": c, "source_block_id": 1} for n, c in enumerate(c for pair in branches for c in pair)
    ]
    return {"line_number": number, "count": count, "branches": found, **more}


def test_a_line_counts_once_and_a_branch_of_the_kernels_too():
    plain = [
        line(1, 3, (1, 2)),
        line(1, 0, (0, 0)),
        line(2, 0),
        line(3, 5, (4, 0)),
        line(4, 0, **{"gcovr/excluded": True}),
    ]
    # Two instances of one template: one takes the condition, the other doesn't.
    kernel = [line(9, 4, (4, 0), (0, 4))]
    found = cpp_coverage.measure(
        {
            "files": [
                {"file": "csrc/cpu/plan.cpp", "lines": plain},
                {"file": "csrc/cpu/kernels/a.inl.h", "lines": kernel},
            ]
        }
    )
    assert (found["lines_run"], found["lines"]) == (3, 4)
    assert (found["branches_taken"], found["branches"]) == (5, 6)
    assert found["missing"] == ["csrc/cpu/plan.cpp:2: never run", "csrc/cpu/plan.cpp:3: 1 of 2 branches"]
    assert cpp_coverage.percent(0, 0) == 100
