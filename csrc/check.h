// Argument checks of the C++ API. Each throws std::invalid_argument for a bad argument, before anything is written.
#pragma once
#include "bnfast/bnfast.h"

namespace bnfast {

// Whether a shape has at most `limit` values. Extents of 0 count as 1, because a plan multiplies the others too.
bool has_at_most(Shape shape, std::int64_t limit);

void check(const TrainArgs& args);
void check(const InferArgs& args);
void check(const GradArgs& args);
void check(const MomentsArgs& args);
void check(const GroupNormArgs& args);
void check(const GroupNormGradArgs& args);

}  // namespace bnfast
