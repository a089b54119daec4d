// A plan under way: which tokens of which sessions the next step computes.
//
// The rules are those of sagec's runtime/cursor.py, and tests hold the two against each other. What
// differs: room is TurboMind's to give, so a row is named whether it will find room or not, and is
// asked for again in the next step that names it.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "decision.h"

namespace sagec::tm {

// A chunk that begins behind tokens that nobody computed, and was left out.
struct Gap {
    std::uint64_t session;
    std::int64_t plan_step, begin, computed;
};

class PlanCursor {
  public:
    explicit PlanCursor(const sagec_tm_plan &plan); // copies its columns

    std::int64_t plan() const { return plan_; }
    bool is_done() const; // all its steps have gone by

    // Whom the next step that has anything to do computes; the cursor goes behind that step. Empty:
    // there is none for those who are there; then it stays where it is, for others may still come.
    Decision next(const StepView &view, std::vector<Gap> &gaps);

  private:
    std::int64_t plan_ = 0, num_steps_ = 0, max_step_tokens_ = 0, step_ = 0;
    bool mixes_phases_ = true;
};

} // namespace sagec::tm
