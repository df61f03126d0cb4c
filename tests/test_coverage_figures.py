"""What counts as covered, on small reports."""

from typing import Any

import coverage_figures
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


PYTHON = {
    "files": {"a.py": {"missing_lines": [7], "missing_branches": [[3, 5], [-1, 2]]}},
    "totals": {"covered_lines": 49, "num_statements": 50, "covered_branches": 97, "num_branches": 100},
}


def test_pythons_figures_and_what_is_missing():
    counts, missing = coverage_figures.of_python(PYTHON)
    assert counts == {"python_lines": [49, 50], "python_branches": [97, 100]}
    assert missing == ["a.py:7: never run", "a.py:3: never to 5"]
    assert not coverage_figures.kept(counts), "97 % of branches"
    assert coverage_figures.kept({**counts, "python_branches": [98, 100]})
    whole = {**counts, "cpp_lines": [1, 1], "cpp_branches": [0, 0]}
    assert coverage_figures.said(whole).startswith("C++ by its tests: 100.0 % of 1 lines, 100.0 % of 0 branches; ")
