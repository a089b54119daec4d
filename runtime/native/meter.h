// What serving used: runtime/meter.py, as columns.
#pragma once

#include <vector>

#include "types.h"

namespace sagec {

// What one instance did; see InstanceUse.
struct InstanceUse {
    i64 busy_us = 0, steps = 0, prompt_tokens = 0, decode_tokens = 0;
    i64 sampled_tokens = 0, reused_tokens = 0, sent_bytes = 0;
    double pairs = 0;
};

class Meter {
  public:
    Meter(std::size_t instances, std::size_t requests) : uses(instances), computed_(requests) {}

    void hear(const Event &event);
    void planned(i64 now_us, i64 waiting, i64 running);

    std::vector<InstanceUse> uses;
    std::vector<i64> rounds_us, waiting, running;                        // a row a round
    std::vector<i64> report_instances, report_ends_us, report_kv_blocks; // a row a report
    std::vector<i64> moved, move_sources, move_targets, move_bytes;      // a row a move
    std::vector<i64> move_begins_us, move_ends_us;

  private:
    void stepped(const Event &report);
    void imported(const Event &event);

    std::vector<i64> computed_; // of a request, tokens with KV
};

} // namespace sagec
