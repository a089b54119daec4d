// Who is on a simulated instance; see runtime/engines/sim/residents.py.
#include "residents.h"

#include <algorithm>

namespace sagec {

Residents::Residents(i64 kv_blocks, i64 block_tokens, bool caches, const std::vector<Request> &requests)
    : kv_blocks(kv_blocks), block_tokens(block_tokens), room_tokens(kv_blocks * block_tokens),
      requests_(requests), rows_(requests.size(), nullptr) {
    if (caches)
        index_.emplace();
}

std::string Residents::refusal(const Sent &sent) const {
    if (sent.prompt_tokens < room_tokens)
        return "";
    return "a prompt of " + std::to_string(sent.prompt_tokens) + " tokens leaves no room for an answer in " +
           std::to_string(room_tokens) + " tokens of context";
}

Row &Residents::add(const Sent &sent, i64 output_tokens) {
    drop(sent.request);
    if (unused_.empty())
        unused_.push_back(&made_.emplace_back());
    Row &row = *unused_.back();
    unused_.pop_back();
    row = Row{};
    row.sent = sent;
    row.num_tokens = sent.prompt_tokens + output_tokens;
    row.limit = sent.prompt_tokens + sent.max_output_tokens;
    row.place = here_.size();
    here_.push_back(&row);
    return *(rows_[sent.request] = &row);
}

void Residents::drop(i32 request) {
    Row *row = rows_[request];
    if (!row)
        return;
    let_go(*row);
    rows_[request] = nullptr;
    here_.back()->place = row->place;
    here_[row->place] = here_.back();
    here_.pop_back();
    dropped_.push_back(row);
}

void Residents::recycle() {
    unused_.insert(unused_.end(), dropped_.begin(), dropped_.end());
    dropped_.clear();
}

void Residents::let_go(Row &row) {
    hold(row, row.lease.blocks);
    if (row.lease.blocks)
        index_->release(row.lease);
    row.lease = {};
    row.blocks = 0;
}

void Residents::begin(Row &row) {
    if (!index_ || row.blocks || row.computed)
        return;
    const i64 count = known_blocks(row, (row.num_tokens - 1) / block_tokens);
    row.lease = index_->lookup(requests_[row.request()].hashes, count);
    if (!row.lease.blocks)
        return;
    row.blocks = row.lease.blocks;
    row.computed = row.lease.blocks * block_tokens;
    reused.push_back({row.request(), row.computed});
}

void Residents::store(Row &row) {
    if (!index_)
        return;
    const i64 have = row.lease.blocks;
    const i64 more = known_blocks(row, row.computed / block_tokens) - have;
    if (more <= 0)
        return;
    index_->insert(row.lease, requests_[row.request()].hashes + have, more);
    own_blocks_ -= more;
}

// How many of the prompt's first blocks have names.
i64 Residents::known_blocks(const Row &row, i64 blocks) const {
    const Request &request = requests_[row.request()];
    blocks = std::min(blocks, row.prompt_tokens() / block_tokens);
    if (blocks > request.num_hashes && !request.hashes_given)
        throw NotCovered("the prefix cache of a request that was started over with its output");
    return std::min(blocks, request.num_hashes);
}

bool Residents::make_room(Row &row, i64 tokens, i64 reserved) {
    if (row.blocks && row.blocks * block_tokens >= tokens)
        return true;
    const i64 needed = blocks_for(tokens), more = needed - row.blocks;
    if (more > free_blocks()) {
        if (index_)
            index_->evict(more - free_blocks());
        if (more > free_blocks())
            return false;
    }
    hold(row, std::max(needed, std::min(reserved, row.blocks + free_blocks())));
    return true;
}

void Residents::keep_only(const std::vector<i32> &requests, const std::vector<i64> &reserved) {
    ++num_plans_;
    for (std::size_t i = 0; i < requests.size(); ++i) {
        if (Row *row = find(requests[i])) {
            row->named_in = num_plans_;
            trim(*row, reserved[i]);
        }
    }
    for (Row *row : here_)
        if (row->named_in != num_plans_)
            trim(*row, 0);
}

void Residents::trim(Row &row, i64 reserved) {
    if (row.blocks > reserved)
        hold(row, std::max(blocks_for(row.computed), reserved));
}

// Have the row hold so many blocks, those of the cache among them.
void Residents::hold(Row &row, i64 blocks) {
    blocks = std::max(blocks, row.lease.blocks);
    own_blocks_ += blocks - row.blocks;
    row.blocks = blocks;
}

} // namespace sagec
