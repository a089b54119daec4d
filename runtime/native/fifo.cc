// First come, first served: runtime/strategies/fifo.py and _room.py.
#include "fifo.h"

#include <algorithm>

namespace sagec {

namespace {

i64 floor_div(i64 value, i64 by) { return value >= 0 ? value / by : -blocks_for(-value, by); }

} // namespace

Fifo::Fifo(const std::vector<Member> &members)
    : members_(members), prefills_(pool_of(&Member::prefills)), decodes_(pool_of(&Member::decodes)),
      rows_of_(members.size()) {
    if (prefills_.members.empty() || decodes_.members.empty()) {
        throw NotCovered("a cluster in which nobody computes one of the phases");
    }
}

bool Fifo::is_too_long(i64 prompt_tokens, i64 generate_tokens) const {
    const i64 generate = generate_tokens == UNBOUNDED ? 1 : generate_tokens;
    return prompt_tokens + 1 > prefills_.largest_tokens || prompt_tokens + generate > decodes_.largest_tokens;
}

void Fifo::decide(const Seen &seen, const Table &table, Decision &decision) {
    decision.admitted.clear();
    decision.preempted.clear();
    decision.rejected.assign(table.too_long().begin(), table.too_long().end());
    preempt(seen, decision.preempted);
    if (decision.preempted.empty())
        admit(seen, table, decision.admitted);
}

Fifo::Pool Fifo::pool_of(bool Member::*role) const {
    Pool pool;
    for (std::size_t at = 0; at < members_.size(); ++at) {
        const Member &member = members_[at];
        if (!(member.*role))
            continue;
        pool.members.push_back(static_cast<i32>(at));
        pool.block_tokens = std::max(pool.block_tokens, member.block_tokens);
        pool.largest_tokens = std::max(pool.largest_tokens, member.room_tokens());
    }
    return pool;
}

i64 Fifo::free_blocks(const Pool &pool, const Seen &seen) const {
    i64 tokens = 0, growing = 0;
    for (const i32 at : pool.members) {
        tokens += (members_[at].kv_blocks - seen.used[at]) * members_[at].block_tokens;
        growing += seen.growing[at];
    }
    return floor_div(tokens, pool.block_tokens) - growing;
}

void Fifo::admit(const Seen &seen, const Table &table, std::vector<i32> &admitted) const {
    i64 prefill_blocks = free_blocks(prefills_, seen);
    i64 decode_blocks = free_blocks(decodes_, seen);
    for (const i32 request : table.waiting()) {
        if (table[request].is_too_long)
            continue;
        const i64 tokens = table[request].prompt_tokens + 1;
        prefill_blocks -= blocks_for(tokens, prefills_.block_tokens);
        decode_blocks -= blocks_for(tokens, decodes_.block_tokens);
        if (prefill_blocks < 0 || decode_blocks < 0)
            return;
        admitted.push_back(request);
    }
}

void Fifo::preempt(const Seen &seen, std::vector<i32> &preempted) {
    const std::size_t count = members_.size();
    std::size_t crowded = 0;
    while (crowded < count && seen.needed[crowded] <= members_[crowded].kv_blocks)
        ++crowded;
    if (crowded == count)
        return;
    for (auto &rows : rows_of_)
        rows.clear();
    for (std::size_t row = 0; row < seen.running.size(); ++row) {
        rows_of_[seen.running[row].instance].push_back(static_cast<i32>(row));
    }
    for (std::size_t at = 0; at < count; ++at) {
        i64 within = 0;
        for (const i32 row : rows_of_[at]) {
            const Running &one = seen.running[row];
            const i64 tokens = next_tokens(one.prompt_tokens, one.computed_tokens);
            within += blocks_for(tokens, members_[at].block_tokens);
            const bool is_alone = row == rows_of_[at].front();
            if (within > members_[at].kv_blocks && !is_alone && !one.arriving) {
                preempted.push_back(row);
            }
        }
    }
}

} // namespace sagec
