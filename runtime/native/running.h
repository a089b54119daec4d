// A plan under way in the simulator: what comes next, as many like steps at a time as there are;
// runtime/engines/sim/running.py.
#pragma once

#include <optional>
#include <vector>

#include "cost.h"
#include "residents.h"
#include "types.h"

namespace sagec {

// Prompt tokens of a row that a step computes. plan_row: the row's number in the plan.
struct Computed {
    Row *row;
    i64 begin, end;
    i32 plan_row;
};

// Steps [first, first + ends_us.size()) of a plan that compute the same rows, one after another.
// With chunks it is one step, unless a lone prompt is computed chunk by chunk: `reached` are then
// its tokens after each of the steps. done: how many of the steps have been told of.
struct Stretch {
    i64 first = 0;
    std::vector<Computed> chunks;
    std::vector<Row *> decodes;
    i64 begin_us = 0;
    std::vector<i64> ends_us, reached;
    std::size_t done = 0;

    bool is_done() const { return done == ends_us.size(); }
    i64 told_until_us() const { return done ? ends_us[done - 1] : begin_us; }
    i64 step_ends_us() const { return ends_us[done]; }
    std::optional<i64> end_of_step_at(i64 now_us) const;
    std::size_t over_by(i64 now_us) const; // steps that have ended and were not told of
    void end_with_the_step_at(i64 now_us); // leave out those that begin then, or later
};

// A plan and how far it is: `step` is the next one.
class RunningPlan {
  public:
    i64 step = 0;

    void begin(Plan plan);
    const Plan &plan() const { return plan_; }
    i32 request(i32 row) const { return plan_.requests[row]; }
    i64 reserved(i32 row) const { return plan_.kv_blocks[row]; }
    bool is_over() const { return step >= plan_.num_steps; }

    std::vector<Plan::Move> exports; // that have not gone yet

    // The next steps in which there is something to do; false: there are none.
    bool next_stretch(Residents &residents, const StepCost &cost, i64 now_us, Stretch &stretch);

  private:
    i64 fill(Residents &residents, Stretch &stretch) const;
    std::size_t first_start_after(i64 step) const;
    i64 until_change() const;
    std::size_t first_chunk_of(i64 step) const;
    void add_chunks(Residents &residents, Stretch &stretch) const;
    i64 add_decodes(i64 tokens, i64 most, Residents &residents, Stretch &stretch) const;
    i64 steps_with_room(const Plan::Decode &decode, Row &row, i64 most, Residents &residents) const;
    void prolong(Residents &residents, const StepCost &cost, Stretch &stretch) const;

    Plan plan_;
    std::vector<i64> starts_; // steps in which chunks or the batch change
};

} // namespace sagec
