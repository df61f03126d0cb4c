# The commands of the project, one line each (`pip install rust-just` brings just). `.ci/run` works without it.

# The quickest look, under 3 minutes: one build, some tests of every layer.
smoke:
    .ci/run smoke

# All tests in the environment at hand, the long products as a sample.
test *arguments:
    pip install ".[test]" && pytest {{arguments}}

# Everything that has to hold before a change goes in.
ci:
    .ci/run

# All cases, all model families, and new random examples.
nightly:
    HYPOTHESIS_PROFILE=explore pytest --whole -m ""

format:
    ruff check --fix . && ruff format . && git ls-files -z '*.h' '*.cpp' | xargs -0 clang-format -i

lint:
    .ci/run lint types

# Measures the promises of docs/guarantees.md, within an hour on 2 cores, and writes the page.
guarantees *arguments:
    PYTHONPATH=tests/helpers python -m guarantees {{arguments}}

# 120 mutants of the scalar path, and whether the C++ tests notice them: some 45 minutes of one core.
mutants *arguments:
    PYTHONPATH=tests/helpers python -m mutants {{arguments}}

# libFuzzer on views, plans and checks, 10 minutes; needs clang. Writes the corpus that every build replays.
fuzz *arguments:
    PYTHONPATH=tests/helpers python -m fuzzing {{arguments}}

# The site in build/site, from docs/, README, examples and docstrings (`pip install --group docs`).
site:
    mkdocs build --strict

# Measures errors beside the other libraries that are installed, and writes docs/accuracy.md.
accuracy *arguments:
    PYTHONPATH=tests/helpers python -m guarantees.peers {{arguments}}

bench:
    cmake --preset bench -G Ninja && cmake --build --preset bench && build/bench/bench/bench_batch_norm

# The C++ tests under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind.
sanitize:
    .ci/run sanitize tsan valgrind

# Coverage of C++ by its tests and of Python by the quick tests; reports in build/reports.
coverage:
    .ci/run coverage
