// A run from its columns: what runtime/native/library.py says, as the parts need it.
#pragma once

#include <memory>
#include <vector>

#include "columns.h"
#include "executor.h"
#include "planner.h"
#include "types.h"

namespace sagec {

// Owns all that a run needs.
class Simulation {
  public:
    // blocks_of: see Directory; plan_elsewhere: see Loop. Throws NotCovered.
    Simulation(const Columns &told, Directory::BlocksOf blocks_of, Loop::PlanElsewhere plan_elsewhere);

    bool advance(i64 turns) { return executor_->advance(turns); }
    // What came of it, up to now.
    Columns result() const;

  private:
    std::vector<i64> hashes_;
    std::vector<Request> requests_;
    std::vector<char> refused_;
    std::unique_ptr<Planner> planner_;
    std::unique_ptr<Executor> executor_;
};

// The plans that columns say, of one round.
std::vector<Plan> read_plans(const Columns &told);

} // namespace sagec
