// What is asked before a step, and what is answered.
#pragma once

#include <cstdint>
#include <vector>

#include "sagec_turbomind.h"

namespace sagec::tm {

// A step's question: everybody who could compute in it, in TurboMind's own order.
struct StepView {
    std::int64_t step = 0;
    int free_blocks = 0, cached_blocks = 0, budget_tokens = 0;
    std::vector<sagec_tm_row> rows;
};

// A step's answer. Nobody named: hold.
struct Decision {
    int decided_by = SAGEC_TM_BY_STOCK;
    bool strict = true;
    std::int64_t plan = 0, plan_step = 0;
    std::vector<sagec_tm_item> items; // in this order; `end` absolute

    bool is_stock() const { return decided_by == SAGEC_TM_BY_STOCK || decided_by == SAGEC_TM_BY_DEADLINE; }
    bool holds() const { return !is_stock() && items.empty(); }
};

} // namespace sagec::tm
