// What is asked before a step, and what is answered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sagec_turbomind.h"

namespace sagec::tm {

// A step's question: everybody who could compute in it, in TurboMind's own order.
class StepView {
  public:
    int free_blocks = 0, cached_blocks = 0, budget_tokens = 0;
    std::vector<sagec_tm_row> rows;

    void index_rows(); // once they are complete; find_row() wants it
    // The row of a session, null where it is not there.
    const sagec_tm_row *find_row(std::uint64_t session) const;
    std::size_t index_of(const sagec_tm_row &row) const { return &row - rows.data(); }

  private:
    std::size_t place_of(std::uint64_t session) const;

    // An open hash table of row numbers from 1, 0 where a place is free: built anew for every step,
    // so it must cost next to nothing. Its size is a power of two.
    std::vector<std::uint32_t> table_;
};

// A step's answer. Nobody named: hold.
struct Decision {
    int decided_by = SAGEC_TM_BY_STOCK;
    std::int64_t step = 0, plan = 0, plan_step = 0;
    std::vector<sagec_tm_item> items; // in this order; `end` absolute
    std::size_t num_decodes = 0;      // the last ones: a plan's batch, in which who finds no room waits
    std::int64_t late_tokens = 0;     // among them, though the plan took them for cached

    void clear() {
        decided_by = SAGEC_TM_BY_STOCK;
        items.clear();
        num_decodes = 0;
        late_tokens = 0;
    }
    bool is_stock() const { return decided_by == SAGEC_TM_BY_STOCK || decided_by == SAGEC_TM_BY_DEADLINE; }
    bool holds() const { return !is_stock() && items.empty(); }
};

} // namespace sagec::tm
