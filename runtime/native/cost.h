// The time of a step: runtime/cost.py, to the bit.
#pragma once

#include <vector>

#include "types.h"

namespace sagec {

// Microseconds over a count, in straight pieces; see Curve in runtime/cost.py.
struct Curve {
    std::vector<double> knots, us, slopes;
    double one(double count) const;
    double mean_slope = 0.0;
};

struct Fit {
    Curve prefill, decode;
    double pair_us = 0.0, context_us = 0.0, shared_us = 0.0;
};

struct StepCost {
    double flops_per_token = 0, flops_per_pair = 0, weight_bytes = 0, kv_bytes_per_token = 0;
    double flops_per_s = 1, bytes_per_s = 1, overhead_us = 0;
    bool has_fit = false;
    Fit fit;

    double step_us(double tokens, double pairs, double context_tokens, double decodes) const;
    double prefill_us(double begin, double end) const;  // what these prompt tokens add to a step
    double decode_us(double context_tokens) const;      // what such a request adds to a step
};

}  // namespace sagec
