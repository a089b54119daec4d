// The direct planner (runtime/direct): a round's rows to the plans of all instances.
#pragma once

#include <memory>
#include <vector>

#include "cost.h"
#include "types.h"

namespace sagec {

// An instance as plans see it; see runtime/direct/topology.py and cluster.py.
struct PlannedInstance {
    bool prefills = true, decodes = true;
    i64 kv_blocks = 0, block_tokens = 1;
    i64 max_batch = 0, max_step_tokens = 0, max_partial_prefills = 0;
    double kv_bytes_per_token = 0;
    StepCost cost;
};

// The way of KV from one instance to another. links: numbers, of a link in one direction; 2n and
// 2n + 1 are the two directions of one.
struct Path {
    i32 source = NOBODY, target = NOBODY;
    double latency_us = 0, bytes_per_s = 1;
    std::vector<i32> links;
};

// One model on all instances. paths: from one to another instance that decodes, where `_hop` in
// runtime/direct/placement.py finds a way. hand_overs: [source * instances + target].
struct Cluster {
    std::vector<PlannedInstance> instances;
    std::vector<Path> paths;
    std::vector<double> link_bytes_per_s; // by number
    std::vector<char> hand_overs;         // whether KV surely may go; see Cluster.hands_over
};

// A waiting request that the strategy admits. cached: of each instance, the leading tokens it has.
struct Admitted {
    i32 request = NOBODY;
    i64 prompt_tokens = 0, generate_tokens = 0;
    const i64 *cached = nullptr;
};

// A running request: Running in runtime/state.py. cached_tokens: at its instance.
struct Running {
    i32 request = NOBODY;
    i32 instance = NOBODY, decode_on = NOBODY;
    i64 prompt_tokens = 0, computed_tokens = 0, remaining_tokens = 0, cached_tokens = 0;
    bool arriving = false;
};

// What was seen and decided. admitted: by rank; running: in the order of coming; preempted: rows of
// `running`, in the order of the decision; idle: instances at no plan.
struct Round {
    i64 number = 0;
    std::vector<Admitted> admitted;
    bool any_waiting = false; // whether anybody waits, admitted or not
    std::vector<Running> running;
    std::vector<i32> preempted;
    std::vector<char> idle;
};

class Planner {
  public:
    // chunk: tokens of a chunk, 0: whole prompts. horizon: steps of a plan.
    Planner(Cluster cluster, Mode mode, i64 chunk, i64 horizon);
    ~Planner();

    // The plans of a round, in the order of DirectPlanner.plan. Throws NotCovered.
    std::vector<Plan> plan(const Round &round);

  private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

} // namespace sagec
