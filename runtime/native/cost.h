// The time of a step: runtime/cost.py, to the bit.
#pragma once

#include <memory>
#include <vector>

#include "types.h"

namespace sagec {

// Microseconds over a count, in straight pieces; see Curve in runtime/cost.py.
struct Curve {
    std::vector<double> knots, us, slopes;
    double mean_slope = 0.0;

    static Curve of(double begin_us, std::vector<double> knots, std::vector<double> slopes);
    double one(double count) const;
};

struct Fit {
    Curve prefill, decode;
    double pair_us = 0.0, context_us = 0.0, shared_us = 0.0;

    double one(double tokens, double pairs, double context_tokens, double decodes) const;
};

struct StepCost {
    double flops_per_token = 0, flops_per_pair = 0, weight_bytes = 0, kv_bytes_per_token = 0;
    double flops_per_s = 1, bytes_per_s = 1, overhead_us = 0;
    double head_flops_per_token = 0, expert_bytes = 0, experts = 0, experts_per_token = 0;
    bool has_fit = false;
    Fit fit;

    void prepare(); // to be called once all numbers are there, before anything else
    double step_us(double tokens, double pairs, double context_tokens, double decodes) const;
    double prefill_us(double begin, double end) const; // what these prompt tokens add to a step
    double decode_us(double context_tokens) const;     // what such a request adds to a step

  private:
    double experts_read(double tokens) const;

    std::shared_ptr<const std::vector<double>> shares_; // of experts that are read, by tokens
};

} // namespace sagec
