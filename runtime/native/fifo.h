// First come, first served: runtime/strategies/fifo.py and _room.py.
#pragma once

#include <vector>

#include "planner.h"
#include "table.h"
#include "types.h"

namespace sagec {

// An instance as loop and strategy see it.
struct Member {
    bool prefills = true, decodes = true;
    i64 kv_blocks = 0, block_tokens = 1;
    i64 room_tokens() const { return kv_blocks * block_tokens; }
};

// What a round is decided on. used: of each instance, blocks that are held or promised; growing:
// requests that are there; needed: blocks that these will hold with their next token.
struct Seen {
    const std::vector<Running> &running;
    std::vector<i64> used, growing, needed;
};

// admitted and rejected are requests, preempted rows of `running`.
struct Decision {
    std::vector<i32> admitted, rejected, preempted;
};

class Fifo {
  public:
    explicit Fifo(const std::vector<Member> &members);

    // Whether a request is too long for every instance. generate: tokens, or UNBOUNDED.
    bool is_too_long(i64 prompt_tokens, i64 generate_tokens) const;
    // Admit in order of coming what fits; reject what never will; preempt on overflow.
    void decide(const Seen &seen, const Table &table, Decision &decision);

  private:
    // Instances of one role, as far as room goes.
    struct Pool {
        std::vector<i32> members;
        i64 block_tokens = 1;
        i64 largest_tokens = 0;
    };

    Pool pool_of(bool Member::*role) const;
    i64 free_blocks(const Pool &pool, const Seen &seen) const;
    void admit(const Seen &seen, const Table &table, std::vector<i32> &admitted) const;
    void preempt(const Seen &seen, std::vector<i32> &preempted);

    std::vector<Member> members_;
    Pool prefills_, decodes_;
    std::vector<std::vector<i32>> rows_of_; // by instance
};

// Blocks that hold so many tokens.
inline i64 blocks_for(i64 tokens, i64 block_tokens) { return (tokens + block_tokens - 1) / block_tokens; }

// Tokens of a running request once its prompt is computed and one more is there.
inline i64 next_tokens(i64 prompt_tokens, i64 computed_tokens) {
    return (prompt_tokens > computed_tokens ? prompt_tokens : computed_tokens) + 1;
}

} // namespace sagec
