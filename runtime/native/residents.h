// The requests on a simulated instance, and the KV blocks that they and the prefix cache hold:
// runtime/engines/sim/residents.py and row.py.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "prefix_index.h"
#include "types.h"

namespace sagec {

// A request: how far it is, in tokens and blocks. prompt_tokens, num_tokens: prompt, with the
// output. computed: of them, how many have KV. limit: tokens at which it ends. blocks: that it
// holds, of which the first, `lease`, are in the prefix cache. named_in: the last plan that did.
struct Row {
    Sent sent;
    i64 num_tokens = 0, limit = 0, computed = 0, blocks = 0;
    Lease lease;
    i64 named_in = 0;
    std::size_t place = 0; // among those here

    i32 request() const { return sent.request; }
    i64 prompt_tokens() const { return sent.prompt_tokens; }
    i64 num_output() const { return num_tokens - sent.prompt_tokens; }
    bool decodes() const { // whether only the token sampled last has no KV
        return sent.prompt_tokens <= computed && computed == num_tokens - 1;
    }
};

class Residents {
  public:
    // caches: whether there is a prefix cache.
    Residents(i64 kv_blocks, i64 block_tokens, bool caches, const std::vector<Request> &requests);

    const i64 kv_blocks, block_tokens, room_tokens;
    std::vector<Event::Reuse> reused;

    // nullptr: not here. A row stays what it is, also when it was dropped, until `recycle`.
    Row *find(i32 request) const { return rows_[request]; }
    Row &add(const Sent &sent, i64 output_tokens = 0); // what was here of it is forgotten
    void drop(i32 request);                            // and free its blocks; what is cached of it stays
    void recycle();                                    // nobody knows rows that were dropped any more
    void let_go(Row &row);                             // of its blocks
    std::string refusal(const Sent &sent) const;       // "": it can be served

    void begin(Row &row); // give it what is cached of its prompt, if it holds nothing yet
    void store(Row &row); // cache what is computed of its prompt

    // Have blocks for so many tokens, and those reserved where they are free; false: too few are.
    bool make_room(Row &row, i64 tokens, i64 reserved = 0);
    // Take back blocks without KV that a new plan does not reserve for its requests.
    void keep_only(const std::vector<i32> &requests, const std::vector<i64> &reserved);

    i64 used_blocks() const { return own_blocks_ + (index_ ? index_->pinned() : 0); }
    PrefixIndex *index() { return index_ ? &*index_ : nullptr; }

  private:
    i64 free_blocks() const { return kv_blocks - own_blocks_ - (index_ ? index_->size() : 0); }
    i64 blocks_for(i64 tokens) const { return (tokens + block_tokens - 1) / block_tokens; }
    i64 known_blocks(const Row &row, i64 blocks) const;
    void hold(Row &row, i64 blocks);
    void trim(Row &row, i64 reserved);

    const std::vector<Request> &requests_;
    std::optional<PrefixIndex> index_;
    std::deque<Row> made_;
    std::vector<Row *> rows_; // by request
    std::vector<Row *> here_, dropped_, unused_;
    i64 own_blocks_ = 0, num_plans_ = 0;
};

} // namespace sagec
